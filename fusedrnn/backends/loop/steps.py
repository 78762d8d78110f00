"""The loop forward."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends.loop.layer import (
    Layer,
    Several,
    Stored,
    Views,
    by_step,
    enter,
    is_by_row,
    memory_of,
    multiply,
    started_over,
    transposed_weight,
)


def run_forward(layer: Layer, x: Tensor, input: Tensor) -> Stored:
    """The loop over all steps; x is [N, I]."""
    order = layer.order
    room = Stored(*memory_of(layer, input))
    here = Stored(
        room.x_gates[: order.N], [s[: order.N] for s in room.sums],
        [s[: order.B + order.N] for s in room.states],
    )  # fmt: skip
    enter(layer, x, here.x_gates)
    for states, initial in zip(here.states, layer.state, strict=True):
        states[: order.B] = initial
    blocks = list(
        zip(*(s.split_with_sizes([order.B, *order.sizes]) for s in here.states), strict=True)
    )
    step = _steps(layer, here, order.sizes)
    h_mask, low = layer.h_mask, layer.dtype != here.x_gates.dtype
    by_unit = is_by_row(layer.zoneout)
    kept = by_step(layer.zoneout, order.sizes) if by_unit else None
    starts = None if layer.reset is None else layer.reset.split_with_sizes(order.sizes)
    rows_before = order.B
    for t, size in enumerate(order.sizes):
        prev, new = blocks[t], blocks[t + 1]
        if size < rows_before:
            prev, rows_before = tuple([p[:size] for p in prev]), size
        if starts is not None and layer.resets[t]:
            prev = started_over(prev, starts[t], [f[:size] for f in layer.reset_state])
        step(t, prev, h_mask if h_mask is None else h_mask[:size], new)
        if layer.zoneout:
            for s, keep in enumerate(kept[t] if kept else layer.zoneout):
                if by_unit:  # a sum of both would make NaN of an infinity that is not kept
                    torch.where(keep, prev[s], new[s], out=new[s])
                else:
                    torch.lerp(new[s], prev[s], keep, out=new[s])
        if low:
            new[0].copy_(new[0].to(layer.dtype))
    return room


def _steps(layer: Layer, stored: Stored, sizes: Sequence[int]) -> Callable[..., None]:
    """What computes one step: (t, states before it, h_mask, where the new ones go)."""
    activated = activated_of(layer)
    if activated is None:
        stage_views = Views(layer, stored, sizes)

        def by_bodies(t, prev, h_mask, new) -> None:
            values, _, _ = stage_views.through(t, prev, h_mask, products=True)
            for target, value in zip(new, values, strict=True):
                target.copy_(value)

        return by_bodies
    (part,) = layer.parts
    into = (stored.x_gates if part.adds else stored.sums[0]).flatten(1).split_with_sizes(sizes)
    views, step = activated.views(stored.x_gates, stored.sums, sizes), activated.step
    transposed = transposed_weight(part)

    def in_place(t, prev, h_mask, new) -> None:
        multiply(part, transposed, prev[0] if h_mask is None else prev[0] * h_mask, into[t])
        step(views[t], prev, new)

    return in_place


class Activated(NamedTuple):
    """A step of a cell that leaves in the place of its gates what backward reads."""

    views: Callable[[Any, Any, Sequence[int]], Several]  # (x_gates, sums, sizes): of every step
    step: Callable[..., None]  # (views of a step, previous states, where the new ones go)
    saved: Callable[[Any, Any], tuple[Tensor, ...]]  # (x_gates, sums), as the cell's `saved`
    new: Callable[..., tuple[Any, ...]]  # (saved, previous states, x_gates): those before zoneout


def _lstm_views(x_gates: Tensor, sums: list[Tensor], sizes: Sequence[int]) -> Several:
    H = x_gates.shape[2]
    i_f, g, o = x_gates.flatten(1).split_with_sizes((2 * H, H, H), 1)
    return by_step((i_f, g, o, *i_f.split_with_sizes((H, H), 1)), sizes)


def _lstm_step(views, prev, out) -> None:
    i_f, g, o, i, f = views
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    c = torch.mul(f, prev[1], out=out[1]).addcmul_(i, g)
    torch.tanh(c, out=out[0]).mul_(o)


def _gru_views(x_gates: Tensor, sums: list[Tensor], sizes: Sequence[int]) -> Several:
    H = x_gates.shape[2]
    r_z, n = x_gates.flatten(1).split_with_sizes((2 * H, H), 1)
    of_h = sums[0].flatten(1).split_with_sizes((2 * H, H), 1)
    return by_step((r_z, n, *r_z.split_with_sizes((H, H), 1), *of_h), sizes)


def _gru_step(views, prev, out) -> None:
    r_z, n, r, z, h_r_z, h_n = views
    r_z.add_(h_r_z).sigmoid_()
    n.addcmul_(r, h_n).tanh_()
    torch.lerp(n, prev[0], z, out=out[0])


def _rnn_views(x_gates: Tensor, sums: list[Tensor], sizes: Sequence[int]) -> Several:
    return by_step((x_gates.flatten(1),), sizes)


def _rnn_step(views, prev, out) -> None:
    torch.tanh(views[0], out=out[0])


ACTIVATED = {
    "lstm": Activated(
        _lstm_views,
        _lstm_step,
        lambda x, sums: x.unbind(1),
        lambda saved, prev, x: (prev[0], saved[1] * prev[1] + saved[0] * saved[2]),
    ),
    "gru": Activated(
        _gru_views,
        _gru_step,
        lambda x, sums: (*x.unbind(1), sums[0][:, 2]),
        lambda saved, prev, x: prev,  # its backward reads no new state
    ),
    "rnn_tanh": Activated(
        _rnn_views,
        _rnn_step,
        lambda x, sums: (),
        lambda saved, prev, x: (x[:, 0].tanh(),),
    ),
}


def activated_of(layer: Layer) -> Activated | None:
    """How the gates of this layer are turned in place, or None where its bodies run."""
    return ACTIVATED.get(layer.cell.name) if layer.in_place else None
