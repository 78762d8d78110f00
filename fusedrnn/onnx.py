"""Export to ONNX, with the standard operators LSTM, GRU and RNN.

torch.onnx.export writes plain calls of the modules as it writes those of torch.nn: for it they
are torch's operators. `export` writes more, such as lengths:

fusedrnn.onnx.export(model, (x, lengths), "model.onnx", dynamic_shapes=...)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from fusedrnn import cells
from fusedrnn.call import (
    Masks,
    Spec,
    adds_input,
    directions,
    masks_of,
    operands_of,
    reverses,
    weights_per_direction,
)

# Whether the export at work is `export`, which translates our operator.
_translates = ContextVar("_translates", default=False)


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """torch.onnx.export, which writes each of our layers as one ONNX operator.

    A layer becomes LSTM, GRU or RNN, with both directions in one; `lengths` its sequence_lens.
    `model` is exported in the mode it is in: call model.eval() first.

    Args:
        model, args, f, kwargs: as torch.onnx.export; a program of torch.export, too.
        options: its other options: dynamic_shapes, input_names, output_names, opset_version ...
    Returns:
        what torch.onnx.export returns.
    Raises:
        ImportError: onnxscript is not installed.
        torch.onnx.OnnxExporterError: caused by a NotImplementedError that says for what ONNX has
            no operator: packed sequences, projections, heads, resets, regularisers inside the loop.
    """
    table = {**translation_table(), **options.pop("custom_translation_table", {})}
    options.pop("dynamo", None)
    token = _translates.set(True)
    try:
        with torch.no_grad():
            program: Any = torch.onnx.export(
                model,
                args,
                f,
                kwargs=kwargs,
                dynamo=True,
                custom_translation_table=table,
                **options,
            )
    finally:
        _translates.reset(token)
    return program


def plain_export() -> bool:
    """Whether torch.onnx.export is at work by itself, not called by `export`."""
    return torch.onnx.is_in_onnx_export() and not _translates.get()


def lacks(spec: Spec, masks: Masks) -> str:
    """What ONNX lacks for such a call of our operator, as a message; "" if nothing."""
    missing = {
        "packed sequences (use lengths=)": masks.batch_sizes is not None,
        "projections": spec.proj_size,
        "resets": masks.reset is not None,
        "regularisers inside the loop": any(
            m.h is not None or m.zoneout is not None for m in masks.layers
        ),
        f"the cell {spec.cell!r}": cells.get(spec.cell).onnx is None,
        "heads": spec.num_heads > 1,
    }
    if any(missing.values()):
        what = " and ".join(name for name, is_so in missing.items() if is_so)
        return f"ONNX has no operator for {what}"
    return ""


# To a plain export that meets our operator, though ONNX lacks nothing for it.
USE_EXPORT = (
    "torch.onnx.export cannot write lengths=, input_dropout and weight_drop in training mode, "
    "direction=, residual=, a cell that torch lacks, or a program of torch.export: call "
    "fusedrnn.onnx.export(model, args, f, ...) in its place"
)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch.onnx.export's custom_translation_table for our operator."""
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("export to ONNX needs onnxscript: pip install onnxscript") from error

    op: Any = opset18

    def stack(
        operands, masks, cell, input_size, hidden_size, num_layers, bias, batch_first, dropout,
        bidirectional, proj_size, num_heads, training, backend, save, autocast, clip, trained_from,
        reversed_layers, residual, hidden_sizes,
    ):  # fmt: skip
        spec = Spec(
            cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, num_heads, training, backend, save, autocast, clip, trained_from,
            reversed_layers, residual, hidden_sizes,
        )  # fmt: skip
        given = masks_of(masks)
        if lacking := lacks(spec, given):
            raise NotImplementedError(lacking)
        known: Any = cells.get(cell).onnx
        input, states, _, weights = operands_of(spec, operands)
        D, size, lengths = directions(spec), weights_per_direction(spec), given.lengths
        empty = None
        if lengths is not None:
            empty = op.Equal(lengths, op.Constant(value_ints=[0]))
            empty = op.Unsqueeze(empty, op.Constant(value_ints=[0, 2]))  # [1, B, 1]
            lengths = op.Cast(lengths, to=6)  # int32
        if batch_first:
            input = op.Transpose(input, perm=[1, 0, 2])
        attributes = {"hidden_size": hidden_size}
        if known.linear_before_reset:
            attributes["linear_before_reset"] = 1
        if known.activations:
            attributes["activations"] = list(known.activations) * D
        order = [cells.get(cell).gates.index(gate) for gate in known.gates]

        def in_order(tensor):
            """The gates in ONNX's order, and a leading dimension for the direction."""
            if len(order) > 1:
                parts = op.Split(tensor, num_outputs=len(order), axis=0)
                tensor = op.Concat(*(parts[gate] for gate in order), axis=0)
            return op.Unsqueeze(tensor, op.Constant(value_ints=[0]))

        def joined(tensors, axis=0):
            return tensors[0] if len(tensors) == 1 else op.Concat(*tensors, axis=axis)

        finals = []
        for layer in range(num_layers):
            reverse = "reverse" if reverses(spec, layer)[0] else "forward"
            attributes["direction"] = "bidirectional" if bidirectional else reverse
            below = input
            scales = (1 / (1 - dropout) if dropout < 1 else 0.0, 1.0)
            for mask, scale in zip(given.of_layer(layer)[:2], scales, strict=True):
                if mask is not None:
                    mask = op.Transpose(mask, perm=[1, 0, 2]) if batch_first else mask
                    scale = op.CastLike(op.Constant(value_float=scale), input)
                    input = op.Mul(op.Mul(input, op.CastLike(mask, input)), scale)
            first = layer * D * size
            groups = [weights[at : at + size] for at in range(first, first + D * size, size)]
            w = joined([in_order(group[0]) for group in groups])
            r = joined([in_order(group[1]) for group in groups])
            b = None
            if bias:
                pairs = [[in_order(t) for t in group[2:4]] for group in groups]
                b = joined([joined(pair, axis=1) for pair in pairs])
            state = [
                state if num_layers == 1 else op.Slice(
                    state, op.Constant(value_ints=[layer * D]),
                    op.Constant(value_ints=[(layer + 1) * D]), op.Constant(value_ints=[0]),
                )
                for state in states
            ]  # fmt: skip
            function = getattr(op, known.operator)
            output, *final = function(input, w, r, b, lengths, *state, **attributes)
            if lengths is not None:
                # A row without steps keeps its state, of which ONNX would make 0.
                final = [op.Where(empty, s, f) for s, f in zip(state, final, strict=True)]
            finals.append(final)
            # [T, D, B, H] -> [T, B, D * H]
            output = op.Transpose(output, perm=[0, 2, 1, 3])
            output = op.Reshape(output, op.Constant(value_ints=[0, 0, -1]))
            input = op.Add(output, below) if adds_input(spec, layer) else output
        if batch_first:
            input = op.Transpose(input, perm=[1, 0, 2])
        return input, *(joined(list(f)) for f in zip(*finals, strict=True))

    return {torch.ops.fusedrnn.stack.default: stack}
