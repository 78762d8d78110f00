"""Steps of cells as users write them, for the derivation."""

import torch
import torch.nn.functional as F


def lstm(x, hidden, state, params):
    i = torch.sigmoid(x.i + hidden.i)
    f = torch.sigmoid(x.f + hidden.f)
    g = torch.tanh(x.g + hidden.g)
    o = torch.sigmoid(x.o + hidden.o)
    c = f * state.c + i * g
    h = o * torch.tanh(c)
    return h, c


def gru(x, hidden, state, params):
    r = torch.sigmoid(x.r + hidden.r)
    z = torch.sigmoid(x.z + hidden.z)
    n = torch.tanh(x.n + r * hidden.n)
    return n + z * (state.h - n)


def gru_reset_before(x, hidden, state, params):
    r = torch.sigmoid(x.r + hidden.r)
    z = torch.sigmoid(x.z + hidden.z)
    hidden = yield r * state.h
    n = torch.tanh(x.n + hidden.n)
    return n + z * (state.h - n)


def rnn_tanh(x, hidden, state, params):
    return torch.tanh(x.h + hidden.h)


def rnn_relu(x, hidden, state, params):
    return torch.relu(x.h + hidden.h)


def normalized(x, hidden, state, params):
    """Three states and two parameters: a memory that is divided by how much was written."""
    i = torch.exp(-F.softplus(x.i + hidden.i + params.w_i * state.c))
    f = torch.sigmoid(x.f + hidden.f + params.w_f)
    c = f * state.c + i * torch.tanh(x.z + hidden.z)
    n = f * state.n + i
    return c / torch.maximum(n, torch.ones_like(n) * 0.5), c, n


NORMALIZED = {"gates": ("i", "f", "z"), "states": ("h", "c", "n"), "params": ("w_i", "w_f")}


def everything(x, hidden, state, params):
    """All that a kernel can compute."""
    u, v = x.u + hidden.u, x.v * hidden.v
    a = F.gelu(u, approximate="tanh") + F.hardsigmoid(v) + F.leaky_relu(u) + F.silu(v) + F.elu(u)
    b = F.softplus(u) + torch.log1p(v * v) + torch.log(v * v + 1) + torch.rsqrt(v * v + 1)
    c = torch.maximum(u, v) + torch.where((u > 0) & ~(v < 1), 1.0, 2.0) + abs(u) + F.relu(v)
    d = torch.exp(torch.where(u > 0, -float("inf"), u)) * torch.sqrt(u * u + 1)
    return torch.tanh(a + b + c + d) * torch.sigmoid(params.w) + state.h


def peephole_lstm(x, hidden, state, params):
    i = torch.sigmoid(x.i + hidden.i + params.weight_ci * state.c)
    f = torch.sigmoid(x.f + hidden.f + params.weight_cf * state.c)
    c = f * state.c + i * torch.tanh(x.g + hidden.g)
    o = torch.sigmoid(x.o + hidden.o + params.weight_co * c)
    return o * torch.tanh(c), c


def coupled_lstm(x, hidden, state, params):
    f = torch.sigmoid(x.f + hidden.f)
    c = f * state.c + (1 - f) * torch.tanh(x.g + hidden.g)
    return torch.sigmoid(x.o + hidden.o) * torch.tanh(c), c


def multiplicative_lstm(x, hidden, state, params):
    hidden = yield x.m * hidden.m
    i = torch.sigmoid(x.i + hidden.i)
    f = torch.sigmoid(x.f + hidden.f)
    c = f * state.c + i * torch.tanh(x.g + hidden.g)
    return torch.sigmoid(x.o + hidden.o) * torch.tanh(c), c


def mgu(x, hidden, state, params):
    f = torch.sigmoid(x.f + hidden.f)
    hidden = yield f * state.h
    return (1 - f) * state.h + f * torch.tanh(x.n + hidden.n)


def ugrnn(x, hidden, state, params):
    u = torch.sigmoid(x.u + hidden.u)
    return u * state.h + (1 - u) * torch.tanh(x.n + hidden.n)


def ligru(x, hidden, state, params):
    z = torch.sigmoid(x.z + hidden.z)
    return z * state.h + (1 - z) * torch.relu(x.n + hidden.n)


def slstm(x, hidden, state, params):
    a = x.i + hidden.i
    decay = F.logsigmoid(x.f + hidden.f) + state.m
    m = torch.where(state.n == 0, a, torch.maximum(decay, a))
    i, f = torch.exp(a - m), torch.exp(torch.minimum(decay - m, torch.zeros_like(m)))
    c = f * state.c + i * torch.tanh(x.z + hidden.z)
    n = f * state.n + i
    return torch.sigmoid(x.o + hidden.o) * c / n, c, n, m
