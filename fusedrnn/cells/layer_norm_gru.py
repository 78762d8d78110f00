"""Gated recurrent unit whose gates are normalised together, as DreamerV2 and DreamerV3 have it.

    a = x_gates + h_gates
    y = (a - mean(a)) / sqrt(var(a) + eps) * weight_ln + bias_ln           over all 3 H of a row
    r = sigmoid(y_r)     z = sigmoid(y_z + update_bias)     n = tanh(r * y_n)
    h_t = z * n + (1 - z) * h_{t-1}

Two stages: the units of a row exchange their parts of the means of a and of a * a. The variance is
the difference of the second and of the first one's square: it is as exact as the dtype, unless the
mean is far larger than what a differs by.

Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hafner et al. 2021, arXiv:2010.02193, which has
the bias of z.
"""

from fusedrnn.cells._cell import Cell, Linear, Mean, Own, Stage, family
from fusedrnn.cells.vocabulary import rsqrt, sigmoid, tanh, where, zeros_like


def _sums(x_gates, h_gates, state, params):
    (h_prev,) = state
    r = x_gates[0] + h_gates[0]
    z = x_gates[1] + h_gates[1]
    n = x_gates[2] + h_gates[2]
    return ((r + z + n) / 3, (r * r + z * z + n * n) / 3, r, z, n, h_prev), (r, z, n)


def _sums_backward(d_values, saved, prev, new, params):
    d_mean, d_square, dr, dz, dn, dh_prev = d_values
    r, z, n = saved[:3]
    d_gates = (
        dr + (d_mean + 2 * r * d_square) / 3,
        dz + (d_mean + 2 * z * d_square) / 3,
        dn + (d_mean + 2 * n * d_square) / 3,
    )
    return d_gates, d_gates, (dh_prev,), ()


@family
def layer_norm_gru(eps=1e-3, update_bias=-1.0) -> Cell:
    """The cell; eps is added to the variance, update_bias to what z is the sigmoid of."""

    def update(x_gates, means, values, params):
        mean, square = means
        _mean, _square, r, z, n, h_prev = values
        w_r, w_z, w_n, b_r, b_z, b_n = params
        variance = square - mean * mean
        scale = rsqrt(where(variance < 0, zeros_like(variance), variance) + eps)
        r = sigmoid((r - mean) * scale * w_r + b_r)
        z = sigmoid((z - mean) * scale * w_z + b_z + update_bias)
        n = tanh(r * ((n - mean) * scale * w_n + b_n))
        return (h_prev + z * (n - h_prev),), (mean, scale, r, z, n)

    def update_backward(d_state, saved, prev, new, params):
        (dh,) = d_state
        a_r, a_z, a_n, mean, scale, r, z, n = saved
        (h_prev,) = prev
        w_r, w_z, w_n, _b_r, _b_z, b_n = params
        # Of what was normalised, and of a by the same unit.
        unit_r, unit_z, unit_n = (a_r - mean) * scale, (a_z - mean) * scale, (a_n - mean) * scale
        d_candidate = dh * z * (1 - n * n)
        dy_n = d_candidate * r
        dy_r = d_candidate * (unit_n * w_n + b_n) * r * (1 - r)
        dy_z = dh * (n - h_prev) * z * (1 - z)
        dr, dz, dn = dy_r * w_r * scale, dy_z * w_z * scale, dy_n * w_n * scale
        # scale = (square - mean^2 + eps)^(-1/2), but for a variance of 0, where it is a constant.
        d_variance = (dr * unit_r + dz * unit_z + dn * unit_n) * scale * -0.5
        flat = rsqrt(zeros_like(scale) + eps)
        d_variance = where(scale < flat, d_variance, zeros_like(d_variance))
        d_mean = -(dr + dz + dn) - 2 * mean * d_variance
        d_values = (zeros_like(dh), zeros_like(dh), dr, dz, dn, dh * (1 - z))
        d_params = (dy_r * unit_r, dy_z * unit_z, dy_n * unit_n, dy_r, dy_z, dy_n)
        return (), (d_mean, d_variance), d_values, d_params

    return Cell(
        name="layer_norm_gru",
        module="LayerNormGRU",
        states=("h",),
        stages=(
            Stage(
                Linear(("r", "z", "n")),
                _sums,
                _sums_backward,
                additive=True,
                saved=("a_r", "a_z", "a_n"),
            ),
            Stage(
                Mean(2),
                update,
                update_backward,
                additive=True,
                saved=("mean", "scale", "r", "z", "n"),
                own=(Own("weight_ln", vectors=3, start=1.0), Own("bias_ln", 3, start=0.0)),
            ),
        ),
        source="arXiv:1607.06450, arXiv:2010.02193",
    )
