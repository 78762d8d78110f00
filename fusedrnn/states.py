"""The states of all layers at all steps, whatever ran them, and gradients through them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrnn import cells, op, packing
from fusedrnn.backends import reference
from fusedrnn.call import (
    Call,
    Masks,
    Operands,
    Spec,
    directions,
    in_turn,
    joined,
    operands_of,
)

Outputs = tuple[Tensor, ...]  # (output, *final states)


def run(
    spec: Spec, operands: Operands, masks: Masks, call: Call
) -> tuple[Outputs, dict[str, Tensor]]:
    """The stack, layer by layer: (output, *final states), and each of the cell's states by name,
    [L * D, T, B, H], 0 where a row is over."""
    output, layers = in_turn(spec, operands, masks, functools.partial(_layer, call))
    finals, planes = zip(*layers, strict=True)
    by_name = dict(zip(cells.get(spec.cell).states, joined(planes), strict=True))
    return (output, *joined(finals)), by_name


def _layer(
    call: Call, spec: Spec, operands: Operands, masks: Masks
) -> tuple[Tensor, Outputs, Outputs]:
    """A layer: its output, its final states, and each of its S states, [D, T, B, H].

    h is the output. The others, the reference computes anyway; the kernels store them, for
    backward; torch's operators and the loop return no other, and for these the reference's loop
    computes them again, as it does for a gradient through what the kernels stored.
    """
    S, D = len(operands.state), directions(spec)

    def again(output, *tensors):
        device = output.device.type
        with (
            contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        ):
            given = operands_of(spec, tensors)
            *_, steps = reference.run(spec._replace(clip=0.0), given, masks, output)
        return _stack_steps(steps, masks, output.dtype)

    others: Outputs
    if spec.backend == "reference":
        output, final, steps = reference.run(spec, operands, masks)
        outputs, others = (output, *final), _stack_steps(steps, masks, output.dtype)
    elif S == 1 or spec.backend in ("aten", "loop"):
        outputs = op.execute(spec, operands, masks, call)
        others = () if S == 1 else again(outputs[0], *operands.flat())
    else:
        *outputs, stored = op.run(spec, operands, masks, return_states=True)
        planes = stored.view(*operands.input.shape[:-1], D, S - 1, -1)
        planes = reference.by_time(spec, planes, masks).permute(3, 2, 0, 1, 4).unbind()
        others = StoredStates.apply(again, S - 1, *planes, outputs[0], *operands.flat())
    h = reference.by_time(spec, outputs[0], masks).unflatten(-1, (D, -1)).permute(2, 0, 1, 3)
    return outputs[0], tuple(outputs[1:]), (h, *others)


def _stack_steps(steps: list[reference.Steps], masks: Masks, dtype: torch.dtype) -> Outputs:
    """The states but h, each [D, T, B, H], from those of every step of each direction."""
    planes = [
        torch.stack([torch.stack([step[s] for step in direction]) for direction in steps])
        for s in range(1, len(steps[0][0]))
    ]
    lengths = masks.lengths
    if masks.batch_sizes is not None:
        lengths = packing.lengths_of(masks.batch_sizes)
    if lengths is not None and planes:
        lengths = lengths.to(planes[0].device)
        active = reference.active_rows(lengths, planes[0].shape[1])[:, :, None]
        planes = [torch.where(active, p, torch.zeros_like(p)) for p in planes]
    return tuple(p.to(dtype) for p in planes)


class StoredStates(torch.autograd.Function):
    """What a kernel stored of the states, with the gradient of `again`, which computes the same
    from `tensors` in differentiable operators."""

    @staticmethod
    def forward(
        ctx: Any, again: Callable[..., Any], n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors[n:])
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *d_states: Tensor) -> tuple[Tensor | None, ...]:
        create_graph, n = torch.is_grad_enabled(), len(d_states)
        wanted = ctx.needs_input_grad[2 + n :]
        with torch.enable_grad():
            inputs = [
                t.view_as(t) if create_graph else t.detach().requires_grad_(w)
                for t, w in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            found = torch.autograd.grad(
                ctx.again(*inputs), [t for t, w in zip(inputs, wanted, strict=True) if w], d_states,
                create_graph=create_graph, materialize_grads=True,
            )  # fmt: skip
        found = iter(found)
        return None, None, *(None,) * n, *(next(found) if w else None for w in wanted)
