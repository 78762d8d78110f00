"""Long short-term memory.

    i, f, o = sigmoid(x_gates + h_gates)      g = tanh(x_g + h_g)
    c_t = f * c_{t-1} + i * g                 h_t = o * tanh(c_t)

Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of
Gers, Schmidhuber & Cummins 2000, doi:10.1162/089976600300015015; gate order as torch.nn.LSTM.
"""

from fusedrnn.cells._cell import Cell, Linear, Onnx, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _forward(x_gates, h_gates, state, params):
    x_i, x_f, x_g, x_o = x_gates
    h_i, h_f, h_g, h_o = h_gates
    _h_prev, c_prev = state
    i = sigmoid(x_i + h_i)
    f = sigmoid(x_f + h_f)
    g = tanh(x_g + h_g)
    o = sigmoid(x_o + h_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


def _backward(d_state, saved, prev, new, params):
    dh, dc_next = d_state
    i, f, g, o = saved
    _h_prev, c_prev = prev
    _h, c = new
    tanh_c = tanh(c)
    dc = dc_next + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    d_gates = (di, df, dg, do)
    return d_gates, d_gates, (zeros_like(dh), dc * f), ()


LSTM = register(
    Cell(
        name="lstm",
        module="LSTM",
        states=("h", "c"),
        stages=(
            Stage(
                Linear(("i", "f", "g", "o")),
                _forward,
                _backward,
                additive=True,
                saved=("i", "f", "g", "o"),
            ),
        ),
        projects=True,
        aten="lstm",
        onnx=Onnx("LSTM", ("i", "o", "f", "g")),
        source="doi:10.1162/neco.1997.9.8.1735",
    )
)
