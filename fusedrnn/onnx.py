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

# Our order of the gates (torch's) in ONNX's: i o f c, z r h, and the one of an RNN.
GATES: dict[str, tuple[int, ...]] = {
    "lstm": (0, 3, 1, 2),
    "gru": (1, 0, 2),
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
}
OPERATORS: dict[str, str] = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}

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
            no operator: packed sequences, projections, resets, regularisers inside the loop.
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


def lacks(
    cell: str, projection: bool, batch_sizes: Any, reset: Any, h_mask: Any, zoneout: Any
) -> str:
    """What ONNX lacks for such a call of our operator, as a message; "" if nothing."""
    missing = {
        "packed sequences (use lengths=)": batch_sizes is not None,
        "projections": projection,
        "resets": reset is not None,
        "regularisers inside the loop": h_mask is not None or zoneout is not None,
        f"the cell {cell!r}": cell not in OPERATORS,
    }
    if any(missing.values()):
        what = " and ".join(name for name, is_so in missing.items() if is_so)
        return f"ONNX has no operator for {what}"
    return ""


# To a plain export that meets our operator, though ONNX lacks nothing for it.
USE_EXPORT = (
    "torch.onnx.export cannot write lengths=, input_dropout and weight_drop in training mode, or "
    "a program of torch.export: call fusedrnn.onnx.export(model, args, f, ...) in its place"
)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch.onnx.export's custom_translation_table for our operator."""
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("export to ONNX needs onnxscript: pip install onnxscript") from error

    op: Any = opset18

    def layer(
        input, state, weights, lengths, batch_sizes, reset, cell, bias, bidirectional, projection,
        batch_first, backend, save, autocast, clip=0.0, h_mask=None, zoneout=None,
    ):  # fmt: skip
        if lacking := lacks(cell, projection, batch_sizes, reset, h_mask, zoneout):
            raise NotImplementedError(lacking)
        gates, D = GATES[cell], 2 if bidirectional else 1
        size = len(weights) // D
        H = state[0].shape[-1]
        rows = [g * H + unit for g in gates for unit in range(H)]
        groups = [weights[d * size : (d + 1) * size] for d in range(D)]

        def in_order(tensor):
            """The gates in ONNX's order, and a leading dimension for the direction."""
            if len(gates) > 1:
                tensor = op.Gather(tensor, op.Constant(value_ints=rows), axis=0)
            return op.Unsqueeze(tensor, op.Constant(value_ints=[0]))

        def stacked(tensors):
            return tensors[0] if D == 1 else op.Concat(*tensors, axis=0)

        w = stacked([in_order(group[0]) for group in groups])
        r = stacked([in_order(group[1]) for group in groups])
        b = None
        if bias:
            pairs = [[in_order(t) for t in group[2:4]] for group in groups]
            b = stacked([op.Concat(*pair, axis=1) for pair in pairs])
        empty = None
        if lengths is not None:
            empty = op.Equal(lengths, op.Constant(value_ints=[0]))
            empty = op.Unsqueeze(empty, op.Constant(value_ints=[0, 2]))  # [1, B, 1]
            lengths = op.Cast(lengths, to=6)  # int32
        if batch_first:
            input = op.Transpose(input, perm=[1, 0, 2])
        attributes = {"hidden_size": H}
        attributes["direction"] = "bidirectional" if bidirectional else "forward"
        if cell == "gru":
            attributes["linear_before_reset"] = 1
        if cell == "rnn_relu":
            attributes["activations"] = ["Relu"] * D
        function = getattr(op, OPERATORS[cell])
        output, *final = function(input, w, r, b, lengths, *state, **attributes)
        if lengths is not None:
            # A row without steps keeps its state, of which ONNX would make 0.
            final = [op.Where(empty, s, f) for s, f in zip(state, final, strict=True)]
        # [T, D, B, H] -> [T, B, D * H], or [B, T, D * H]
        output = op.Transpose(output, perm=[2, 0, 1, 3] if batch_first else [0, 2, 1, 3])
        output = op.Reshape(output, op.Constant(value_ints=[0, 0, -1]))
        return output, *final

    return {torch.ops.fusedrnn.layer.default: layer}
