"""Triton kernels that measure one resource of a GPU each. CUDA only; see bench/limits.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.device import Device


@triton.jit
def read_kernel(
    x_ptr,  # [blocks * BLOCK]
    out_ptr,  # [programs * BLOCK]
    blocks,
    repeats,
    BLOCK: tl.constexpr,
):
    """Reads `repeats` blocks past L1, each program beginning elsewhere."""
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    block = program * 37 % blocks
    for _ in range(repeats):
        total += tl.load(x_ptr + block * BLOCK + offs, cache_modifier=".cg")
        block += 1
        block = tl.where(block == blocks, 0, block)
    tl.store(out_ptr + program * BLOCK + offs, total)


@triton.jit
def dot_kernel(
    h_ptr,  # [ROWS, K]
    w_ptr,  # [K, N]
    out_ptr,  # [programs, ROWS, N]
    repeats,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
):
    """+-h @ W, over and over, with W in shared memory: as a time loop reads it."""
    rows = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, K)
    n = tl.arange(0, N)[None, :]
    w = tl.load(w_ptr + k[:, None] * N + n)
    h = tl.load(h_ptr + rows * K + k[None, :])
    out_offs = tl.program_id(0) * ROWS * N + rows * N + n
    total = tl.zeros((ROWS, N), tl.float32)
    for _ in range(repeats):
        total = tl.dot(h, w, total)
        h = -h  # so that no product is the same as the last, and none can be left out
    tl.store(out_ptr + out_offs, total)


@triton.jit
def empty_kernel(x_ptr):
    pass


def _best(device: Device, call, repeats: int = 7) -> float:
    call()
    return min(device.time_calls([call] * repeats))


def l2_rate(device: Device, size: int = 16 << 20, block: int = 8192, repeats: int = 256) -> float:
    """Bytes/s of reads that hit L2 and miss L1, all multiprocessors together."""
    programs = 2 * torch.cuda.get_device_properties(device.torch).multi_processor_count
    x = torch.randint(1 << 20, (size // 4,), dtype=torch.int32, device=device.torch)
    out = torch.empty(programs * block, dtype=torch.int32, device=device.torch)

    def seconds(count: int) -> float:
        return _best(
            device,
            lambda: read_kernel[(programs,)](
                x_ptr=x, out_ptr=out, blocks=size // 4 // block, repeats=count, BLOCK=block,
                num_warps=16,
            ),
        )  # fmt: skip

    # A long run less a short one: launch and the first touch do not count.
    return programs * repeats * block * 4 / (seconds(2 * repeats) - seconds(repeats))


def shared_rate(device: Device, K: int = 512, N: int = 128, repeats: int = 2000) -> float:
    """Bytes/s at which the products of one multiprocessor read shared memory, 16 rows at a time.

    Every warp reads its own columns of W and all of h (seen in the compiled kernel for sm_90:
    96 ldmatrix of 512 bytes for each of 4 warps, 192 KiB a product at these sizes).
    """
    warps = 4
    programs = torch.cuda.get_device_properties(device.torch).multi_processor_count
    options = {"dtype": torch.bfloat16, "device": device.torch}
    h, w = torch.randn(16, K, **options), torch.randn(K, N, **options) / K
    out = torch.empty(programs, 16, N, device=device.torch)

    def seconds(count: int) -> float:
        return _best(
            device,
            lambda: dot_kernel[(programs,)](
                h_ptr=h, w_ptr=w, out_ptr=out, repeats=count, ROWS=16, K=K, N=N,
                num_warps=warps, num_stages=1,
            ),
        )  # fmt: skip

    moved = w.nbytes + warps * h.nbytes
    return repeats * moved / (seconds(2 * repeats) - seconds(repeats))


def launch_seconds(device: Device, count: int = 200) -> float:
    """From one launch to the next, of a kernel that does nothing, replayed from a graph."""
    x = torch.empty(1, device=device.torch)

    def several():
        for _ in range(count):
            empty_kernel[(1,)](x_ptr=x, num_warps=1)
        return (x,)

    return _best(device, device.graph(several)) / count


def shared_bytes(device: Device) -> int:
    """Of one program."""
    properties = torch.cuda.get_device_properties(device.torch)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))
