"""Update gate recurrent network: the least that has a gate.

    u = sigmoid(x_u + h_u)          n = tanh(x_n + h_n)
    h_t = u * h_{t-1} + (1 - u) * n

Source: Collins, Sohl-Dickstein & Sussillo 2016, arXiv:1611.09913.
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh


def _forward(x_gates, h_gates, state, params):
    x_u, x_n = x_gates
    h_u, h_n = h_gates
    (h_prev,) = state
    u = sigmoid(x_u + h_u)
    n = tanh(x_n + h_n)
    return (n + u * (h_prev - n),), (u, n)


def _backward(d_state, saved, prev, new, params):
    (dh,) = d_state
    u, n = saved
    (h_prev,) = prev
    d_gates = (dh * (h_prev - n) * u * (1 - u), dh * (1 - u) * (1 - n * n))
    return d_gates, d_gates, (dh * u,), ()


UGRNN = register(
    Cell(
        name="ugrnn",
        module="UGRNN",
        states=("h",),
        stages=(Stage(Linear(("u", "n")), _forward, _backward, additive=True, saved=("u", "n")),),
        source="arXiv:1611.09913",
    )
)
