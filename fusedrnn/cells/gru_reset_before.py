"""Gated recurrent unit with the reset before the product, as it was first published.

    r, z = sigmoid(x_gates + h_gates)         n = tanh(x_n + W_hn (r * h_{t-1}) + b_hn)
    h_t = (1 - z) * n + z * h_{t-1}

Two stages: what the candidate n multiplies has to be exchanged, as h is.

Source: Cho et al. 2014, arXiv:1406.1078, with torch.nn.GRU's meaning of z.
"""

from fusedrnn.cells._cell import Cell, Linear, Onnx, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _reset(x_gates, h_gates, state, params):
    x_r, x_z = x_gates
    h_r, h_z = h_gates
    (h_prev,) = state
    r = sigmoid(x_r + h_r)
    z = sigmoid(x_z + h_z)
    return (r * h_prev, z, h_prev), (r, z)


def _reset_backward(d_values, saved, prev, new, params):
    dq, dz, dh_prev = d_values
    r, z, _n = saved
    (h_prev,) = prev
    d_gates = (dq * h_prev * r * (1 - r), dz * z * (1 - z))
    return d_gates, d_gates, (dh_prev + dq * r,), ()


def _update(x_gates, h_gates, values, params):
    _q, z, h_prev = values
    n = tanh(x_gates[0] + h_gates[0])
    h = n + z * (h_prev - n)
    return (h,), (n,)


def _update_backward(d_state, saved, prev, new, params):
    (dh,) = d_state
    _r, z, n = saved
    (h_prev,) = prev
    d_gates = (dh * (1 - z) * (1 - n * n),)
    return d_gates, d_gates, (zeros_like(dh), dh * (h_prev - n), dh * z), ()


GRU_RESET_BEFORE = register(
    Cell(
        name="gru_reset_before",
        module="GRU(reset_after=False)",
        states=("h",),
        stages=(
            Stage(Linear(("r", "z")), _reset, _reset_backward, additive=True, saved=("r", "z")),
            Stage(Linear(("n",)), _update, _update_backward, additive=True, saved=("n",)),
        ),
        onnx=Onnx("GRU", ("z", "r", "n")),
        source="arXiv:1406.1078",
    )
)
