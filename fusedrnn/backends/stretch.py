"""Lengths, packed rows and resets of an LSTM, by torch's plain operator: oneDNN's on a CPU.

torch's operator for packed rows is a slow loop, and none has resets. Here each row of the batch is
stretched until the plain operator can run all of them:

    row         x_0   x_1       | x_2        (| a reset, before step 2)
    stretched   x_0   x_1   R     x_2   E    (another row is longer)

R, a reset, is a time step more that closes the gates i and f: it leaves c = 0 and h = o * tanh(c)
= 0 exactly, and lets no gradient through. E, past the end of a row, closes i and opens f, which
holds c; its h is never read. Both are what W_ih makes of two more features of the input, which are
0 in real steps. A row that runs backwards in time is one whose steps were gathered backwards.

One thing differs from the loop: a gradient of the loss that is itself NaN or infinite goes through
R to the steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn import packing
from fusedrnn.backends import reference
from fusedrnn.call import (
    Masks,
    Operands,
    Spec,
    autocast_dtype,
    operands_of,
    reverses,
    split_weights,
)

CPU = torch.device("cpu")  # named, since a program may have set another default
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]


def serves(spec: Spec, device: torch.device) -> bool:
    """Whether lengths, packed rows and resets to zero of such a stack are run here.

    How many steps there are depends on values, which a trace would keep for ever, and of which a
    fake tensor has none. A compiled program calls an op, which sees values.
    """
    if spec.cell != "lstm" or spec.proj_size or device.type != "cpu":
        return False
    return torch.compiler.is_compiling() or not (is_tracing() or _in_fake_mode())


def _in_fake_mode() -> bool:
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(fake) is not None


def ends(T: int, B: int, lengths: Tensor | None, reset: Tensor | None) -> Tensor:
    """[B] int64: the steps of each row, and its resets; `reset` is [T, B].

    The largest of them is how many steps the operator runs. A reset before a row's first step needs
    none: it sets the state that the row is given.
    """
    lengths = torch.full((B,), T, device=CPU) if lengths is None else lengths
    if reset is None:
        return lengths
    return lengths + packing.starts_of(reset, lengths, (False,))[1:, :, 0].sum(0)


class Plan(NamedTuple):
    """Where each row of a sequence tensor [N, *] goes in a stretched one [steps * B, *], and where
    each row of that comes from."""

    taken: Tensor  # [steps * B] rows; 0 for R and E
    extra: Tensor  # the stretched rows that are R or E
    given: Tensor  # [N] stretched rows; 0 for padding
    padding: Tensor | None  # the rows that are padding; None if there are none
    flags: Tensor  # [steps, B, 2] bool: R, E
    last: Tensor  # [B] stretched rows: the last step of each row
    kept: Tensor | None  # [B, 1] bool: False where a row's first step is reset; None: no resets
    empty: Tensor | None  # [B, 1] bool: rows without a step; None if there can be none

    def stretched(self, rows: Tensor) -> Tensor:
        """[steps, B, *] from [N, *], 0 in R and E."""
        moved = Moved.apply(rows, self.taken, self.extra, self.given, self.padding)
        return moved.view(*self.flags.shape[:2], *rows.shape[1:])

    def restored(self, steps: Tensor) -> Tensor:
        """[N, *] from [steps, B, *], 0 in padding."""
        rows = steps.flatten(0, 1)
        return Moved.apply(rows, self.given, self.padding, self.taken, self.extra)


def plan(rows: packing.Rows, N: int, reset: Tensor | None, *, reverse: bool) -> Plan:
    """The plan of one direction; `reset` is [T, B]."""
    T, B = rows.T, rows.B
    own, b = torch.arange(T, device=CPU)[:, None], torch.arange(B, device=CPU)
    end = ends(T, B, rows.lengths, reset)
    steps = max([1, *end.tolist()])
    here = (
        torch.ones(T, B, dtype=torch.bool, device=CPU)
        if rows.lengths is None
        else own < rows.lengths
    )
    time, place, kept = own.expand(T, B), own, None
    if reverse:
        time = (T - 1 - time) if rows.lengths is None else (rows.lengths - 1 - own).clamp(min=0)
    if reset is not None:
        starts = packing.starts_of(reset, rows.lengths, (reverse,))[:, :, 0]
        starts = starts.gather(0, time) & here
        kept = ~starts[0][:, None]
        place = own + starts.cumsum(0) - starts[:1].long()
    row = time * rows.stride_t if rows.offsets is None else rows.offsets[time]
    to, row = (place * B + b)[here], (row + b * rows.stride_b)[here]
    is_extra = torch.ones(steps * B, dtype=torch.bool, device=CPU).index_fill_(0, to, False)
    over = torch.arange(steps, device=CPU)[:, None] >= end
    padding = None
    if len(row) < N:
        padding = (
            torch.ones(N, dtype=torch.bool, device=CPU).index_fill_(0, row, False).nonzero()[:, 0]
        )
    return Plan(
        torch.zeros(steps * B, dtype=torch.int64, device=CPU).index_copy_(0, to, row),
        is_extra.nonzero()[:, 0],
        torch.zeros(N, dtype=torch.int64, device=CPU).index_copy_(0, row, to),
        padding,
        torch.stack([is_extra.view(steps, B) & ~over, over], -1),
        (end - 1).clamp(min=0) * B + b,
        kept,
        None if rows.lengths is None else rows.lengths[:, None] == 0,
    )


class Moved(torch.autograd.Function):
    """Rows [M, *] by an index, but 0 where `blank` says; and the way back, for the gradient.

    torch's gradient of an index adds row by row, since it cannot know that none is taken twice.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, blank: Tensor | None, back: Tensor,
        back_blank: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(index, blank, back, back_blank)
        taken = rows.index_select(0, index)
        return taken if blank is None else taken.index_fill_(0, blank, 0)

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> tuple[Tensor | None, ...]:
        index, blank, back, back_blank = ctx.saved_tensors
        d_taken: Any = Moved.apply(*d_rows, back, back_blank, index, blank)
        return d_taken, None, None, None, None


def layer(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """A layer of an LSTM, in one or two directions: (output, h_n, c_n), as `reference.forward`."""
    options, found = (spec.bias, 1, 0.0, spec.training, False, False), []
    for d, (where, x, h, c, weights) in enumerate(directions_of(spec, operands, masks)):
        steps, _, c_n = torch.lstm(x, (h[None], c[None]), weights, *options)
        if failed(where, steps, c_n[0]):
            return _by_the_loop(spec, operands, masks)
        found.append(results(where, steps, c_n[0], [s[d] for s in operands.state]))
    outputs, *finals = zip(*found, strict=True)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    output = output.view(*operands.input.shape[:-1], output.shape[-1])
    return output, *(torch.stack(parts) for parts in finals)


class Direction(NamedTuple):
    """What the plain operator is given for a direction of a layer, to be run forwards in time."""

    where: Plan
    x: Tensor  # [steps, B, I + 2]
    h: Tensor  # [B, H]
    c: Tensor  # [B, H]
    weights: list[Tensor]  # W_ih [4 * H, I + 2], W_hh, and the biases if there are any


def directions_of(spec: Spec, operands: Operands, masks: Masks) -> Iterator[Direction]:
    """The directions of a layer, each made when it is asked for."""
    rows = packing.rows_of(operands.input, spec.batch_first, masks.lengths, masks.batch_sizes)
    reset = masks.reset
    if reset is not None and spec.batch_first:
        reset = reset.T
    input = operands.input.reshape(-1, operands.input.shape[-1])
    for d, (weights, reverse) in enumerate(
        zip(split_weights(spec, operands.weights), reverses(spec), strict=True)
    ):
        where = plan(rows, len(input), reset, reverse=reverse)
        h, c = [s[d] for s in operands.state]
        if where.kept is not None:
            h, c = (torch.where(where.kept, s, torch.zeros_like(s)) for s in (h, c))
        if where.empty is not None:
            h, c = (torch.where(where.empty, torch.zeros_like(s), s) for s in (h, c))
        x = torch.cat([where.stretched(input), where.flags.to(input.dtype)], -1)
        w_ih = torch.cat([weights.w_ih, _of_flags(h.shape[-1], weights.w_ih.dtype)], -1)
        flat = [w_ih, weights.w_hh]
        if weights.b_ih is not None and weights.b_hh is not None:
            flat += [weights.b_ih, weights.b_hh]
        yield Direction(where, x, h, c, flat)


def failed(where: Plan, steps: Tensor, c_n: Tensor) -> bool:
    """Whether an extra step may have failed, from the operator's steps [steps, B, H] and its c_n.

    A gate that is closed does not clear a NaN or an infinity, as 0 * NaN is NaN, neither in the
    state nor in the gradient; and an infinite weight makes a NaN of the gates.
    """
    if where.kept is not None:
        sums = [t.detach().sum(dtype=torch.float64) for t in (steps, c_n)]
        return not bool((sums[0] + sums[1]).isfinite())
    # A NaN that was held is in h, too, and stays in its row.
    h_n = steps.detach().flatten(0, 1).index_select(0, where.last)
    return bool((~c_n.isfinite() & ~h_n.isnan()).any())


def results(where: Plan, steps: Tensor, c_n: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The output [N, H] and the final states [B, H] of a direction that was `given` (h, c)."""
    final = [steps.flatten(0, 1).index_select(0, where.last), c_n]
    if where.empty is not None:
        pairs = zip(given, final, strict=True)
        final = [torch.where(where.empty, s.to(n.dtype), n) for s, n in pairs]
    return where.restored(steps), *final


def d_results(where: Plan, d_output: Tensor, d_h_n: Tensor, d_c_n: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the operator's steps and of its c_n from those of `results`."""
    if where.empty is not None:
        d_h_n, d_c_n = (torch.where(where.empty, torch.zeros_like(d), d) for d in (d_h_n, d_c_n))
    d_steps = where.stretched(d_output)
    d_steps.flatten(0, 1).index_add_(0, where.last, d_h_n)
    return d_steps, d_c_n


def d_given(
    where: Plan, d_x: Tensor, d_w_ih: Tensor, d_state: list[Tensor], d_final: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of a layer's input [N, I], W_ih and states from those of a `Direction`, and
    from those of the final states, which are the first of a row without a step."""
    I = d_w_ih.shape[-1] - 2
    if where.kept is not None:
        d_state = [torch.where(where.kept, d, torch.zeros_like(d)) for d in d_state]
    if where.empty is not None:
        pairs = zip(d_final, d_state, strict=True)
        d_state = [torch.where(where.empty, n.to(d.dtype), d) for n, d in pairs]
    return where.restored(d_x[..., :I]), d_w_ih[:, :I], d_state


def _of_flags(H: int, dtype: torch.dtype) -> Tensor:
    """[4 * H, 2]: the columns of W_ih that read the flags R and E, for the gates i, f, g and o.

    More than any sum of finite terms that means something, so that a sigmoid of it is 0 or 1; and
    less than the largest number, so that what it is added to, or multiplied with, stays finite.
    """
    big = torch.finfo(dtype).max ** 0.75
    columns = torch.tensor([[-big, -big], [-big, big], [0, 0], [0, 0]], dtype=dtype, device=CPU)
    return columns.repeat_interleave(H, 0)


def _by_the_loop(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """The layer by the reference, in the dtype in which torch's operator would have run."""
    low = autocast_dtype(operands.input)
    if low is not None:
        operands = operands_of(spec, [t.to(low) for t in operands.flat()])
    with torch.autocast("cpu", enabled=False):
        return reference.forward(spec, operands, masks)
