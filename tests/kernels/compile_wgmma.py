"""Compiles products of warp groups ahead of time, and prints their PTX as JSON.

Run in a process of its own: triton either interprets or compiles.

    python compile_wgmma.py CASE ...        see CASES
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from compiled_launch import Driver
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

M, N, K, PIECE = 64, 32, 256, 128
# Type, bytes of a swizzled row, whether the left factor comes from registers.
CASES = {
    "fp16": (torch.float16, 128, True),
    "bf16": (torch.bfloat16, 128, True),
    "tf32": (torch.float32, 128, True),
    "fp16, 64 bytes": (torch.float16, 64, True),
    "fp16, 32 bytes": (torch.float16, 32, True),
    "bf16, both from shared memory": (torch.bfloat16, 128, False),
}


@gluon.jit
def multiply(
    left, right, result,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, PIECE: gl.constexpr,
    SUMS: gl.constexpr, LEFT: gl.constexpr, SHARED: gl.constexpr, FROM_REGISTERS: gl.constexpr,
):  # fmt: skip
    """result[M, N] = left[M, K] @ right[N, K]^T, all pieces of K through the same shared memory."""
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = gl.arange(0, N, layout=gl.SliceLayout(1, LOADED))[:, None]
    column = gl.arange(0, PIECE, layout=gl.SliceLayout(0, LOADED))[None, :]
    m = gl.arange(0, M, layout=gl.SliceLayout(1, LEFT))[:, None]
    k = gl.arange(0, PIECE, layout=gl.SliceLayout(0, LEFT))[None, :]
    kept = gl.allocate_shared_memory(right.dtype.element_ty, [N, PIECE], SHARED)
    if not FROM_REGISTERS:
        kept_left = gl.allocate_shared_memory(left.dtype.element_ty, [M, PIECE], SHARED)
    sums = gl.zeros([M, N], gl.float32, SUMS)
    for piece in gl.static_range(K // PIECE):
        a = gl.load(left + m * K + piece * PIECE + k)
        kept.store(gl.load(right + row * K + piece * PIECE + column))
        if not FROM_REGISTERS:
            kept_left.store(a)
            a = kept_left
        hopper.fence_async_shared()
        under_way = hopper.warpgroup_mma(a, kept.permute([1, 0]), sums, is_async=True)
        sums = hopper.warpgroup_mma_wait(0, deps=[under_way])
    m = gl.arange(0, M, layout=gl.SliceLayout(1, SUMS))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, SUMS))[None, :]
    gl.store(result + m * N + n, sums)


def compiled(dtype: torch.dtype, swizzle: int, from_registers: bool) -> dict[str, Any]:
    bits = dtype.itemsize * 8
    # The two warp groups have half of the columns each.
    sums = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 256 // bits])
    left = gl.DotOperandLayout(0, sums, 32 // bits)
    kernel = multiply.warmup(
        torch.empty(M, K, dtype=dtype),
        torch.empty(N, K, dtype=dtype),
        torch.empty(M, N),
        M, N, K, PIECE, sums,
        left if from_registers else gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]),
        gl.NVMMASharedLayout(swizzle, bits, rank=2),
        from_registers,
        grid=(1,),
        num_warps=8,
    )  # fmt: skip
    return {"ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared, "shape": (M, N, K)}


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver((9, 0)))
    json.dump({name: compiled(*CASES[name]) for name in sys.argv[1:]}, sys.stdout)
