"""How long programs need to tell each other something: one step of the exchange, alone.

The kernel is the spread time loop without its matrix product. Every program owns BLOCK_H units,
and needs all H of them for its next step:

    h_t[b, j] = decay * mean_k h_{t-1}[b, k] + x_t[b, j]

    python bench/roundtrip.py            # microseconds a step, protocol by number of programs
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

from fusedrnn.kernels import sync

BLOCK_B, BLOCK_H, CHUNK, NUM_WARPS = 16, 8, 128, 8
_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def exchange_kernel(
    x_ptr,  # [T, B, H]
    h0_ptr,  # [B, H]
    output_ptr,  # [T, B, H]
    ring_ptr,  # [groups, slots, BLOCK_B * H] words
    signal_ptr,  # [groups, signal_stride]
    error_ptr,  # [1]
    ring_stride,
    signal_stride,
    spin_limit,
    T,
    B,
    H,
    decay,
    DTYPE: tl.constexpr,
    PROTOCOL: tl.constexpr,
    FLAGS_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.program_id(1)
    n_programs = tl.num_programs(0)
    ring_ptr += group.to(tl.int64) * ring_stride
    signal_ptr += group * signal_stride
    slot_size = BLOCK_B * H
    step_size = tl.full((), B, tl.int64) * H

    rows = tl.arange(0, BLOCK_B)[:, None]  # within the group
    batch = group * BLOCK_B + rows
    units = program * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    own_mask = (batch < B) & (units < H)

    offs = ()  # of all units, in chunks
    masks = ()
    for k in tl.static_range(CHUNKS):
        others = k * CHUNK + tl.arange(0, CHUNK)[None, :]
        offs = offs + (rows * H + others,)
        masks = masks + ((batch < B) & (others < H),)

    h0 = tl.load(h0_ptr + batch * H + units, mask=own_mask, other=0.0)
    slot_ptr = ring_ptr + sync.slot(1, PROTOCOL) * slot_size
    alive = 1
    sync.store(slot_ptr, rows * H + units, h0, own_mask, 1, PROTOCOL)
    sync.arrive(signal_ptr, program, 1, alive, PROTOCOL)

    for t in range(T):
        alive = sync.wait(
            signal_ptr, t + 1, n_programs, error_ptr, spin_limit, alive, PROTOCOL, FLAGS_BLOCK
        )
        slot_ptr = ring_ptr + sync.slot(t + 1, PROTOCOL) * slot_size
        tiles, alive = sync.load(
            slot_ptr, offs, masks, t + 1, error_ptr, spin_limit, alive, DTYPE, PROTOCOL
        )
        total = tl.zeros((BLOCK_B,), tl.float32)
        for k in tl.static_range(CHUNKS):
            total += tl.sum(tiles[k].to(tl.float32), axis=1)
        mean = total / H + sync.poison(alive)
        x = tl.load(x_ptr + batch * H + units, mask=own_mask, other=0.0)
        h = (decay * mean[:, None] + x).to(DTYPE)

        slot_ptr = ring_ptr + sync.slot(t + 2, PROTOCOL) * slot_size
        sync.store(slot_ptr, rows * H + units, h, own_mask, t + 2, PROTOCOL)
        sync.arrive(signal_ptr, program, t + 2, alive, PROTOCOL)
        tl.store(output_ptr + batch * H + units, h, mask=own_mask)
        x_ptr += step_size
        output_ptr += step_size


def exchange(
    protocol: str,
    x: torch.Tensor,
    h0: torch.Tensor,
    decay: float = 0.5,
    *,
    block_b: int = BLOCK_B,
    block_h: int = BLOCK_H,
    chunk: int = CHUNK,
    spin_limit: int | None = None,
) -> torch.Tensor:
    """Runs the recurrence; x: [T, B, H], h0: [B, H], of one dtype; returns h: [T, B, H].

    Raises:
        RuntimeError: a wait timed out.
    """
    T, B, H = x.shape
    programs, groups = triton.cdiv(H, block_h), triton.cdiv(B, block_b)
    space = sync.workspace(
        protocol,
        groups=groups,
        programs=programs,
        steps=T + 1,
        slot_size=block_b * H,
        dtype=x.dtype,
        device=x.device,
        num_warps=NUM_WARPS,
    )
    output = torch.full_like(x, float("nan"))
    exchange_kernel[(programs, groups)](
        x_ptr=x,
        h0_ptr=h0,
        output_ptr=output,
        ring_ptr=space.ring,
        signal_ptr=space.signal,
        error_ptr=space.error,
        ring_stride=space.ring_stride,
        signal_stride=space.signal_stride,
        spin_limit=sync.spin_limit(x.device) if spin_limit is None else spin_limit,
        T=T,
        B=B,
        H=H,
        decay=decay,
        DTYPE=_TL_DTYPE[x.dtype],
        PROTOCOL=protocol,
        FLAGS_BLOCK=space.flags_block,
        BLOCK_B=block_b,
        BLOCK_H=block_h,
        CHUNK=chunk,
        CHUNKS=triton.cdiv(H, chunk),
        num_warps=NUM_WARPS,
        num_stages=1,
        launch_cooperative_grid=True,
    )
    sync.raise_if_timed_out(space.error)
    return output


def roundtrip(
    protocol: str,
    programs: int,
    device: torch.device | str = "cuda",
    steps: int = 2000,
    *,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 5,
) -> float:
    """Microseconds per step of `programs` programs that exchange BLOCK_H units each.

    The difference between a long and a short run, so that launch and clearing do not count.

    Raises:
        ValueError: no CUDA device, or more programs than it has multiprocessors.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    available = torch.cuda.get_device_properties(device).multi_processor_count
    if not 1 <= programs <= available:
        raise ValueError(f"programs must be 1 to {available} on {device}, got {programs}")

    def seconds(n: int) -> float:
        x = torch.randn(n, BLOCK_B, programs * BLOCK_H, dtype=dtype, device=device)
        h0 = torch.zeros_like(x[0])
        exchange(protocol, x, h0)  # compiles
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            exchange(protocol, x, h0)
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    return (seconds(2 * steps) - seconds(steps)) / steps * 1e6


if __name__ == "__main__":
    counts = (1, 2, 4, 8, 16, 32, 64, 96, 128)
    print("programs", *counts, sep="\t")
    for name in sync.PROTOCOLS:
        print(name, *(f"{roundtrip(name, n):.2f}" for n in counts), sep="\t")
