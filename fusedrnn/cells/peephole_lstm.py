"""Long short-term memory whose gates see the cell state of their own unit.

    i, f = sigmoid(x_gates + h_gates + w_c * c_{t-1})       g = tanh(x_g + h_g)
    c_t = f * c_{t-1} + i * g
    o = sigmoid(x_o + h_o + w_co * c_t)                     h_t = o * tanh(c_t)

Source: Gers & Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302; gate order as torch.nn.LSTM.
"""

from fusedrnn.cells._cell import Cell, Linear, Own, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _forward(x_gates, h_gates, state, params):
    x_i, x_f, x_g, x_o = x_gates
    h_i, h_f, h_g, h_o = h_gates
    _h_prev, c_prev = state
    w_i, w_f, w_o = params
    i = sigmoid(x_i + h_i + w_i * c_prev)
    f = sigmoid(x_f + h_f + w_f * c_prev)
    g = tanh(x_g + h_g)
    c = f * c_prev + i * g
    o = sigmoid(x_o + h_o + w_o * c)
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


def _backward(d_state, saved, prev, new, params):
    dh, dc_next = d_state
    i, f, g, o = saved
    _h_prev, c_prev = prev
    _h, c = new
    w_i, w_f, w_o = params
    tanh_c = tanh(c)
    do = dh * tanh_c * o * (1 - o)
    dc = dc_next + dh * o * (1 - tanh_c * tanh_c) + do * w_o
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    d_gates = (di, df, dg, do)
    d_values = (zeros_like(dh), dc * f + di * w_i + df * w_f)
    return d_gates, d_gates, d_values, (di * c_prev, df * c_prev, do * c)


PEEPHOLE_LSTM = register(
    Cell(
        name="peephole_lstm",
        module="PeepholeLSTM",
        states=("h", "c"),
        stages=(
            Stage(
                Linear(("i", "f", "g", "o")),
                _forward,
                _backward,
                additive=True,
                saved=("i", "f", "g", "o"),
                own=(Own("weight_ci"), Own("weight_cf"), Own("weight_co")),
            ),
        ),
        projects=True,
        source="doi:10.1109/IJCNN.2000.861302",
    )
)
