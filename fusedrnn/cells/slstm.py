"""Long short-term memory with exponential gates, a normaliser n and a stabiliser m.

    l = log(sigmoid(x_f + h_f)) + m_{t-1}         z = tanh(x_z + h_z)     o = sigmoid(x_o + h_o)
    m_t = max(l, x_i + h_i), or x_i + h_i where n_{t-1} = 0, at the beginning
    i = exp(x_i + h_i - m_t)                      f = min(exp(l - m_t), 1)
    c_t = f * c_{t-1} + i * z                     n_t = f * n_{t-1} + i
    h_t = o * c_t / n_t

Of i and f the larger one is 1; the difference of their exponents, l - (x_i + h_i), is what is kept.

Source: Beck et al. 2024, arXiv:2405.04517, with the gates of its published code.
"""

from fusedrnn.cells._cell import Cell, Linear, Stage, register
from fusedrnn.cells.vocabulary import exp, maximum, sigmoid, softplus, tanh, where, zeros_like


def _forward(x_gates, h_gates, state, params):
    x_i, x_f, x_z, x_o = x_gates
    h_i, h_f, h_z, h_o = h_gates
    _h_prev, c_prev, n_prev, m_prev = state
    a_i = x_i + h_i
    a_f = x_f + h_f
    z = tanh(x_z + h_z)
    o = sigmoid(x_o + h_o)
    zeros = zeros_like(a_f)
    delta = m_prev - softplus(-a_f) - a_i
    larger = where(n_prev == 0, zeros, maximum(delta, zeros))
    m = a_i + larger
    i = exp(-larger)
    f = exp(-maximum(-delta, zeros))
    c = f * c_prev + i * z
    n = f * n_prev + i
    return (o * c / n, c, n, m), (delta, sigmoid(-a_f), z, o)


def _backward(d_state, saved, prev, new, params):
    dh, dc_next, dn_next, dm = d_state
    delta, slope, z, o = saved
    _h_prev, c_prev, n_prev, _m_prev = prev
    _h, c, n, _m = new
    zeros = zeros_like(dh)
    i = exp(-where(n_prev == 0, zeros, maximum(delta, zeros)))
    f = exp(-maximum(-delta, zeros))
    ratio = c / n
    dc = dc_next + dh * o / n
    dn = dn_next - dh * o * ratio / n
    # Above 0, delta is what i and m_t depend on, but at the beginning; below 0, f.
    above = where(n_prev == 0, zeros, dm - (dc * z + dn) * i)
    d_delta = where(delta > 0, above, (dc * c_prev + dn * n_prev) * f)
    d_gates = (
        dm - d_delta,
        d_delta * slope,
        dc * i * (1 - z * z),
        dh * ratio * o * (1 - o),
    )
    return d_gates, d_gates, (zeros, dc * f, dn * f, d_delta), ()


SLSTM = register(
    Cell(
        name="slstm",
        module="SLSTM",
        states=("h", "c", "n", "m"),
        stages=(
            Stage(
                Linear(("i", "f", "z", "o")),
                _forward,
                _backward,
                additive=True,
                saved=("delta", "slope", "z", "o"),
            ),
        ),
        projects=True,
        source="arXiv:2405.04517",
    )
)
