"""The time loop of a Keras layer on Keras's torch backend, as fusedrnn runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedrnn import convert, functional


class Loop:
    """Stands in the place of a layer's `inner_loop`, where Keras steps through time.

    The layer stays Keras's in all else: its variables, its dropout of the input, states kept from
    call to call, the order of its outputs. With a mask, or recurrent dropout in training, its own
    loop runs. Source: keras 3.15, layers/rnn/rnn.py.
    """

    def __init__(self, layer: Any) -> None:
        self.layer: Any = layer
        self.cell: str = convert.keras_cell(layer)
        self.use_cudnn: Any = getattr(layer, "use_cudnn", None)

    def __call__(
        self, sequences: Tensor, initial_state: Any, mask: Any = None, training: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `inner_loop`: sequences [B, T, I] and states [B, H] to the last output [B, H], all
        outputs [B, T, H], and the final states."""
        layer, own = self.layer, self.layer.cell
        noise = own.get_dropout_mask(sequences[:, 0]) if training and layer.dropout else None
        if mask is not None or (training and layer.recurrent_dropout) or isinstance(noise, list):
            return type(layer).inner_loop(layer, sequences, initial_state, mask, training)
        bias = own.bias.value if layer.use_bias else None
        weights = convert.read(
            "keras", self.cell, own.kernel.value, own.recurrent_kernel.value, bias
        )
        dtype = weights["weight_ih"].dtype
        if layer.stateful:  # its states are written into after the call, before backward
            initial_state = [state.clone() for state in initial_state]
        x = sequences if noise is None else sequences * noise[:, None]
        x = x.flip(1) if layer.go_backwards else x
        output, final = functional.recurrent(
            self.cell, x.to(dtype), tuple(s[None].to(dtype) for s in initial_state),
            weights.values(), hidden_size=layer.units, bias=layer.use_bias, batch_first=True,
        )  # fmt: skip
        return output[:, -1], output, [state[0] for state in final]


def layers_of(model: nn.Module) -> list[Any]:
    """The recurrent layers of Keras inside: Keras's models do not register theirs with torch."""
    roots: list[Any] = [m for m in model.modules() if hasattr(m, "_flatten_layers")]
    found = {id(layer): layer for root in roots for layer in root._flatten_layers()}
    kinds = ("LSTM", "GRU", "SimpleRNN")
    return [
        layer
        for layer in found.values()
        if type(layer).__name__ in kinds and type(layer).__module__.startswith("keras.")
    ]


def put_in(layer: Any) -> str:
    """Gives the layer our loop, and says so. Raises ValueError where no cell of ours is its."""
    loop = vars(layer)["inner_loop"] = Loop(layer)
    if loop.use_cudnn is not None:
        layer.use_cudnn = False  # else Bidirectional calls cuDNN itself, past both loops
    return f"keras.layers.{type(layer).__name__} -> its loop in fusedrnn, {loop.cell}"


def take_out(layer: Any) -> str:
    """The inverse of `put_in`."""
    loop = vars(layer).pop("inner_loop")
    if loop.use_cudnn is not None:
        layer.use_cudnn = loop.use_cudnn
    return f"fusedrnn's loop -> keras.layers.{type(layer).__name__}"
