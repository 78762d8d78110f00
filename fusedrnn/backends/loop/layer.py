"""One direction of a layer as the loop takes it, and the way of a step through its stages."""

import functools
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.backends import stages
from fusedrnn.backends.loop.order import Order, order_of
from fusedrnn.backends.reference import compute_dtype, weights_in
from fusedrnn.call import (
    Masks,
    Operands,
    Spec,
    Weights,
    cell_of,
    heads_of,
    reverses,
    split_weights,
)
from fusedrnn.cells import Cell, Linear, Mean
from fusedrnn.packing import starts_of

Several = list[tuple[Tensor, ...]]  # of every time step, several tensors


class Part(NamedTuple):
    """A stage, and what the loop needs of it besides."""

    stage: Any
    weight: Tensor | None  # of a mean, None
    bias: Tensor | None  # None, too, where x_gates have it already
    params: tuple[Tensor, ...]
    adds: bool  # whether the product is added to x_gates, of which the body reads the sum alone
    gates: slice  # of the cell's
    units: int


class Layer(NamedTuple):
    """One direction of a layer: all that it has beside its input. Rows are in the loop's order."""

    cell: Cell
    heads: int
    dtype: torch.dtype  # in which h is stored
    weights: Weights
    parts: list[Part]
    order: Order
    state: list[Tensor]  # S x [B, H]
    reset: Tensor | None  # [N, 1] bool
    resets: list[bool]  # of each step, whether any row is reset
    reset_state: list[Tensor]
    h_mask: Tensor | None  # [B, H]
    zoneout: list[Tensor]  # S x [N, H] bool, where a state is kept; or S probabilities; or none
    in_place: bool  # whether a cell may leave in the place of its gates what backward reads


class Stored(NamedTuple):
    """What forward leaves behind of one direction, with room for all rows of the input."""

    x_gates: Tensor  # [N, G, H], with the product added, or as `Activated` leaves them
    sums: list[Tensor]  # of each stage that has its products apart, [N, sums, H]
    states: list[Tensor]  # S x [B + N, H]: the initial ones, and those after every step


def layer_of(spec: Spec, operands: Operands, masks: Masks, d: int) -> Layer:
    """Direction d of the only layer of `spec`."""
    cell, input, dtype = cell_of(spec), operands.input, operands.input.dtype
    wide = compute_dtype(dtype)
    weights = weights_in(wide, split_weights(spec, operands.weights)[d])
    way = reverses(spec)[d]
    order = order_of(spec, input, masks, reverse=way)
    state, reset_state = (
        [order.sorted(s[d]).to(wide) for s in states]
        for states in (operands.state, operands.reset_state)
    )
    noise, reset, resets = masks.of_layer(0), None, [False] * len(order.sizes)
    if masks.reset is not None:
        reset = masks.reset.T if spec.batch_first else masks.reset
        reset = starts_of(reset, masks.lengths, reverses(spec))[:, :, d]
        reset = order.rows_of(reset.T if spec.batch_first else reset)[:, None]
        last_rows = [end - 1 for end in itertools.accumulate(order.sizes)]
        counts = reset[:, 0].cumsum(0)[last_rows]  # up to the end of each step
        resets = (counts.diff(prepend=counts.new_zeros(1)) > 0).tolist()
    zoneout: list[Tensor] = []
    if noise.zoneout is not None and noise.zoneout.dim() == 1:
        zoneout = list(noise.zoneout.to(wide).unbind())
    elif noise.zoneout is not None:
        zoneout = list(order.rows_of(noise.zoneout.select(-3, d)).unbind(1))
    h_mask = None if noise.h is None else order.sorted(noise.h[d]).to(wide)
    in_place = dtype == wide and spec.save != "states"
    in_place = in_place and len(cell.stages) == 1 and weights.w_hh.dim() == 2
    return Layer(
        cell, heads_of(spec), dtype, weights, parts_of(cell, weights), order, state, reset,
        resets, reset_state, h_mask, zoneout, in_place,
    )  # fmt: skip


def parts_of(cell: Cell, weights: Weights) -> list[Part]:
    parts, first = [], 0
    products = stages.stage_weights(cell, weights)
    params = stages.shared_out(cell, "params", weights.params)
    H = weights.w_ih.shape[0] // len(cell.gates)
    for stage, (matrix, bias), own in zip(cell.stages, products, params, strict=True):
        weight = None if isinstance(stage.receives, Mean) else matrix
        adds = stage.additive and isinstance(stage.receives, Linear)
        units = H
        if weight is not None:
            rows = weight.numel() // (weight.shape[-1] if weight.dim() > 1 else 1)
            units = rows // stage.products
        gates = slice(first, first + len(stage.gates))
        parts.append(Part(stage, weight, None if adds else bias, own, adds, gates, units))
        first = gates.stop
    return parts


def memory_of(layer: Layer, input: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The memory of `Stored`."""
    total = input.numel() // input.shape[-1]
    wide = compute_dtype(layer.dtype)
    first = layer.parts[0]
    x_gates = torch.empty(
        total, len(layer.cell.gates), first.units, dtype=wide, device=input.device
    )
    sums = [
        torch.empty(total, part.stage.products, part.units, dtype=wide, device=input.device)
        for part in layer.parts
        if part.weight is not None and not part.adds
    ]
    states = [s.new_empty(layer.order.B + total, s.shape[-1]) for s in layer.state]
    return x_gates, sums, states


def enter(layer: Layer, x: Tensor, x_gates: Tensor) -> None:
    """Writes what the input has in the gates, with all biases that are merely added to it."""
    cell, weights, flat = layer.cell, layer.weights, x_gates.flatten(1)
    bias, of_hidden = weights.b_ih, weights.b_hh
    if bias is not None and of_hidden is not None:
        added = [part.gates for part in layer.parts if part.adds]
        if cell.additive:
            bias = bias + of_hidden
        elif added:
            bias, of_hidden = (b.view(len(cell.gates), -1) for b in (bias.clone(), of_hidden))
            for gates in added:
                bias[gates] += of_hidden[gates]
            bias = bias.flatten()
    if cell.input_norm is not None:
        flat.copy_(stages.input_gates(cell, x, weights._replace(b_ih=bias)))
    elif bias is None:
        torch.mm(x, weights.w_ih.t(), out=flat)
    else:
        torch.addmm(bias, x, weights.w_ih.t(), out=flat)


def is_by_row(zoneout: list[Tensor]) -> bool:
    return bool(zoneout) and zoneout[0].dim() > 0


def started_over(
    prev: Sequence[Tensor], starts: Tensor, reset_state: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The states before a step, where rows with `starts` begin anew."""
    if not reset_state:
        return tuple([p.masked_fill(starts, 0) for p in prev])
    return tuple([torch.where(starts, f, p) for f, p in zip(reset_state, prev, strict=True)])


def by_step(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Several:
    return list(zip(*(t.split_with_sizes(sizes) for t in tensors), strict=True))


def transposed_weight(part: Part) -> Tensor | None:
    return part.weight.t() if part.weight is not None and part.weight.dim() == 2 else None


def multiply(part: Part, transposed: Tensor | None, h: Tensor, into: Tensor) -> None:
    """Writes, or adds, the product of a stage: into [rows, sums * units], or [rows, sums, units]
    where its weights are no matrix."""
    if transposed is None:
        assert part.weight is not None
        sums = torch.stack(stages.product(h, part.weight, part.bias, part.stage.products), 1)
        into.add_(sums) if part.adds else into.copy_(sums)
    elif part.adds:
        into.addmm_(h, transposed)
    elif part.bias is None:
        torch.mm(h, transposed, out=into)
    else:
        torch.addmm(part.bias, h, transposed, out=into)


class _Sum:
    """x_gates[k] + received[k], where it is there already: stands for either in a body."""

    __slots__ = ("sum",)

    def __init__(self, sum: Tensor):
        self.sum = sum

    def __add__(self, other: "_Sum") -> Tensor:
        return self.sum


def _zeros(like: "Tensor | _Sum") -> Tensor:
    return torch.zeros_like(like.sum if isinstance(like, _Sum) else like)


@functools.cache
def with_zeros(body: Any, zeros_like: Callable[..., Tensor]) -> Any:
    """A body of a stage, in which `zeros_like` means that."""
    names = {**body.__globals__, "zeros_like": zeros_like}
    return FunctionType(body.__code__, names, None, body.__defaults__, body.__closure__)


class Views:
    """The gates and sums of a cell's stages, step by step, and the way through its bodies."""

    def __init__(self, layer: Layer, stored: Stored, sizes: Sequence[int]):
        self.layer = layer
        self.parts: list[tuple[Part, Tensor | None, Any, Any, Any]] = []
        given = iter(stored.sums)
        for part in layer.parts:
            own = stored.x_gates[:, part.gates]
            gates = by_step(own.unbind(1), sizes) if part.stage.gates else [()] * len(sizes)
            into, received, transposed = None, gates, transposed_weight(part)
            if part.adds:
                gates = received = [tuple(map(_Sum, step)) for step in gates]
            if part.weight is not None:
                sums = own if part.adds else next(given)
                into = (sums if transposed is None else sums.flatten(1)).split_with_sizes(sizes)
                received = received if part.adds else by_step(sums.unbind(1), sizes)
            self.parts.append((part, transposed, into, gates, received))

    def through(
        self, t: int, prev: Sequence[Tensor], h_mask: Tensor | None, *, products: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor | None], tuple[Tensor, ...]]:
        """The states after the step; what each stage multiplied; and all values that were saved.
        Without `products` the products are there already."""
        values, factors, saved, dtype = tuple(prev), [], (), self.layer.dtype
        for part, transposed, into, gates, received in self.parts:
            stage = part.stage
            given = values[: stage.exchanged]
            if factors and dtype != given[0].dtype:
                given = [v.to(dtype).to(v.dtype) for v in given]
            if part.weight is None:
                factors.append(None)
                sums = stages.means(given, self.layer.heads)
            else:
                factor = given[0] if h_mask is None or not stage.gates else given[0] * h_mask
                factors.append(factor)
                if products:
                    multiply(part, transposed, factor, into[t])
                sums = received[t]
            body = with_zeros(stage.forward, _zeros) if part.adds else stage.forward
            values, kept = body(gates[t], sums, values, part.params)
            saved += kept
        return values, factors, saved
