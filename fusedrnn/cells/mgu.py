"""Minimal gated unit: one gate both forgets and resets.

    f = sigmoid(x_f + h_f)          n = tanh(x_n + W_hn (f * h_{t-1}) + b_hn)
    h_t = (1 - f) * h_{t-1} + f * n

Two stages: what the candidate n multiplies has to be exchanged, as h is.

Source: Zhou et al. 2016, arXiv:1603.09420.
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _forget(x_gates, h_gates, state, params):
    (h_prev,) = state
    f = sigmoid(x_gates[0] + h_gates[0])
    return (f * h_prev, f, h_prev), (f,)


def _forget_backward(d_values, saved, prev, new, params):
    dq, df, dh_prev = d_values
    f = saved[0]
    (h_prev,) = prev
    d_gates = ((df + dq * h_prev) * f * (1 - f),)
    return d_gates, d_gates, (dh_prev + dq * f,), ()


def _update(x_gates, h_gates, values, params):
    _q, f, h_prev = values
    n = tanh(x_gates[0] + h_gates[0])
    h = h_prev + f * (n - h_prev)
    return (h,), (n,)


def _update_backward(d_state, saved, prev, new, params):
    (dh,) = d_state
    f, n = saved
    (h_prev,) = prev
    d_gates = (dh * f * (1 - n * n),)
    return d_gates, d_gates, (zeros_like(dh), dh * (n - h_prev), dh * (1 - f)), ()


MGU = register(
    Cell(
        name="mgu",
        module="MGU",
        states=("h",),
        stages=(
            Stage(Linear(("f",)), _forget, _forget_backward, additive=True, saved=("f",)),
            Stage(Linear(("n",)), _update, _update_backward, additive=True, saved=("n",)),
        ),
        source="arXiv:1603.09420",
    )
)
