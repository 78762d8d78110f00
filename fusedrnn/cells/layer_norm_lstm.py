"""Long short-term memory whose products and cell state are layer-normalised.

    a = LN(W_ih x_t) * w_ih + LN(W_hh h_{t-1}) * w_hh + b_ih + b_hh           over all 4 H
    i, f, o = sigmoid(a)         g = tanh(a_g)
    c_t = f * c_{t-1} + i * g    h_t = o * tanh(LN(c_t) * w_c + b_c)

LN(y) = (y - mean(y)) / sqrt(var(y) + eps). Three stages: the units of a row exchange their parts of
the means of W_hh h and of its square, then those of c_t and of its square. A variance is the
difference of the second and of the first one's square: it is as exact as the dtype, unless the mean
is far larger than what the values differ by.

Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450; gate order as torch.nn.LSTM.
"""

from fusedrnn.cells._cell import Cell, InputNorm, Linear, Mean, Own, Stage, family
from fusedrnn.cells.vocabulary import rsqrt, sigmoid, tanh, where, zeros_like


def _sums(x_gates, h_gates, state, params):
    i, f, g, o = h_gates
    _h_prev, c_prev = state
    mean = (i + f + g + o) / 4
    square = (i * i + f * f + g * g + o * o) / 4
    return (mean, square) + h_gates + x_gates + (c_prev,), (i, f, g, o)


def _sums_backward(d_values, saved, prev, new, params):
    d_mean, d_square, di, df, dg, do = d_values[:6]
    i, f, g, o = saved[:4]
    d_received = (
        di + (d_mean + 2 * i * d_square) / 4,
        df + (d_mean + 2 * f * d_square) / 4,
        dg + (d_mean + 2 * g * d_square) / 4,
        do + (d_mean + 2 * o * d_square) / 4,
    )
    return d_values[6:10], d_received, (zeros_like(di), d_values[10]), ()


@family
def layer_norm_lstm(eps=1e-5) -> Cell:
    """The cell; eps is added to every variance."""

    def update(x_gates, means, values, params):
        mean, square = means
        h_i, h_f, h_g, h_o, x_i, x_f, x_g, x_o, c_prev = values[2:]
        w_i, w_f, w_g, w_o = params
        variance = square - mean * mean
        scale = rsqrt(where(variance < 0, zeros_like(variance), variance) + eps)
        i = sigmoid(x_i + (h_i - mean) * scale * w_i)
        f = sigmoid(x_f + (h_f - mean) * scale * w_f)
        g = tanh(x_g + (h_g - mean) * scale * w_g)
        o = sigmoid(x_o + (h_o - mean) * scale * w_o)
        c = f * c_prev + i * g
        return (c, c * c, o, c), (mean, scale, i, f, g, o)

    def update_backward(d_values, saved, prev, new, params):
        d_mean_c, d_square_c, do, dc = d_values
        h_i, h_f, h_g, h_o, mean, scale, i, f, g, o = saved[:10]
        _h_prev, c_prev = prev
        _h, c = new
        w_i, w_f, w_g, w_o = params
        dc = dc + d_mean_c + 2 * c * d_square_c
        da_i = dc * g * i * (1 - i)
        da_f = dc * c_prev * f * (1 - f)
        da_g = dc * i * (1 - g * g)
        da_o = do * o * (1 - o)
        # Of what was normalised, and of the sums by the same unit.
        unit_i, unit_f = (h_i - mean) * scale, (h_f - mean) * scale
        unit_g, unit_o = (h_g - mean) * scale, (h_o - mean) * scale
        di, df, dg, do = (
            da_i * w_i * scale,
            da_f * w_f * scale,
            da_g * w_g * scale,
            da_o * w_o * scale,
        )
        # scale = (square - mean^2 + eps)^(-1/2), but for a variance of 0, where it is a constant.
        d_variance = (di * unit_i + df * unit_f + dg * unit_g + do * unit_o) * scale * -0.5
        flat = rsqrt(zeros_like(scale) + eps)
        d_variance = where(scale < flat, d_variance, zeros_like(d_variance))
        d_mean = -(di + df + dg + do) - 2 * mean * d_variance
        zeros = zeros_like(dc)
        d_values = (zeros, zeros, di, df, dg, do, da_i, da_f, da_g, da_o, dc * f)
        return (
            (),
            (d_mean, d_variance),
            d_values,
            (
                da_i * unit_i,
                da_f * unit_f,
                da_g * unit_g,
                da_o * unit_o,
            ),
        )

    def output(x_gates, means, values, params):
        mean, square = means
        _c, _square, o, c = values
        w, b = params
        variance = square - mean * mean
        scale = rsqrt(where(variance < 0, zeros_like(variance), variance) + eps)
        return (o * tanh((c - mean) * scale * w + b), c), (mean, scale)

    def output_backward(d_state, saved, prev, new, params):
        dh, dc_next = d_state
        o, mean, scale = saved[9:]
        _h, c = new
        w, b = params
        unit = (c - mean) * scale
        tanh_y = tanh(unit * w + b)
        dy = dh * o * (1 - tanh_y * tanh_y)
        dc = dy * w * scale
        d_variance = dc * unit * scale * -0.5
        flat = rsqrt(zeros_like(scale) + eps)
        d_variance = where(scale < flat, d_variance, zeros_like(d_variance))
        d_mean = -dc - 2 * mean * d_variance
        zeros = zeros_like(dh)
        d_values = (zeros, zeros, dh * tanh_y, dc_next + dc)
        return (), (d_mean, d_variance), d_values, (dy * unit, dy)

    return Cell(
        name="layer_norm_lstm",
        module="LayerNormLSTM",
        states=("h", "c"),
        stages=(
            Stage(
                Linear(("i", "f", "g", "o")),
                _sums,
                _sums_backward,
                additive=False,
                saved=("h_i", "h_f", "h_g", "h_o"),
            ),
            Stage(
                Mean(2),
                update,
                update_backward,
                additive=True,
                saved=("mean", "scale", "i", "f", "g", "o"),
                own=(Own("weight_ln_hh", vectors=4, start=1.0),),
            ),
            Stage(
                Mean(2),
                output,
                output_backward,
                additive=True,
                saved=("mean_c", "scale_c"),
                own=(Own("weight_ln_c", start=1.0), Own("bias_ln_c", start=0.0)),
            ),
        ),
        input_norm=InputNorm("weight_ln_ih", eps),
        source="arXiv:1607.06450",
    )
