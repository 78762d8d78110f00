"""Gated recurrent unit, reset after the product, as torch.nn.GRU and cuDNN compute it.

    r, z = sigmoid(x_gates + h_gates)         n = tanh(x_n + r * h_n)
    h_t = (1 - z) * n + z * h_{t-1}

Source: Cho et al. 2014, arXiv:1406.1078, in the form that multiplies r into the recurrent
product (bias included) instead of into h_{t-1}; gate order as torch.nn.GRU.
"""

from fusedrnn.cells._cell import Cell, Linear, Onnx, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh


def _forward(x_gates, h_gates, state, params):
    x_r, x_z, x_n = x_gates
    h_r, h_z, h_n = h_gates
    (h_prev,) = state
    r = sigmoid(x_r + h_r)
    z = sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    h = n + z * (h_prev - n)
    return (h,), (r, z, n, h_n)


def _backward(d_state, saved, prev, new, params):
    (dh,) = d_state
    r, z, n, h_n = saved
    (h_prev,) = prev
    dz = dh * (h_prev - n) * z * (1 - z)
    dx_n = dh * (1 - z) * (1 - n * n)
    dr = dx_n * h_n * r * (1 - r)
    return (dr, dz, dx_n), (dr, dz, dx_n * r), (dh * z,), ()


GRU = register(
    Cell(
        name="gru",
        module="GRU",
        states=("h",),
        stages=(
            Stage(
                Linear(("r", "z", "n")),
                _forward,
                _backward,
                additive=False,
                saved=("r", "z", "n", "h_n"),
            ),
        ),
        aten="gru",
        onnx=Onnx("GRU", ("z", "r", "n"), linear_before_reset=True),
        source="arXiv:1406.1078",
    )
)
