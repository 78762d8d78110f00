"""The time loop in plain torch operators: the oracle, and the fallback for everything.

It runs any registered cell on any device in any floating dtype, and autograd, double backward
and the transforms of `torch.func` go through it because nothing in it is hidden from them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fusedrnn import arguments, packing
from fusedrnn.backends import stages
from fusedrnn.call import (
    Call,
    Masks,
    Operands,
    Spec,
    Weights,
    adds_input,
    cell_of,
    joined,
    masked_input,
    one_layer,
    reverses,
    split_weights,
)
from fusedrnn.cells import Cell, Mean
from fusedrnn.regularizers import ClipGradient

Steps = list[tuple[Tensor, ...]]  # the S states [B, H] of every time step


def refuses(call: Call) -> str | None:
    """None: it runs everything."""
    return None


def forward(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """A stack of layers in differentiable operators: (output, *final states)."""
    output, final, _steps = run(spec, operands, masks)
    return output, *final


def run(
    spec: Spec, operands: Operands, masks: Masks, given: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...], list[Steps]]:
    """`forward`, and the states of every layer, direction and time step, as nodes of the graph.

    `given`, in the layout of the output, is that of `layer`, for a single layer.
    """
    arguments.check_weights(spec, operands.weights)  # of a module, where they may be replaced
    lengths, reset = masks.lengths, masks.reset
    if masks.batch_sizes is not None:
        lengths = packing.lengths_of(masks.batch_sizes)
    elif spec.batch_first and reset is not None:
        reset = reset.transpose(0, 1)
    input = operands.input
    lengths = None if lengths is None else lengths.to(input.device)
    given = None if given is None else by_time(spec, given, masks)
    finals, steps = [], []
    for index in range(spec.num_layers):
        one, here, _ = one_layer(spec, operands, masks, index)
        noise = masks.of_layer(index)
        zoneout = noise.zoneout
        if zoneout is not None and zoneout.dim() > 1:
            zoneout = by_time(spec, zoneout, masks)
        output, final, layer_steps = layer(
            cell_of(spec), by_time(spec, masked_input(spec, input, noise), masks),
            here.state, split_weights(one, here.weights), lengths=lengths, reset=reset,
            reset_state=here.reset_state, h_mask=noise.h, zoneout=zoneout, clip=spec.clip,
            given=given, reverses=reverses(one),
        )  # fmt: skip
        if masks.batch_sizes is not None:
            output = packing.unpad(output, masks.batch_sizes)
        elif spec.batch_first:
            output = output.transpose(0, 1)
        input = output + input if adds_input(spec, index) else output
        finals.append(final)
        steps += layer_steps
    return input, joined(finals), steps


def by_time(spec: Spec, tensor: Tensor, masks: Masks) -> Tensor:
    """[T, B, *] from a call's layout: [T, B, *], [B, T, *] or packed [N, *]."""
    if masks.batch_sizes is not None:
        return packing.pad(tensor, masks.batch_sizes)
    return tensor.transpose(0, 1) if spec.batch_first else tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gates are computed and states other than h are carried."""
    return torch.promote_types(dtype, torch.float32)


def weights_in(dtype: torch.dtype, weights: Weights) -> Weights:
    """The weights, cast."""
    if weights.w_ih.dtype == dtype:
        return weights
    cast = {
        name: tensor.to(dtype)
        for name, tensor in weights._asdict().items()
        if isinstance(tensor, Tensor)
    }
    dense = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in weights.dense]
    params = [p.to(dtype) for p in weights.params]
    return weights._replace(**cast, params=tuple(params), dense=tuple(dense))


def active_rows(lengths: Tensor, T: int) -> Tensor:
    """[T, B] bool: whether time step t exists in row b, from lengths [B]."""
    return torch.arange(T, device=lengths.device)[:, None] < lengths[None, :]


def scan(
    cell: Cell,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    *,
    reverse: bool = False,
    active: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, ...] = (),
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
    clip: float = 0.0,
    given: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Steps]:
    """One layer in one direction.

        for each stage of the cell:
            received_t = values[0] @ W^T + b         values: the states at first
            values = stage(x_gates_t, received_t, values)

    Args:
        input: [T, B, I].
        state: S tensors [B, H].
        reverse: run from the last time step to the first.
        active: [T, B] bool; where False, the state is held and the output is 0. A reversed
            row therefore starts at its own end. The input must be finite there, too.
        reset: [T, B] bool; where True, the state is set to `reset_state` (S tensors [B, H]), or
            to 0, before the step.
        h_mask: [B, H], multiplies what weight_hh multiplies.
        zoneout: bool [T, B, S, H]: where True a unit keeps its previous state; or [S] floats,
            the part of its previous state that it keeps.
        clip: bound of the gradient of each h_t, from its output and the next step together;
            0 for none.
        given: [T, B, H], the output, where another backend has computed it: every step starts
            from the h in it, and what is left to compute are the other states.
    Returns:
        output [T, B, H]; the S final states; the S states of every step, as computed for all rows,
        in order of time.
    Numerics: gates and states are float32 (float64 for float64); what is multiplied is rounded to
        the input's dtype, h at every step, since that is how it is stored.
    """
    dtype = input.dtype
    wide = compute_dtype(dtype)
    wide_weights = weights_in(wide, weights)
    of_stages = stages.stage_weights(cell, wide_weights)
    params = stages.shared_out(cell, "params", wide_weights.params)
    x_gates_tbg = stages.input_gates(cell, input.to(wide), wide_weights)
    G = len(cell.gates)
    heads = len(weights.w_hh) if weights.w_hh.dim() == 3 else 1

    state = tuple(s.to(wide) for s in state)
    reset_state = tuple(f.to(wide) for f in reset_state)
    reset_state = reset_state or tuple(torch.zeros_like(s) for s in state)
    h_mask = None if h_mask is None else h_mask.to(wide)
    steps = range(input.shape[0])
    outputs: list[Tensor] = []
    all_states: Steps = []
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            started = reset[t][:, None]
            pairs = zip(reset_state, state, strict=True)
            state = tuple(torch.where(started, f, s) for f, s in pairs)
        held, here = state, None
        if active is not None:
            # A row that is over goes through the cell as zeros: autograd multiplies what it holds
            # by a gradient of 0, and 0 * inf is NaN.
            here = active[t][:, None]
            state = tuple(torch.where(here, s, torch.zeros_like(s)) for s in state)
        x_gates = stages.shared_out(cell, "gates", x_gates_tbg[t].chunk(G, dim=-1))
        new = state
        for s, stage in enumerate(cell.stages):
            factors = new[: stage.exchanged]
            if s > 0:
                factors = tuple([x.to(dtype).to(wide) for x in factors])
            if isinstance(stage.receives, Mean):
                received = stages.means(factors, heads)
            else:
                h = factors[0]
                if h_mask is not None and stage.gates:
                    h = h * h_mask
                received = stages.product(h, *of_stages[s], stage.products)
            new, _saved = stage.forward(x_gates[s], received, new, params[s])
        if zoneout is not None:
            new = _zone_out(zoneout, t, state, new)
        new = (new[0].to(dtype).to(wide) if given is None else given[t].to(wide), *new[1:])
        all_states.append(new)
        if clip:
            new = (cast(Tensor, ClipGradient.apply(new[0], clip)), *new[1:])
        if here is None:
            outputs.append(new[0])
        else:
            outputs.append(torch.where(here, new[0], torch.zeros_like(new[0])))
            new = tuple(torch.where(here, n, s) for n, s in zip(new, held, strict=True))
        state = new
    if reverse:
        outputs.reverse()
        all_states.reverse()
    return torch.stack(outputs).to(dtype), tuple(s.to(dtype) for s in state), all_states


def _zone_out(zoneout: Tensor, t: int, prev, new) -> tuple[Tensor, ...]:
    """The states after the step, of which some units, or some part, stay as before it."""
    pairs = enumerate(zip(prev, new, strict=True))
    if zoneout.dtype == torch.bool:
        return tuple(torch.where(zoneout[t, :, s], old, now) for s, (old, now) in pairs)
    return tuple(now + zoneout[s] * (old - now) for s, (old, now) in pairs)


def layer(
    cell: Cell,
    input: Tensor,
    state: tuple[Tensor, ...],
    directions: list[Weights],
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, ...] = (),
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
    clip: float = 0.0,
    given: Tensor | None = None,
    reverses: tuple[bool, ...] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], list[Steps]]:
    """One layer in one or two directions.

    Args:
        input: [T, B, I].
        state, reset_state: S tensors [D, B, H] each.
        lengths: [B]; see `scan`.
        reset: [T, B] bool: where a sequence begins inside a row. The reverse direction is reset
            between the same two steps, on its way from that first step to the one before it.
            Beyond a row's length it means nothing.
        h_mask: [D, B, H]. zoneout: bool [T, B, D, S, H] or [S] floats. clip: see `scan`.
        given: [T, B, D * H]; see `scan`.
        reverses: of each direction, whether it runs backwards in time. Default: the second does.
    Returns:
        output [T, B, D * H]; S final states [D, B, H]; the states of every step of each direction.
    """
    active = None
    if reverses is None:
        reverses = (False, True)[: len(directions)]
    if lengths is not None:
        active = active_rows(lengths, input.shape[0])
        input = torch.where(active[:, :, None], input, torch.zeros_like(input))
    starts = None if reset is None else packing.starts_of(reset, lengths, reverses)
    outputs, finals, states = [], [], []
    for d, (weights, reverse) in enumerate(zip(directions, reverses, strict=True)):
        output, final, steps = scan(
            cell,
            input,
            tuple(s[d] for s in state),
            weights,
            reverse=reverse,
            active=active,
            reset=None if starts is None else starts[:, :, d],
            reset_state=tuple(f[d] for f in reset_state),
            h_mask=None if h_mask is None else h_mask[d],
            zoneout=zoneout if zoneout is None or zoneout.dim() == 1 else zoneout[:, :, d],
            clip=clip,
            given=None if given is None else given.chunk(len(directions), -1)[d],
        )
        outputs.append(output)
        finals.append(final)
        states.append(steps)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, tuple(torch.stack(parts) for parts in zip(*finals, strict=True)), states
