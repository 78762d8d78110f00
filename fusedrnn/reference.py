"""The time loop in plain torch operators: the oracle, and the fallback for everything.

It runs any registered cell on any device in any floating dtype, and autograd, double backward
and the transforms of `torch.func` go through it because nothing in it is hidden from them.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.cells import Cell
from fusedrnn.packing import starts_of
from fusedrnn.regularizers import ClipGradient


class Weights(NamedTuple):
    """The parameters of one layer and direction, in torch's order."""

    w_ih: Tensor  # [G * H, I]
    w_hh: Tensor  # [G * H, H], or [G * H, P] with a projection to P
    b_ih: Tensor | None  # [G * H]
    b_hh: Tensor | None  # [G * H]
    w_hr: Tensor | None  # [P, H]
    params: tuple[Tensor, ...]  # the cell's own, each [H]


def split_weights(
    cell: Cell, flat: list[Tensor] | tuple[Tensor, ...], *, bias: bool, projection: bool
) -> list[Weights]:
    """A module's flat list of parameters as one `Weights` per layer and direction.

    Raises:
        RuntimeError: `weights` does not hold a whole number of layers.
    """
    size = 2 + 2 * bias + projection + len(cell.params)
    if len(flat) == 0 or len(flat) % size:
        raise RuntimeError(
            f"weights: expected a multiple of {size} tensors for cell {cell.name!r} with "
            f"bias={bias} and {'a' if projection else 'no'} projection, got {len(flat)}"
        )
    groups = []
    for start in range(0, len(flat), size):
        group = list(flat[start : start + size])
        w_ih, w_hh = group[:2]
        b_ih, b_hh = group[2:4] if bias else (None, None)
        rest = group[4:] if bias else group[2:]
        w_hr, params = (rest[0], rest[1:]) if projection else (None, rest)
        groups.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(params)))
    return groups


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gates are computed and states other than h are carried."""
    return torch.promote_types(dtype, torch.float32)


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
    fresh: tuple[Tensor, ...] = (),
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
    clip: float = 0.0,
    record: list[tuple[Tensor, ...]] | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction.

        h_gates_t = h_{t-1} @ w_hh^T + b_hh
        state_t = cell(input_t @ w_ih^T + b_ih, h_gates_t, state_{t-1})

    Args:
        input: [T, B, I].
        state: S tensors [B, H].
        reverse: run from the last time step to the first.
        active: [T, B] bool; where False, the state is held and the output is 0. A reversed
            row therefore starts at its own end. The input must be finite there, too.
        reset: [T, B] bool; where True, the state is set to `fresh` (S tensors [B, H]), or to 0,
            before the step.
        h_mask: [B, H], multiplies h_{t-1} before the recurrent product.
        zoneout: bool [T, B, S, H]: where True a unit keeps its previous state; or [S] floats,
            the part of its previous state that it keeps.
        clip: bound of the gradient of each h_t, from its output and the next step together;
            0 for none.
        record: takes the S states of every step, as computed for all rows, in order of time.
        given: [T, B, H], the output, where another backend has computed it: every step starts
            from the h in it, and what is left to compute are the other states.
    Returns:
        output [T, B, H]; the S final states.
    Numerics: gates and states are float32 (float64 for float64); h is rounded to the input's
        dtype at every step, since that is how it is stored.
    """
    dtype = input.dtype
    wide = compute_dtype(dtype)
    w_hh = weights.w_hh.to(wide)
    b_hh = None if weights.b_hh is None else weights.b_hh.to(wide)
    w_hr = None if weights.w_hr is None else weights.w_hr.to(wide)
    params = tuple(p.to(wide) for p in weights.params)
    b_ih = None if weights.b_ih is None else weights.b_ih.to(wide)
    x_gates_tbg = F.linear(input.to(wide), weights.w_ih.to(wide), b_ih)
    G = len(cell.gates)

    state = tuple(s.to(wide) for s in state)
    fresh = tuple(f.to(wide) for f in fresh) or tuple(torch.zeros_like(s) for s in state)
    h_mask = None if h_mask is None else h_mask.to(wide)
    steps = range(input.shape[0])
    outputs: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            started = reset[t][:, None]
            state = tuple(torch.where(started, f, s) for f, s in zip(fresh, state, strict=True))
        held, here = state, None
        if active is not None:
            # A row that is over goes through the cell as zeros: autograd multiplies what it holds
            # by a gradient of 0, and 0 * inf is NaN.
            here = active[t][:, None]
            state = tuple(torch.where(here, s, torch.zeros_like(s)) for s in state)
        h_prev = state[0] if h_mask is None else state[0] * h_mask
        x_gates = x_gates_tbg[t].chunk(G, dim=-1)
        h_gates = F.linear(h_prev, w_hh, b_hh).chunk(G, dim=-1)
        (h, *others), _saved = cell.forward(x_gates, h_gates, state, params)
        if w_hr is not None:
            h = F.linear(h, w_hr)
        new = (h, *others)
        if zoneout is not None:
            new = _zone_out(zoneout, t, state, new)
        new = (new[0].to(dtype).to(wide) if given is None else given[t].to(wide), *new[1:])
        if record is not None:
            record.append(new)
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
        if record is not None:
            record.reverse()
    return torch.stack(outputs).to(dtype), tuple(s.to(dtype) for s in state)


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
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
    clip: float = 0.0,
    record: list[list[tuple[Tensor, ...]]] | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one or two directions.

    Args:
        input: [T, B, I].
        state: S tensors [D, B, H]; with `reset`, S more may follow: the states it sets.
        lengths: [B]; see `scan`.
        reset: [T, B] bool: where a sequence begins inside a row. The reverse direction is reset
            between the same two steps, on its way from that first step to the one before it.
            Beyond a row's length it means nothing.
        h_mask: [D, B, H]. zoneout: bool [T, B, D, S, H] or [S] floats. clip: see `scan`.
        record: takes one list for each direction; see `scan`. given: [T, B, D * H]; see `scan`.
    Returns:
        output [T, B, D * H]; S final states [D, B, H].
    """
    active = None
    if lengths is not None:
        active = active_rows(lengths, input.shape[0])
        input = torch.where(active[:, :, None], input, torch.zeros_like(input))
    starts = None if reset is None else starts_of(reset, lengths, len(directions))
    S = len(cell.states)
    state, fresh = state[:S], state[S:]
    outputs, finals = [], []
    for d, weights in enumerate(directions):
        steps: list[tuple[Tensor, ...]] = []
        output, final = scan(
            cell,
            input,
            tuple(s[d] for s in state),
            weights,
            reverse=d == 1,
            active=active,
            reset=None if starts is None else starts[:, :, d],
            fresh=tuple(f[d] for f in fresh),
            h_mask=None if h_mask is None else h_mask[d],
            zoneout=zoneout if zoneout is None or zoneout.dim() == 1 else zoneout[:, :, d],
            clip=clip,
            record=None if record is None else steps,
            given=None if given is None else given.chunk(len(directions), -1)[d],
        )
        if record is not None:
            record.append(steps)
        outputs.append(output)
        finals.append(final)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
