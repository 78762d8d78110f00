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
    first,
    offs_h,  # [BLOCK_H] this program's units
    BACKWARD: tl.constexpr,  # whether a program's units are those of the previous step
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The G right operands of each of COUNT chunks, 0 beyond H."""
    weights = ()
    for i in tl.static_range(COUNT):
        k = units_of_chunk(first + i, BLOCK_K=BLOCK_K, SPLIT=SPLIT)
        if SPLIT == 1:
            k = k[:, None]
            h = offs_h[None, :]
        else:
            k = k[:, :, None]
            h = offs_h[None, None, :]
        if BACKWARD:
            offs = k * H + h
        else:
            offs = h * H + k
        mask = (k < H) & (h < H)
        for g in tl.static_range(G):
            weights = weights + (tl.load(w_hh_ptr + g * H * H + offs, mask=mask, other=0.0),)
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
    totals = sums
    if SPLIT > 1:
        # In pairs: the groups of warps meet half as often.
        totals = ()
        for i in tl.static_range(0, len(sums) - 1, 2):
            left, right = tl.split(tl.sum(tl.join(sums[i], sums[i + 1]), axis=0))
            totals = totals + (left, right)
        if len(sums) % 2 == 1:
            totals = totals + (tl.sum(sums[len(sums) - 1], axis=0),)
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
    AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """The product with what all programs of the group hold; returns it and `alive`."""
    PLANES: tl.constexpr = G if BACKWARD else 1
    sums = zero_sums(G // PLANES, BLOCK_B, BLOCK_H, SPLIT=SPLIT)
    for first in tl.static_range(0, RESIDENT, AHEAD):
        sums, alive = multiply_chunks(
            slot_ptr,
            first,
            weights[first * G : (first + AHEAD) * G],
            sums,
            step,
            error_ptr,
            spin_limit,
            alive,
            G=G,
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
        for streamed in tl.range(RESIDENT, CHUNKS, AHEAD, num_stages=1):
            sums, alive = multiply_chunks(
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
                    COUNT=AHEAD,
                    SPLIT=SPLIT,
                ),
                sums,
                step,
                error_ptr,
                spin_limit,
                alive,
                G=G,
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
def multiply_chunks(
    slot_ptr,  # [BLOCK_B, PLANES, H]
    first,
    weights,  # of so many chunks: G each
    sums,
    step,
    error_ptr,
    spin_limit,
    alive,
    G: tl.constexpr,
    PLANES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Adds chunks of K to the sums. All their left operands are read from the ring before
    the first is used: one trip to L2, which is far longer than the products."""
    COUNT: tl.constexpr = len(weights) // G
    offs_b = tl.arange(0, BLOCK_B)
    offs = ()
    masks = ()
    for i in tl.static_range(COUNT):
        k = units_of_chunk(first + i, BLOCK_K=BLOCK_K, SPLIT=SPLIT)
        if SPLIT == 1:
            b = offs_b[:, None]
            k = k[None, :]
        else:
            b = offs_b[None, :, None]
            k = k[:, None, :]
        for plane in tl.static_range(PLANES):
            offs = offs + (b * (PLANES * H) + (plane * H + k),)
            # Every row exists in the ring, also those beyond the batch.
            masks = masks + (k < H,)
    lefts, alive = sync.load(
        slot_ptr, offs, masks, step, error_ptr, spin_limit, alive, weights[0].dtype, PROTOCOL
    )
    for i in tl.static_range(COUNT):
        for plane in tl.static_range(PLANES):
            left = lefts[i * PLANES + plane]
            sums = multiply(left, weights, sums, FIRST=i * G + plane, PRECISION=PRECISION)
    return sums, alive


@triton.jit
def units_of_chunk(chunk, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """The units along K of a chunk: [BLOCK_K], or [SPLIT, BLOCK_K // SPLIT]."""
    if SPLIT == 1:
        units = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        # Not a reshape of the line above, of which the compiler would not see that neighbours
        # are neighbours in memory: it would read them one by one.
        PART: tl.constexpr = BLOCK_K // SPLIT
        groups = chunk * BLOCK_K + tl.arange(0, SPLIT) * PART
        units = groups[:, None] + tl.arange(0, PART)[None, :]
    return units
