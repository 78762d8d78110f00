"""What the stages of a cell share out among them, and their products in torch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn.call import Weights
from fusedrnn.cells import Cell, Dense, Mean, Projection


def shared_out(cell: Cell, attribute: str, parts: Sequence[Any]) -> list[tuple[Any, ...]]:
    """`parts`, one for each of the cell's "gates", "saved" or "params", by stage."""
    shares, first = [], 0
    for stage in cell.stages:
        count = len(getattr(stage, attribute))
        shares.append(tuple(parts[first : first + count]))
        first += count
    return shares


def stage_weights(cell: Cell, weights: Weights) -> list[tuple[Tensor, Tensor | None]]:
    """W and b of every stage's product: rows of weight_hh (in every head; or its elements, where it
    is diagonal) and of bias_hh, or matrices of its own. Of a mean, weight_hh."""
    if len(cell.stages) == 1:
        return [(weights.w_hh, weights.b_hh)]
    found, first, dense = [], 0, iter(weights.dense)
    for stage in cell.stages:
        if isinstance(stage.receives, Mean):
            found.append((weights.w_hh, None))
            continue
        if isinstance(stage.receives, Dense):
            found.append(next(dense))
            continue
        if isinstance(stage.receives, Projection):
            assert weights.w_hr is not None
            found.append((weights.w_hr, None))
            continue
        gates = slice(first, first + len(stage.gates))
        axis = 0 if cell.diagonal else -2
        part = weights.w_hh.unflatten(axis, (len(cell.gates), -1))
        part = part[gates].flatten() if cell.diagonal else part[..., gates, :, :].flatten(-3, -2)
        bias = weights.b_hh
        if bias is not None:
            units = len(bias) // len(cell.gates)
            bias = bias[first * units : (first + len(stage.gates)) * units]
        found.append((part, bias))
        first += len(stage.gates)
    return found


def means(values: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """The mean of each of `values` [*, H] over the units of a head, at all of them."""
    parts = [v.unflatten(-1, (heads, -1)) for v in values]
    return tuple([p.mean(-1, keepdim=True).expand_as(p).flatten(-2) for p in parts])


def product(h: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> tuple[Tensor, ...]:
    """The `count` sums [*, units] that a stage receives, of h [*, K] with W: [count * units, K];
    [heads, count * units / heads, K / heads], whose heads see their own part of h alone; or
    [count * units], whose units see themselves alone."""
    if weight.dim() == 1:
        sums = h.unsqueeze(-2) * weight.view(count, -1)
        return (sums if bias is None else sums + bias.view(count, -1)).unbind(-2)
    if weight.dim() == 2:
        return F.linear(h, weight, bias).chunk(count, dim=-1)
    blocks = weight.unflatten(1, (count, -1))
    sums = torch.einsum("...hk,hguk->...ghu", h.unflatten(-1, (len(weight), -1)), blocks)
    sums = sums.flatten(-2)
    if bias is not None:
        sums = sums + bias.view(count, -1)
    return sums.unbind(-2)


def d_factor(d_sums: Tensor, weight: Tensor) -> Tensor:
    """The gradient of h [*, K], from that of the sums [*, count, units] that `product` gives."""
    if weight.dim() == 1:
        return (d_sums * weight.view(d_sums.shape[-2:])).sum(-2)
    if weight.dim() == 2:
        return d_sums.flatten(-2) @ weight
    blocks = weight.unflatten(1, (d_sums.shape[-2], -1))
    d_sums = d_sums.unflatten(-1, (len(weight), -1))
    return torch.einsum("...ghu,hguk->...hk", d_sums, blocks).flatten(-2)


def d_parameters(
    cell: Cell,
    input: Tensor,
    d_sums: Sequence[Tensor],
    d_norm: Tensor | None,
    dx_gates: Sequence[Tensor],
    d_received: Sequence[Tensor],
    factors: Sequence[Tensor],
    d_vectors: Sequence[Tensor],
    *,
    heads: int,
    bias: bool,
) -> list[Tensor]:
    """The gradients of the parameters of one layer and direction, in their order, each by one
    product of all steps.

    Args:
        input: [N, I]. d_norm: of `input_norm`'s scale.
        d_sums: of W_ih x, [N, G * H]. dx_gates: [N, G, H]. Both in parts of some gates each.
        d_received: of the sums of each stage with weights, [N, sums, units].
        factors: what these stages multiplied, [N, K].
        d_vectors: of the vectors of the stages' own, [H].
    """
    pairs = list(zip(cell.weighted, d_received, factors, strict=True))
    of_gates = [(d, factor) for stage, d, factor in pairs if stage.gates]
    if cell.diagonal:
        parts = [d_bias(d * factor[:, None]).flatten() for d, factor in of_gates]
    else:
        parts = [_d_matrix(d, factor, heads) for d, factor in of_gates]
    gradients = [_joined([d.T @ input for d in d_sums]), _joined(parts, dim=-2)]
    if bias:
        d_b_ih = _joined([d_bias(d).flatten() for d in dx_gates])
        shared = cell.additive or cell.input_norm is not None
        d_b_hh = d_b_ih.clone() if shared else torch.cat([d_bias(d) for d, _ in of_gates]).flatten()
        gradients += [d_b_ih, d_b_hh]
    gradients += [
        d[:, 0].T @ factor for stage, d, factor in pairs if isinstance(stage.receives, Projection)
    ]
    gradients += [] if d_norm is None else [d_norm]
    vectors = iter(d_vectors)
    for own in cell.own[d_norm is not None :]:
        gradients.append(torch.cat([next(vectors) for _ in range(own.vectors)]).to(input.dtype))
    for stage, d, factor in pairs:
        if isinstance(stage.receives, Dense):
            gradients += [_d_matrix(d[:, k : k + 1], factor, heads) for k in range(d.shape[1])]
            gradients += [d_bias(d[:, k]) for k in range(len(stage.receives.biases) * bias)]
    return gradients


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _d_matrix(d_sums: Tensor, factor: Tensor, heads: int) -> Tensor:
    """The gradient of matrices, one under the other in every head, from that of the sums [N, sums,
    units] and what they multiplied [N, K]."""
    if heads == 1:
        return d_sums.flatten(1).T @ factor
    d_sums = d_sums.unflatten(-1, (heads, -1)).permute(2, 1, 3, 0)  # head, sum, unit, N
    return d_sums.flatten(1, 2) @ factor.unflatten(-1, (heads, -1)).transpose(0, 1)


def d_bias(d_sums: Tensor) -> Tensor:
    """The sum over the rows of [N, *]. At least in float32: N is large, and a sum of low precision
    would stop growing."""
    wide = torch.promote_types(d_sums.dtype, torch.float32)
    return d_sums.sum(0, dtype=wide).to(d_sums.dtype)


def input_gates(cell: Cell, input: Tensor, weights: Weights) -> Tensor:
    """What the input has in all gates, [*, G * H], with its bias, from [*, I]."""
    if cell.input_norm is None:
        return F.linear(input, weights.w_ih, weights.b_ih)
    assert weights.w_norm is not None
    sums = F.linear(input, weights.w_ih)
    return F.layer_norm(sums, sums.shape[-1:], weights.w_norm, weights.b_ih, cell.input_norm.eps)


def input_norm_backward(
    cell: Cell, d_x_gates: Tensor, input: Tensor, weights: Sequence[Weights]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of W_ih x [N, D, G * H], and of `w_norm` of each direction, from that of what
    `input_gates` made of it. W_ih x is computed again: it is as large as all gates."""
    assert cell.input_norm is not None
    d_sums, d_norms = [], []
    for d, w in enumerate(weights):
        sums = F.linear(input, w.w_ih)
        shape, eps = [sums.shape[-1]], cell.input_norm.eps
        _, mean, rstd = torch.native_layer_norm(sums, shape, w.w_norm, None, eps)
        d_sum, d_norm, _ = torch.ops.aten.native_layer_norm_backward(
            d_x_gates[:, d].contiguous(), sums, shape, mean, rstd, w.w_norm, None,
            [True, True, False],
        )  # fmt: skip
        d_sums.append(d_sum)
        d_norms.append(d_norm)
    return torch.stack(d_sums, dim=1), d_norms
