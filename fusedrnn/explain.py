"""Which backend would run a module on an input, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import dispatch
from fusedrnn.dispatch import Call, Explanation
from fusedrnn.functional import autocast_dtype, transformed
from fusedrnn.modules import CellModule, RecurrentModule


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx=None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | tuple | None = None,
) -> Explanation:
    """Which backend `module(input, hx, ...)` would run on, and what the others lack.

    Args:
        module: an LSTM, GRU, RNN or one of the cells, of fusedrnn.
        input, hx, lengths, reset: as the module takes them.
    Returns:
        an Explanation, which prints well; `.backend` is the name.
    Raises:
        TypeError: `module` is not one of fusedrnn's.
        RuntimeError: a backend is forced that cannot run the call.
    """
    tensor = input.data if isinstance(input, PackedSequence) else input
    dtype = autocast_dtype(tensor) or tensor.dtype
    states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (tensor, *states, *module.parameters())
    )
    if isinstance(module, CellModule):
        B = tensor.shape[0] if tensor.dim() == 2 else 1
        call = Call(
            module.cell_name, tensor.device.type, dtype, 1, B, module.input_size,
            module.hidden_size, needs_grad=needs_grad, transformed=transformed(),
        )  # fmt: skip
        # A single step is torch's own cell, unless that cannot, or another backend is forced.
        auto = dispatch.forced_backend(module.backend) == "auto" and not call.transformed
        return dispatch.explain_call(call, "aten" if auto else module.backend)
    if not isinstance(module, RecurrentModule):
        raise TypeError(
            f"module: expected one of fusedrnn's modules, got {type(module).__name__}; "
            f"use replace_modules on a model of torch.nn's"
        )
    if isinstance(input, PackedSequence):
        T, B = input.batch_sizes.numel(), int(input.batch_sizes[0])
    elif tensor.dim() == 2:
        T, B = tensor.shape[0], 1
    else:
        T, B = tensor.shape[:2]
        if module.batch_first:
            T, B = B, T
    inside: tuple[str, ...] = ()
    if reset is not None:
        inside = ("reset",) if isinstance(reset, Tensor) else ("reset", "reset_state")
    if module.regularizers is not None:
        inside += module.regularizers.inside_loop(training=module.training)
    call = Call(
        module.mode.lower(), tensor.device.type, dtype, T, B, module.input_size,
        module.hidden_size, module.num_layers, 2 if module.bidirectional else 1,
        module.proj_size, isinstance(input, PackedSequence), lengths is not None,
        reset is not None, needs_grad, transformed(), tensor.device.index, inside,
    )  # fmt: skip
    return dispatch.explain_call(call, module.backend)
