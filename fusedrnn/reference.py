"""The time loop in plain torch operators: the oracle, and the fallback for everything.

It runs any registered cell on any device in any floating dtype, and autograd, double backward
and the transforms of `torch.func` go through it because nothing in it is hidden from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.cells import Cell


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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction.

        h_gates_t = h_{t-1} @ w_hh^T + b_hh
        state_t = cell(input_t @ w_ih^T + b_ih, h_gates_t, state_{t-1})

    Args:
        input: [T, B, I].
        state: S tensors [B, H].
        reverse: run from the last time step to the first.
        active: [T, B] bool; where False, the state is held and the output is 0. A reversed
            row therefore starts at its own end.
        reset: [T, B] bool; where True, the state is set to 0 before the step.
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
    steps = range(input.shape[0])
    outputs: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        if reset is not None:
            started = reset[t][:, None]
            state = tuple(torch.where(started, torch.zeros_like(s), s) for s in state)
        x_gates = x_gates_tbg[t].chunk(G, dim=-1)
        h_gates = F.linear(state[0], w_hh, b_hh).chunk(G, dim=-1)
        (h, *others), _saved = cell.forward(x_gates, h_gates, state, params)
        if w_hr is not None:
            h = F.linear(h, w_hr)
        new = (h.to(dtype).to(wide), *others)
        if active is None:
            outputs.append(new[0])
        else:
            here = active[t][:, None]
            outputs.append(torch.where(here, new[0], torch.zeros_like(new[0])))
            new = tuple(torch.where(here, n, s) for n, s in zip(new, state, strict=True))
        state = new
    if reverse:
        outputs.reverse()
    return torch.stack(outputs).to(dtype), tuple(s.to(dtype) for s in state)


def layer(
    cell: Cell,
    input: Tensor,
    state: tuple[Tensor, ...],
    directions: list[Weights],
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one or two directions.

    Args:
        input: [T, B, I].
        state: S tensors [D, B, H].
        lengths: [B]; see `scan`.
        reset: [T, B] bool; in the reverse direction a row is reset after the step that follows
            in its own order, so that a sequence ends where the next one begins.
    Returns:
        output [T, B, D * H]; S final states [D, B, H].
    """
    active = None if lengths is None else active_rows(lengths, input.shape[0])
    outputs, finals = [], []
    for d, weights in enumerate(directions):
        before_step = reset
        if reset is not None and d == 1:
            # Time runs backwards: the boundary before step t+1 lies before step t.
            before_step = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        output, final = scan(
            cell,
            input,
            tuple(s[d] for s in state),
            weights,
            reverse=d == 1,
            active=active,
            reset=before_step,
        )
        outputs.append(output)
        finals.append(final)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
