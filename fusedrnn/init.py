"""Where recurrent networks start: initialisers of whole modules, in the form of torch.nn.init.

Each takes a module of this package, or an LSTM, GRU or RNN of torch.nn, changes its parameters
in place, in all layers and directions, and returns it:

rnn = fusedrnn.init.identity_(fusedrnn.RNN(16, 32, nonlinearity="relu"))
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusedrnn import cells

Module = TypeVar("Module", bound=nn.RNNBase)

# Of each cell the gate whose sigmoid keeps the state, "" for none, and the one that lets the new
# value in. Where a gate is both, its other side is 1 minus it.
GATES: dict[str, tuple[str, str]] = {
    "lstm": ("f", "i"),
    "peephole_lstm": ("f", "i"),
    "peephole_lstm_full": ("f", "i"),
    "multiplicative_lstm": ("f", "i"),
    "layer_norm_lstm": ("f", "i"),
    "coupled_lstm": ("f", ""),
    "gru": ("z", ""),
    "gru_reset_before": ("z", ""),
    "ligru": ("z", ""),
    "ugrnn": ("u", ""),
    "slstm": ("f", ""),  # its input gate is no sigmoid
    "mgu": ("", "f"),
    "layer_norm_gru": ("", "z"),
}


def identity_(module: Module, scale: float = 1.0) -> Module:
    """Starts a simple recurrent network as scale * the identity: weight_hh, and all biases 0.

    Args:
        module: RNN or IndRNN, with heads or without.
        scale: 1 keeps what is remembered; less, such as 0.01, forgets it.
    Raises:
        TypeError, ValueError: another module, or a scale that is no finite number.
    Source: Le, Jaitly & Hinton 2015, arXiv:1504.00941.
    """
    cell, scale = _cell_of(module), _finite("scale", scale)
    if cell.gates != ("h",):
        raise ValueError(
            f"module: expected a network without gates, RNN or IndRNN, got {cell.name}"
        )
    for weight in _parameters(module, "weight_hh"):
        if cell.diagonal:
            weight.fill_(scale)
        else:
            weight.zero_().diagonal(dim1=-2, dim2=-1).fill_(scale)
    for kind in ("bias_ih", "bias_hh"):
        for bias in _parameters(module, kind):
            bias.zero_()
    return module


def orthogonal_(module: Module, gain: float = 1.0) -> Module:
    """Starts every gate's block of weight_hh, in every head, as gain * an orthogonal matrix.

    Args:
        module: any but IndRNN, whose weight_hh is a vector.
        gain: what each block is multiplied by.
    Raises:
        TypeError, ValueError: another module, or a gain that is no finite number.
    Source: Saxe, McClelland & Ganguli 2014, arXiv:1312.6120.
    """
    cell, gain = _cell_of(module), _finite("gain", gain)
    if cell.diagonal:
        raise ValueError(f"module: expected a matrix weight_hh, {cell.name} has a vector")
    for weight in _parameters(module, "weight_hh"):
        heads = weight if weight.dim() == 3 else weight.unsqueeze(0)
        for blocks in heads:
            for block in blocks.chunk(len(cell.gates)):
                nn.init.orthogonal_(block, gain)
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Starts the gate that keeps the state open: its biases add to `value`, b_hh being 0 there. (A
    gate that replaces the state instead starts with -value.)

    Args:
        module: any with such a gate and biases.
        value: sigmoid(value) of the state is kept, apart from what input and state contribute.
    Raises:
        TypeError, ValueError: another module, or a value that is no finite number.
    Source: Gers, Schmidhuber & Cummins 2000, doi:10.1162/089976600300015015; Jozefowicz, Zaremba &
        Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures".
    """
    value = _finite("value", value)
    keeps, writes = _gates_of(module)
    for bias in _biases(module, keeps or writes):
        bias.fill_(value if keeps else -value)
    return module


def chrono_(module: Module, longest: float) -> Module:
    """Starts the gates such that units remember for times spread from 2 to `longest` steps.

        b_keep = log(u), u uniform in [1, longest - 1]        b_write = -b_keep

    b_hh is 0 there.

    Args:
        module: any with a gate that keeps the state, and biases.
        longest: time steps of the longest dependency, more than 2.
    Raises:
        TypeError, ValueError: another module, or what is no such number.
    Source: Tallec & Ollivier 2018, arXiv:1804.11188, section 2.
    """
    if _finite("longest", longest) <= 2:
        raise ValueError(f"longest: expected more than 2 time steps, got {longest}")
    keeps, writes = _gates_of(module)
    drawn = []
    for bias in _biases(module, keeps or writes):
        drawn.append(torch.empty_like(bias).uniform_(1.0, longest - 1.0).log_())
        bias.copy_(drawn[-1] if keeps else -drawn[-1])
    if keeps and writes:
        for bias, keep in zip(_biases(module, writes), drawn, strict=True):
            bias.copy_(-keep)
    return module


def _cell_of(module: Any) -> cells.Cell:
    if not isinstance(module, nn.RNNBase):
        got = type(module).__name__
        raise TypeError(f"module: expected a recurrent module, such as fusedrnn.LSTM, got {got}")
    return cells.get(module.mode.lower())


def _gates_of(module: nn.RNNBase) -> tuple[str, str]:
    name = _cell_of(module).name.partition("(")[0]
    if name not in GATES:
        raise ValueError(f"module: expected one of {sorted(GATES)}, whose gates keep, got {name}")
    return GATES[name]


def _biases(module: nn.RNNBase, gate: str) -> Iterator[Tensor]:
    """In every layer and direction, a gate's part of b_ih, b_hh being set to 0 there; or of the
    bias of a normalisation, which takes out what was added before."""
    cell = _cell_of(module)
    normalised = any(own.name == "bias_ln" for own in cell.own)
    if not module.bias and not normalised:
        raise ValueError("module: expected bias=True, got bias=False")

    def parts(kind: str) -> Iterator[Tensor]:
        for bias in _parameters(module, kind):
            yield bias.chunk(len(cell.gates))[cell.gates.index(gate)]

    for part in () if normalised else parts("bias_hh"):
        part.zero_()
    return parts("bias_ln" if normalised else "bias_ih")


def _parameters(module: nn.RNNBase, kind: str) -> Iterator[Tensor]:
    """The parameters of that name in every layer and direction."""
    for layer in range(module.num_layers):
        for end in ("", "_reverse")[: 2 if module.bidirectional else 1]:
            name = f"{kind}_l{layer}{end}"
            if hasattr(module, name):
                yield getattr(module, name).detach()


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)
