"""Long short-term memory whose gates see a product of input and state instead of the state.

    m = x_m * h_m
    i, f, o = sigmoid(x_gates + W_h m + b_h)          g = tanh(x_g + W_hg m + b_hg)
    c_t = f * c_{t-1} + i * g                         h_t = o * tanh(c_t)

Two stages: m has to be exchanged, as h is.

Source: Krause et al. 2016, arXiv:1609.07959; gates behind m in the order of torch.nn.LSTM.
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like


def _multiply(x_gates, h_gates, state, params):
    x_m, h_m = x_gates[0], h_gates[0]
    _h_prev, c_prev = state
    return (x_m * h_m, c_prev), (x_m, h_m)


def _multiply_backward(d_values, saved, prev, new, params):
    dm, dc_prev = d_values
    x_m, h_m = saved[:2]
    return (dm * h_m,), (dm * x_m,), (zeros_like(dm), dc_prev), ()


def _update(x_gates, m_gates, values, params):
    x_i, x_f, x_g, x_o = x_gates
    m_i, m_f, m_g, m_o = m_gates
    _m, c_prev = values
    i = sigmoid(x_i + m_i)
    f = sigmoid(x_f + m_f)
    g = tanh(x_g + m_g)
    o = sigmoid(x_o + m_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


def _update_backward(d_state, saved, prev, new, params):
    dh, dc_next = d_state
    _x_m, _h_m, i, f, g, o = saved
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


MULTIPLICATIVE_LSTM = register(
    Cell(
        name="multiplicative_lstm",
        module="MultiplicativeLSTM",
        states=("h", "c"),
        stages=(
            Stage(
                Linear(("m",)),
                _multiply,
                _multiply_backward,
                additive=False,
                saved=("x_m", "h_m"),
            ),
            Stage(
                Linear(("i", "f", "g", "o")),
                _update,
                _update_backward,
                additive=True,
                saved=("i", "f", "g", "o"),
            ),
        ),
        source="arXiv:1609.07959",
    )
)
