"""The loop backward, by the Jacobians of a cell's stages."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends import stages
from fusedrnn.backends.loop.layer import (
    Layer,
    Stored,
    Views,
    enter,
    is_by_row,
    memory_of,
    started_over,
    with_zeros,
)
from fusedrnn.backends.loop.steps import Activated, activated_of

# Numbers in each matrix of a Jacobian that is worked out at once: 0.5 MB of float32, so that what
# the body makes of it stays in the cache. Small enough for that, large enough that the time of a
# body's operators does not lie in calling them.
CHUNK = 1 << 17


class Given(NamedTuple):
    """What backward starts from: what is stored of all N rows, and the states before each."""

    stored: Stored
    activated: Activated | None  # what left x_gates as they are, if not the bodies
    prev: list[Tensor]  # S x [N, H]
    h_mask: Tensor | None  # [N, H]


def restored(layer: Layer, x: Tensor, save: str | None, kept: list[Tensor]) -> Given:
    """What was kept; with save="states", the rest computed again, all steps at once."""
    order, S = layer.order, len(layer.state)
    states = [s[: order.B + order.N] for s in kept[-S:]]
    prev = [order.states_before(s) for s in states]
    if layer.reset is not None:
        reset_state = [order.by_row(f) for f in layer.reset_state]
        prev = list(started_over(prev, layer.reset, reset_state))
    h_mask = None if layer.h_mask is None else order.by_row(layer.h_mask)
    if save == "gates":
        x_gates, *sums = [t[: order.N] for t in kept[:-S]]
        return Given(Stored(x_gates, sums, states), activated_of(layer), prev, h_mask)
    x_gates, sums, _ = memory_of(layer, x)
    enter(layer, x, x_gates)
    stored = Stored(x_gates, sums, states)
    Views(layer, stored, [order.N]).through(0, prev, h_mask, products=True)
    return Given(stored, None, prev, h_mask)


class Found(NamedTuple):
    """What the backward loop finds."""

    d_x_gates: list[Tensor]  # [N, G, units], in parts
    d_received: list[Tensor]  # of each stage with weights, [N, sums, units]
    factors: list[Tensor]  # what these multiplied, [N, K]
    d_params: list[Tensor]  # of each vector of the stages' own, [H]
    d_state: list[Tensor]  # S x [B, H]
    d_reset_state: list[Tensor]


class _Jacobian:
    """That of one stage, for a chunk of steps, and the place of the gradients that come of it.

    Its columns, of which a row has one number for each unit: what the stage received; the values
    before it, as far as its body hands them anything; the gates of the input, where their gradient
    is another; its own vectors; and what zoneout keeps, if the stage is not the only one.
    """

    def __init__(self, part, responses, zoneout: bool, alone: bool, N: int, sizes, like: Tensor):
        self.part = part
        self.values: range = range(len(responses[0][2]))
        self.inner: list[int] = [
            j for j in self.values
            if (zoneout and alone) or not all(_is_zero(r[2][j]) for r in responses)
        ]  # fmt: skip
        self.apart: list[int] = [
            i for i in range(len(part.stage.gates))
            if any(r[0][i] is not r[1][i] for r in responses)
        ]  # fmt: skip
        self.holds: int = len(responses) if zoneout and not alone else 0
        received, own = part.stage.products, len(part.params)
        # Where the columns of each kind end.
        self.ends: list[int] = [received, received + len(self.inner)]
        self.ends.append(self.ends[-1] + len(self.apart))
        self.ends.append(self.ends[-1] + own)
        shape = (N, self.ends[-1] + self.holds, part.units)
        self.gradients: Tensor = like.new_empty(shape)
        self.blocks = self.gradients.split_with_sizes(sizes)
        self.received = self.gradients.flatten(1)[:, : received * part.units].split_with_sizes(
            sizes
        )
        columns = self.gradients.split(1, 1)
        self.passed: list[Any] = [None for _ in self.values]
        for at, j in enumerate(self.inner):
            self.passed[j] = columns[received + at].split_with_sizes(sizes)
        self.held = [c.split_with_sizes(sizes) for c in columns[self.ends[-1] :]]
        self.first: int = 0
        self.at_home: int | None = None  # the unit whose part of the Jacobian lies in `gradients`
        self.others: list[tuple[int, Any]] = []  # and those of other units, where not 0

    def fill(self, responses, zoneout: list[Tensor], first: int, rows: slice, sizes) -> None:
        """Takes the `responses` of the body to each unit vector, for the steps from `first` on."""
        self.first, self.at_home, self.others = first, None, []
        shape = (rows.stop - rows.start, self.part.units)
        for k, (d_x, d_received, d_values, d_params) in enumerate(responses):
            inner = [d_values[j] for j in self.inner]
            columns = [*d_received, *inner, *(d_x[i] for i in self.apart), *d_params]
            if zoneout:
                keep = zoneout[k]
                columns = [c if _is_zero(c) else c * (1 - keep) for c in columns]
                if self.holds:
                    columns += [keep if s == k else keep.new_zeros(()) for s in range(self.holds)]
                else:
                    columns[self.ends[0] + k] = columns[self.ends[0] + k] + keep
            if all(_is_zero(c) for c in columns):
                continue
            columns = [c.expand(shape) for c in columns]
            if self.at_home is None:  # where it becomes the gradient: less memory to go through
                torch.stack(columns, 1, out=self.gradients[rows])
                self.at_home = k
            else:
                self.others.append((k, torch.stack(columns, 1).split_with_sizes(sizes)))

    def apply(self, t: int, d_new: Sequence[Any]) -> list[Any]:
        """The gradients of step t, from those of the values after the stage; returns those of the
        values before it by the pointwise path. Of a value [rows, 1, units], or None for 0."""
        out, at_home = self.blocks[t], self.at_home
        d = None if at_home is None else d_new[at_home]
        if d is None:
            out.zero_()
        else:
            out.mul_(d)
        for k, of_unit in self.others:
            if d_new[k] is not None:
                out.addcmul_(d_new[k], of_unit[t - self.first])
        return [None if p is None else p[t] for p in self.passed]

    def d_gates(self) -> list[Tensor]:
        """[N, gates, units]: of the input's part in the stage, in as many parts as lie apart."""
        at = list(range(len(self.part.stage.gates)))
        for place, i in enumerate(self.apart):
            at[i] = self.ends[1] + place
        begins = [i for i, column in enumerate(at) if i == 0 or column != at[i - 1] + 1]
        ends = [*begins[1:], len(at)]
        return [
            self.gradients[:, at[i] : at[i] + end - i] for i, end in zip(begins, ends, strict=True)
        ]


def _is_zero(column: Tensor) -> bool:
    """Whether a body has said nothing but 0, where it was given numbers and not tiles."""
    return column.dim() == 0 and not column.item()


def run_backward(
    layer: Layer, given: Given, d_output: Tensor, d_final: list[Tensor], clip: float
) -> Found:
    """The loop over all steps, from the last to the first."""
    order, B = layer.order, layer.order.B
    sizes, N = order.sizes, order.N
    offsets = [0, *itertools.accumulate(sizes)]
    width = d_final[0].shape[-1]
    # Row for row beside `stored.states`: the gradient of h.
    d_h = d_final[0].new_empty(B + N, width)
    d_h[:B] = 0
    d_h[B:] = d_output
    if order.last is None:
        d_h[N:] += d_final[0]
    else:
        d_h.index_add_(0, order.last, d_final[0])
    d_hs = d_h.unsqueeze(1).split_with_sizes([B, *sizes])
    targets = d_h.split_with_sizes([B, *sizes])
    last = [d.unsqueeze(1) for d in d_final[1:]]
    d_rest, rows_after = [d[:0] for d in last], 0
    d_reset_state = [torch.zeros_like(d) for d in d_final[: len(layer.reset_state)]]
    starts = None if layer.reset is None else layer.reset[:, None].split_with_sizes(sizes)
    per_row = is_by_row(layer.zoneout)
    jacobians: list[_Jacobian] = []
    factors: list[list[Tensor]] = [[] for _ in layer.parts]
    # A projection's Jacobian is its matrix, and what it receives is h.
    w_hr = layer.weights.w_hr
    parts = layer.parts if w_hr is None else layer.parts[:-1]
    w_hh = parts[0].weight
    if w_hh is None or w_hh.dim() != 2 or layer.h_mask is not None:
        w_hh = None  # what that product hands back is more than a matrix product added to d_h
    chunk = max(1, CHUNK // (B * max(part.units for part in parts)))
    for end in range(len(sizes), 0, -chunk) or (0,):  # without any step, too, for the shapes
        first = max(0, end - chunk)
        rows = slice(offsets[first], offsets[end])
        keep = [z[rows].to(d_h.dtype) if per_row else z for z in layer.zoneout]
        responses = _responses(layer, given, rows, factors)
        if not jacobians:
            jacobians = [
                _Jacobian(p, r, p is parts[-1] and bool(keep), len(parts) == 1, N, sizes, d_h)
                for p, r in zip(parts, responses, strict=True)
            ]
        for j, r in zip(jacobians, responses, strict=True):
            here = keep if j.part is parts[-1] else []
            j.fill(r, here, first, rows, sizes[first:end])
        for t in reversed(range(first, end)):
            size, d_new, before, target = sizes[t], d_hs[t + 1], d_hs[t], targets[t]
            if clip:
                d_new.clamp_(-clip, clip)
            if rows_after < size:  # rows that end here
                ends = slice(rows_after, size)
                d_rest = [torch.cat([d, f[ends]]) for d, f in zip(d_rest, last, strict=True)]
                rows_after = size
            if size < (sizes[t - 1] if t else B):
                before, target = before[:size], target[:size]
            if w_hr is not None:
                d_new = d_new @ w_hr
            values = _through(layer, jacobians, t, [d_new, *d_rest])
            if starts is not None and layer.resets[t]:
                values[0] = _plus(_of_factor(layer, jacobians[0], t), values[0])
                for into, d in zip(d_reset_state, values, strict=False):
                    into[:size] += d.masked_fill(~starts[t], 0).squeeze(1)
                for d in values:
                    d.masked_fill_(starts[t], 0)
            elif w_hh is not None:
                target.addmm_(jacobians[0].received[t], w_hh)
            else:
                before.add_(_of_factor(layer, jacobians[0], t))
            if values[0] is not None:
                before.add_(values[0])
            d_rest = values[1:]
    d_state = [d_h[:B]]
    for d, f in zip(d_rest, last, strict=True):
        d_state.append(torch.cat([d, f[rows_after:]]).squeeze(1))
    factor = given.prev[0] if given.h_mask is None else given.prev[0] * given.h_mask
    weighted = [j for j in jacobians if j.part.weight is not None]
    return Found(
        [d for j in jacobians if j.part.stage.gates for d in j.d_gates()],
        [
            *(j.gradients[:, : j.part.stage.products] for j in weighted),
            *([] if w_hr is None else [d_h[B:, None]]),
        ],
        [factor, *(torch.cat(f[::-1]) for f in factors[1:] if f)],
        [d for j in jacobians for d in j.gradients[:, j.ends[2] : j.ends[3]].sum(0)],
        d_state, d_reset_state,
    )  # fmt: skip


def _responses(
    layer: Layer, given: Given, rows: slice, factors: list[list[Tensor]]
) -> list[list[Any]]:
    """What the backward body of each stage says to each unit vector, for these rows; `factors` gets
    what the later stages multiplied."""
    stored, activated, B = given.stored, given.activated, layer.order.B
    x_gates, sums = stored.x_gates[rows], [s[rows] for s in stored.sums]
    prev = tuple([p[rows] for p in given.prev])
    if activated is not None:
        saved = activated.saved(x_gates, sums)
        new = tuple([s[B + rows.start : B + rows.stop] for s in stored.states])
        if layer.zoneout:
            new = activated.new(saved, prev, x_gates)
    else:
        views = Views(layer, Stored(x_gates, sums, []), [rows.stop - rows.start])
        h_mask = None if given.h_mask is None else given.h_mask[rows]
        new, multiplied, saved = views.through(0, prev, h_mask, products=False)
        for found, factor in zip(factors[1:], multiplied[1:], strict=True):
            found += [] if factor is None else [factor]
    one, zero = x_gates.new_ones(()), x_gates.new_zeros(())
    responses: list[list[Any]] = []
    count = len(prev)
    for part in reversed(layer.parts if layer.weights.w_hr is None else layer.parts[:-1]):
        units = range(count)
        body = with_zeros(part.stage.backward, _zero)
        vectors = [tuple([one if j == k else zero for j in units]) for k in units]
        responses.insert(0, [body(v, saved, prev, new, part.params) for v in vectors])
        count = len(responses[0][0][2])
    return responses


def _zero(like: Tensor) -> Tensor:
    """A number, so that it is seen where a body says nothing but 0."""
    return like.new_zeros(())


def _through(layer: Layer, jacobians: list[_Jacobian], t: int, d_new: list[Any]) -> list[Any]:
    """Step t, back to before its first product: the gradients of the states before the step by the
    pointwise path, from those of the states after it."""
    values = d_new
    for jacobian in reversed(jacobians[1:]):
        values = jacobian.apply(t, values)
        if jacobian.part.weight is None:
            received = jacobian.blocks[t].unbind(1)[: jacobian.part.stage.products]
            for j, d in enumerate(stages.means(received, layer.heads)):
                values[j] = _plus(d.unsqueeze(1), values[j])
        else:
            values[0] = _plus(_of_factor(layer, jacobian, t), values[0])
    values = jacobians[0].apply(t, values)
    if jacobians[-1].held:
        values = [_plus(k[t], d) for k, d in zip(jacobians[-1].held, values, strict=True)]
    if len(values) > 1:
        values[1:] = [
            torch.zeros_like(after) if d is None else d
            for d, after in zip(values[1:], d_new[1:], strict=True)
        ]
    return values


def _plus(d: Tensor, other: Tensor | None) -> Tensor:
    return d if other is None else d + other


def _of_factor(layer: Layer, jacobian: _Jacobian, t: int) -> Tensor:
    """[rows, 1, K]: the gradient, in step t, of the h that a stage multiplied and masked."""
    part, d = jacobian.part, jacobian.received[t]
    assert part.weight is not None
    if part.weight.dim() == 2:
        d = d.mm(part.weight)
    else:
        d = stages.d_factor(d.unflatten(1, (part.stage.products, -1)), part.weight)
    if layer.h_mask is not None and part.stage.gates:
        d = d * layer.h_mask[: len(d)]
    return d.unsqueeze(1)
