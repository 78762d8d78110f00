"""Light gated recurrent unit: without reset gate, its candidate rectified.

    z = sigmoid(x_z + h_z)          n = relu(x_n + h_n)
    h_t = z * h_{t-1} + (1 - z) * n

Source: Ravanelli et al. 2018, arXiv:1803.10225, without batch normalisation, which a layer before
this one can do.
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import relu, sigmoid, where, zeros_like


def _forward(x_gates, h_gates, state, params):
    x_z, x_n = x_gates
    h_z, h_n = h_gates
    (h_prev,) = state
    z = sigmoid(x_z + h_z)
    n = relu(x_n + h_n)
    return (n + z * (h_prev - n),), (z, n)


def _backward(d_state, saved, prev, new, params):
    (dh,) = d_state
    z, n = saved
    (h_prev,) = prev
    # As in torch, the derivative of relu at 0 is 0, and NaN, which fails the comparison, passes.
    dn = where(n <= 0, zeros_like(n), dh * (1 - z))
    d_gates = (dh * (h_prev - n) * z * (1 - z), dn)
    return d_gates, d_gates, (dh * z,), ()


LIGRU = register(
    Cell(
        name="ligru",
        module="LiGRU",
        states=("h",),
        stages=(Stage(Linear(("z", "n")), _forward, _backward, additive=True, saved=("z", "n")),),
        source="arXiv:1803.10225",
    )
)
