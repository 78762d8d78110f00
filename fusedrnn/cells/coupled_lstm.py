"""Long short-term memory whose input gate is what the forget gate leaves.

    f, o = sigmoid(x_gates + h_gates)         g = tanh(x_g + h_g)
    c_t = f * c_{t-1} + (1 - f) * g           h_t = o * tanh(c_t)

Source: Greff et al. 2017, doi:10.1109/TNNLS.2016.2582924, "CIFG".
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _forward(x_gates, h_gates, state, params):
    x_f, x_g, x_o = x_gates
    h_f, h_g, h_o = h_gates
    _h_prev, c_prev = state
    f = sigmoid(x_f + h_f)
    g = tanh(x_g + h_g)
    o = sigmoid(x_o + h_o)
    c = g + f * (c_prev - g)
    h = o * tanh(c)
    return (h, c), (f, g, o)


def _backward(d_state, saved, prev, new, params):
    dh, dc_next = d_state
    f, g, o = saved
    _h_prev, c_prev = prev
    _h, c = new
    tanh_c = tanh(c)
    dc = dc_next + dh * o * (1 - tanh_c * tanh_c)
    df = dc * (c_prev - g) * f * (1 - f)
    dg = dc * (1 - f) * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    d_gates = (df, dg, do)
    return d_gates, d_gates, (zeros_like(dh), dc * f), ()


COUPLED_LSTM = register(
    Cell(
        name="coupled_lstm",
        module="CoupledLSTM",
        states=("h", "c"),
        stages=(
            Stage(
                Linear(("f", "g", "o")),
                _forward,
                _backward,
                additive=True,
                saved=("f", "g", "o"),
            ),
        ),
        projects=True,
        source="doi:10.1109/TNNLS.2016.2582924",
    )
)
