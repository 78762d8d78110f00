"""Long short-term memory whose gates see the cell states of all units.

    i, f = sigmoid(x_gates + h_gates + W_c c_{t-1})         g = tanh(x_g + h_g)
    c_t = f * c_{t-1} + i * g
    o = sigmoid(x_o + h_o + W_co c_t)                       h_t = o * tanh(c_t)

Three stages: h_{t-1}, c_{t-1} and c_t are each multiplied by a matrix.

Source: Graves 2013, arXiv:1308.0850, equations 7 to 11, of which W_c need not be diagonal; gate
order as torch.nn.LSTM.
"""

from fusedrnn.cells._cell import Cell, Dense, Linear, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _gates(x_gates, h_gates, state, params):
    x_i, x_f, x_g, x_o = x_gates
    h_i, h_f, h_g, h_o = h_gates
    _h_prev, c_prev = state
    return (c_prev, x_i + h_i, x_f + h_f, x_g + h_g, x_o + h_o), ()


def _gates_backward(d_values, saved, prev, new, params):
    dc_prev, di, df, dg, do = d_values
    d_gates = (di, df, dg, do)
    return d_gates, d_gates, (zeros_like(dc_prev), dc_prev), ()


def _remember(x_gates, sums, values, params):
    c_prev, a_i, a_f, a_g, a_o = values
    i = sigmoid(a_i + sums[0])
    f = sigmoid(a_f + sums[1])
    g = tanh(a_g)
    return (f * c_prev + i * g, a_o), (i, f, g)


def _remember_backward(d_values, saved, prev, new, params):
    dc, do = d_values
    i, f, g = saved[:3]
    _h_prev, c_prev = prev
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    return (), (di, df), (dc * f, di, df, dc * i * (1 - g * g), do), ()


def _show(x_gates, sums, values, params):
    c, a_o = values
    o = sigmoid(a_o + sums[0])
    return (o * tanh(c), c), (o,)


def _show_backward(d_state, saved, prev, new, params):
    dh, dc_next = d_state
    o = saved[3]
    tanh_c = tanh(new[1])
    do = dh * tanh_c * o * (1 - o)
    return (), (do,), (dc_next + dh * o * (1 - tanh_c * tanh_c), do), ()


PEEPHOLE_LSTM_FULL = register(
    Cell(
        name="peephole_lstm_full",
        module='PeepholeLSTM(peephole="full")',
        states=("h", "c"),
        stages=(
            Stage(Linear(("i", "f", "g", "o")), _gates, _gates_backward, additive=True),
            Stage(
                Dense(("weight_ci", "weight_cf")),
                _remember,
                _remember_backward,
                additive=True,
                saved=("i", "f", "g"),
            ),
            Stage(Dense(("weight_co",)), _show, _show_backward, additive=True, saved=("o",)),
        ),
        source="arXiv:1308.0850",
    )
)
