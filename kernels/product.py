"""The recurrent product of one step, forward and backward.

    forward   sums[g] = h @ W_hh[g]^T          one left operand, G results
    backward  sums[0] = sum_g dh_g @ W_hh[g]   G left operands, one result

The left operands are PLANES tiles of [BLOCK_B, H]; the result is summed over K in chunks of
BLOCK_K. Every chunk has G right operands [BLOCK_K, BLOCK_H]: those of the RESIDENT first chunks
were loaded before the time loop and stay on the chip, those of the others are read in each step.

With SPLIT > 1, each of SPLIT groups of warps sums a part of every chunk by itself, as a batched
product [SPLIT, BLOCK_B, BLOCK_K / SPLIT] @ [SPLIT, BLOCK_K / SPLIT, BLOCK_H], and their sums are
added once, at the end of the step. Without it, all warps would compute the same few outputs.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync


@triton.jit
def load_weights(
    w_hh_ptr,  # [G, H, H] of one direction: gate, unit, unit of the previous step
    chunk,
    offs_h,  # [BLOCK_H] this program's units
    BACKWARD: tl.constexpr,  # whether a program's units are those of the previous step
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The G right operands of a chunk, 0 beyond H."""
    offs_k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    if SPLIT == 1:
        k = offs_k[:, None]
        h = offs_h[None, :]
    else:
        k = tl.reshape(offs_k, [SPLIT, BLOCK_K // SPLIT, 1])
        h = offs_h[None, None, :]
    if BACKWARD:
        offs = k * H + h
    else:
        offs = h * H + k
    mask = (k < H) & (h < H)
    weights = ()
    for g in tl.static_range(G):
        weights = weights + (tl.load(w_hh_ptr + g * H * H + offs, mask=mask, other=0.0),)
    return weights


@triton.jit
def load_resident_weights(
    w_hh_ptr,  # [G, H, H] of one direction
    offs_h,  # [BLOCK_H]
    BACKWARD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The right operands of the RESIDENT first chunks."""
    weights = ()
    for chunk in tl.static_range(RESIDENT):
        weights = weights + load_weights(
            w_hh_ptr, chunk, offs_h, BACKWARD=BACKWARD, G=G, H=H, BLOCK_K=BLOCK_K, SPLIT=SPLIT
        )
    return weights


@triton.jit
def zero_sums(
    COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr
):
    """COUNT accumulators."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if SPLIT == 1:
            sums = sums + (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
        else:
            sums = sums + (tl.zeros([SPLIT, BLOCK_B, BLOCK_H], tl.float32),)
    return sums


@triton.jit
def multiply(
    left,  # [BLOCK_B, BLOCK_K], or split
    weights,  # right operands; those from FIRST on belong to `sums`
    sums,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[i] + left @ weights[FIRST + i], for all i."""
    totals = ()
    for i in tl.static_range(len(sums)):
        total = tl.dot(left, weights[FIRST + i], sums[i], input_precision=PRECISION)
        totals = totals + (total,)
    return totals


@triton.jit
def add_up(sums, SPLIT: tl.constexpr):
    """The finished sums, [BLOCK_B, BLOCK_H] each."""
    totals = ()
    for i in tl.static_range(len(sums)):
        if SPLIT == 1:
            totals = totals + (sums[i],)
        else:
            totals = totals + (tl.sum(sums[i], axis=0),)
    return totals


@triton.jit
def own_product(
    lefts,  # PLANES tiles [BLOCK_B, BLOCK_H]: of all units
    weights,  # G
    G: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product where one program owns all units, and K is a single chunk of BLOCK_H."""
    sums = zero_sums(G // len(lefts), lefts[0].shape[0], lefts[0].shape[1], SPLIT=1)
    for plane in tl.static_range(len(lefts)):
        sums = multiply(lefts[plane], weights, sums, FIRST=plane, PRECISION=PRECISION)
    return sums


@triton.jit
def exchanged_product(
    slot_ptr,  # [BLOCK_B, PLANES, H]: what the group has published as `step`
    weights,  # RESIDENT * G
    w_hh_ptr,  # [G, H, H] of this direction, for the chunks that are not resident
    offs_h,  # [BLOCK_H]
    step,
    error_ptr,
    spin_limit,
    alive,
    BACKWARD: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """The product with what all programs of the group hold; returns it and `alive`."""
    PLANES: tl.constexpr = G if BACKWARD else 1
    sums = zero_sums(G // PLANES, BLOCK_B, BLOCK_H, SPLIT=SPLIT)
    for chunk in tl.static_range(RESIDENT):
        sums, alive = multiply_chunk(
            slot_ptr,
            chunk,
            weights[chunk * G : chunk * G + G],
            sums,
            step,
            error_ptr,
            spin_limit,
            alive,
            PLANES=PLANES,
            H=H,
            BLOCK_B=BLOCK_B,
            BLOCK_K=BLOCK_K,
            SPLIT=SPLIT,
            PRECISION=PRECISION,
            PROTOCOL=PROTOCOL,
        )
    if RESIDENT < CHUNKS:
        # Not pipelined: that would turn the reads of the ring into asynchronous copies, which go
        # through L1 where a thread reads less than 16 bytes, and may find what was there before.
        for streamed in tl.range(RESIDENT, CHUNKS, num_stages=1):
            sums, alive = multiply_chunk(
                slot_ptr,
                streamed,
                load_weights(
                    w_hh_ptr,
                    streamed,
                    offs_h,
                    BACKWARD=BACKWARD,
                    G=G,
                    H=H,
                    BLOCK_K=BLOCK_K,
                    SPLIT=SPLIT,
                ),
                sums,
                step,
                error_ptr,
                spin_limit,
                alive,
                PLANES=PLANES,
                H=H,
                BLOCK_B=BLOCK_B,
                BLOCK_K=BLOCK_K,
                SPLIT=SPLIT,
                PRECISION=PRECISION,
                PROTOCOL=PROTOCOL,
            )
    return add_up(sums, SPLIT=SPLIT), alive


@triton.jit
def multiply_chunk(
    slot_ptr,  # [BLOCK_B, PLANES, H]
    chunk,
    weights,  # G
    sums,
    step,
    error_ptr,
    spin_limit,
    alive,
    PLANES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Adds one chunk of K to the sums, reading its left operands from the ring."""
    offs_b = tl.arange(0, BLOCK_B)
    offs_k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    if SPLIT == 1:
        b = offs_b[:, None]
        k = offs_k[None, :]
    else:
        b = offs_b[None, :, None]
        k = tl.reshape(offs_k, [SPLIT, 1, BLOCK_K // SPLIT])
    for plane in tl.static_range(PLANES):
        left, alive = sync.load(
            slot_ptr,
            b * (PLANES * H) + (plane * H + k),
            k < H,  # every row exists in the ring, also those beyond the batch
            step,
            error_ptr,
            spin_limit,
            alive,
            weights[0].dtype,
            PROTOCOL,
        )
        sums = multiply(left, weights, sums, FIRST=plane, PRECISION=PRECISION)
    return sums, alive
