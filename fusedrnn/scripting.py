"""What torch.jit.script compiles in the place of our modules' forward: torch's own operators.

TorchScript compiles methods from their source, and cannot read a forward that chooses backends.
`__overloads__` leads it to other methods, which have the names that it gives the overloads of
torch.nn's modules: forward__0 takes a Tensor, forward__1 a PackedSequence. So a model is compiled
as it stands, and stays what it was.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class Scriptable:
    """What torch.jit.script looks for in a module of ours."""

    __overloads__: ClassVar[dict[str, list[str]]] = {"forward": ["forward__0"]}
    __jit_ignored_attributes__: ClassVar[tuple[str, ...]] = (
        "backend", "save", "regularizers", "forget_bias", "num_heads",
        "direction", "residual", "hidden_sizes",
    )  # fmt: skip
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("all_weights", "cell_name")

    def _torch_lacks(self) -> str | None:
        """What torch.nn does not have of this module, or None."""

    def __prepare_scriptable__(self) -> Any:
        """The module that is to be compiled: this one.

        Raises:
            TypeError: torch's operators would not compute what it computes.
        """
        regularizers = getattr(self, "regularizers", None)
        needed = regularizers and regularizers.needed(training=self.training)  # pyright: ignore
        ours = f"{__name__.rpartition('.')[0]}.modules"
        if type(self).forward.__module__ != ours:  # pyright: ignore[reportAttributeAccessIssue]
            why = "a subclass with a forward of its own"
        elif nn.utils.parametrize.is_parametrized(self):  # pyright: ignore
            why = "a parametrized module: remove the parametrizations first"
        elif needed:
            why = f"one with {needed}"
        elif lacking := self._torch_lacks():
            why = f"this one: {lacking}"
        elif getattr(self, "mode", "") == "LSTM" and not isinstance(self, ScriptableLSTM):
            why = "a Recurrent with two states: use fusedrnn.LSTM"
        else:
            return self
        raise TypeError(
            f"{type(self).__name__}: torch.jit.script compiles torch's operators, which cannot "
            f"stand in for {why}"
        )


class ScriptableSequence(Scriptable, nn.RNNBase):
    """GRU and RNN, and what LSTM shares with them."""

    __overloads__: ClassVar[dict[str, list[str]]] = {"forward": ["forward__0", "forward__1"]}

    @torch.jit.export
    def forward__0(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For torch.jit.script."""
        output, final = self._run_script(input, [] if hx is None else [hx], None, None, None)
        return output, final[0]

    @torch.jit.export
    def forward__1(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        """For torch.jit.script."""
        data, sizes, order, back = input
        output, final = self._run_script(data, [] if hx is None else [hx], sizes, order, back)
        return PackedSequence(output, sizes, order, back), final[0]

    def _run_script(
        self,
        input: Tensor,
        states: list[Tensor],
        batch_sizes: Tensor | None,
        order: Tensor | None,
        back: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """For torch.jit.script: output and final states, from initial ones ([] for zeros).

        The rows of the initial states are put in `order`, those of the final ones `back`.
        """
        unbatched = batch_sizes is None and input.dim() == 2
        batch_dim = 0 if self.batch_first else 1
        if unbatched:
            input = input.unsqueeze(batch_dim)
            states = [s.unsqueeze(1) for s in states]
        self.check_input(input, batch_sizes)
        shape = self.get_expected_hidden_size(input, batch_sizes)
        wide = (shape[0], shape[1], self.hidden_size)
        if len(states) == 0:
            states = [torch.zeros(shape, dtype=input.dtype, device=input.device)]
            if self.mode == "LSTM":
                states.append(torch.zeros(wide, dtype=input.dtype, device=input.device))
        elif order is not None:
            states = [s.index_select(1, order) for s in states]
        self.check_hidden_size(states[0], shape)
        if self.mode == "LSTM":
            self.check_hidden_size(states[1], wide)
        output, final = run_operator(
            self.mode, input, batch_sizes, states,
            self._flat_weights,  # pyright: ignore[reportArgumentType]
            self.bias, self.num_layers,
            self.dropout, self.training, self.bidirectional, self.batch_first,
        )  # fmt: skip
        if unbatched:
            output = output.squeeze(batch_dim)
            final = [s.squeeze(1) for s in final]
        if back is not None:
            final = [s.index_select(1, back) for s in final]
        return output, final


class ScriptableLSTM(ScriptableSequence):
    """LSTM, with two states."""

    @torch.jit.export
    def forward__0(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """For torch.jit.script."""
        states = [] if hx is None else [hx[0], hx[1]]
        output, final = self._run_script(input, states, None, None, None)
        return output, (final[0], final[1])

    @torch.jit.export
    def forward__1(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """For torch.jit.script."""
        states = [] if hx is None else [hx[0], hx[1]]
        data, sizes, order, back = input
        output, final = self._run_script(data, states, sizes, order, back)
        return PackedSequence(output, sizes, order, back), (final[0], final[1])


def run_operator(
    mode: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """torch's operator for `mode`. TorchScript knows no function but by its name."""
    # fmt: off
    if batch_sizes is not None:
        if mode == "LSTM":
            output, h, c = torch.lstm(
                input, batch_sizes, states, weights, bias, layers, dropout, training, bidirectional)
            return output, [h, c]
        h_0 = states[0]
        if mode == "GRU":
            output, h = torch.gru(
                input, batch_sizes, h_0, weights, bias, layers, dropout, training, bidirectional)
        elif mode == "RNN_TANH":
            output, h = torch.rnn_tanh(
                input, batch_sizes, h_0, weights, bias, layers, dropout, training, bidirectional)
        else:
            output, h = torch.rnn_relu(
                input, batch_sizes, h_0, weights, bias, layers, dropout, training, bidirectional)
        return output, [h]
    if mode == "LSTM":
        output, h, c = torch.lstm(
            input, states, weights, bias, layers, dropout, training, bidirectional, batch_first)
        return output, [h, c]
    h_0 = states[0]
    if mode == "GRU":
        output, h = torch.gru(
            input, h_0, weights, bias, layers, dropout, training, bidirectional, batch_first)
    elif mode == "RNN_TANH":
        output, h = torch.rnn_tanh(
            input, h_0, weights, bias, layers, dropout, training, bidirectional, batch_first)
    else:
        output, h = torch.rnn_relu(
            input, h_0, weights, bias, layers, dropout, training, bidirectional, batch_first)
    # fmt: on
    return output, [h]


def forward_of(torchs: type[nn.Module]) -> Callable[..., Any]:
    """torch.nn's forward, as a function of its own, which can be marked for torch.jit.script."""
    theirs = torchs.forward
    copied = types.FunctionType(theirs.__code__, theirs.__globals__, argdefs=theirs.__defaults__)
    copied.__module__, copied.__annotations__ = __name__, theirs.__annotations__
    return torch.jit.export(copied)
