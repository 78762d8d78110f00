"""One step of the exchange, alone.

The kernel is the spread time loop without its matrix product. Every program owns BLOCK_H units,
and needs all H of them for its next step:

    h_t[b, j] = decay * mean_k h_{t-1}[b, k] + x_t[b, j]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import BLOCK, ROWS, lhs_operand


@triton.constexpr_function
def one_plane():
    return (1,)


BLOCK_H, SPLIT, AHEAD = 8, 8, 8


@triton.jit
def exchange_kernel(
    x_ptr,  # [T, B, H]
    h0_ptr,  # [B, H]
    output_ptr,  # [T, B, H]
    exchange,  # `sync.Exchange`
    T,
    B,
    H,
    decay,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,  # of 16 * SPLIT units, over all of H
    AHEAD: tl.constexpr,  # chunks that are read together
    SPLIT: tl.constexpr,  # groups of warps, each of which reads 16 units of every chunk
    PAIRWISE: tl.constexpr,
):
    DTYPE: tl.constexpr = exchange.ring.dtype.element_ty
    BLOCK_K: tl.constexpr = ROWS * SPLIT
    SLOT: tl.constexpr = ROWS * CHUNKS * BLOCK_K
    step_size = tl.full((), B, tl.int64) * H

    rows = tl.arange(0, ROWS)[:, None]  # within the group
    batch = tl.program_id(1) * ROWS + rows
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    own_mask = (batch < B) & (units < H)
    channel = sync.connect(exchange, units, PLANES=one_plane(), BLOCK_K=BLOCK_K)

    # Rows beyond the batch are exchanged too, and units beyond H, as zeros.
    h0 = tl.load(h0_ptr + batch * H + units, mask=own_mask, other=0.0)
    sync.publish(channel, (h0,), 1, T + 1, SLOT=SLOT, BLOCK_K=BLOCK_K)

    for t in range(T):
        x = tl.load(x_ptr + batch * H + units, mask=own_mask, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        slot_ptr = channel.ring + sync.slot(t + 1) * SLOT
        for first in tl.static_range(0, CHUNKS, AHEAD):
            lefts = sync.load(
                channel,
                slot_ptr + first * SPLIT * BLOCK,
                t + 1,
                sync.arrivals(t + 1, tl.num_programs(0)) if first == 0 else 0,
                COUNT=min(AHEAD, CHUNKS - first),
                STRIDE=SPLIT * BLOCK,
                WARPS=SPLIT,
                PAIRWISE=PAIRWISE,
            )
            for i in tl.static_range(min(AHEAD, CHUNKS - first)):
                left = lhs_operand(lefts[i], SPLIT=SPLIT).to(tl.float32)
                total += tl.sum(tl.sum(left, axis=2), axis=0)
        h = tl.where(own_mask, decay * (total / H)[:, None] + x, 0.0).to(DTYPE)
        sync.publish(channel, (h,), t + 2, T + 1, SLOT=SLOT, BLOCK_K=BLOCK_K)
        tl.store(output_ptr + batch * H + units, h, mask=own_mask)
        x_ptr += step_size
        output_ptr += step_size
    sync.report(channel)


def exchange(
    x: torch.Tensor,
    h0: torch.Tensor,
    decay: float = 0.5,
    *,
    split: int = SPLIT,
    ahead: int = AHEAD,
    pairwise: bool | None = None,
    spin_limit: int | None = None,
) -> torch.Tensor:
    """Runs the recurrence; x: [T, B, H], h0: [B, H], of one dtype; returns h: [T, B, H].

    Args:
        split: warps of a program, which reads 16 * split units of each row at once.
        ahead: how many such chunks are on their way together.
        pairwise: see `sync.assembly`; by default as the device can.
    Raises:
        RuntimeError: a wait timed out.
    """
    T, B, H = x.shape
    programs, groups = triton.cdiv(H, BLOCK_H), triton.cdiv(B, 16)
    chunks = triton.cdiv(H, 16 * split)
    if pairwise is None:
        pairwise = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    [space] = sync.workspaces(
        1,
        groups=groups,
        programs=programs,
        steps=T + 1,
        chunks=chunks,
        planes=(1,),
        block_b=16,
        block_h=BLOCK_H,
        block_k=16 * split,
        dtype=x.dtype,
        device=x.device,
    )
    output = torch.full_like(x, float("nan"))
    exchange_kernel[(programs, groups)](
        x_ptr=x,
        h0_ptr=h0,
        output_ptr=output,
        exchange=space if spin_limit is None else space._replace(spin_limit=spin_limit),
        T=T,
        B=B,
        H=H,
        decay=decay,
        BLOCK_H=BLOCK_H,
        CHUNKS=chunks,
        AHEAD=ahead,
        SPLIT=split,
        PAIRWISE=pairwise,
        num_warps=split,
        num_stages=1,
        launch_cooperative_grid=True,
    )
    sync.raise_if_timed_out(space.error)
    return output
