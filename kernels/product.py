"""The recurrent product of one step, forward and backward.

    forward   sums[g] = h @ W_hh[g]^T          one left operand, G results
    backward  sums[0] = sum_g dh_g @ W_hh[g]   G left operands, one result

The left operands are PLANES tiles of [BLOCK_B, H]; the result is summed over K in chunks of
BLOCK_K = 16 * SPLIT. Each of SPLIT groups of warps sums 16 units of every chunk by itself, as a
batched product [SPLIT, BLOCK_B, 16] @ [SPLIT, 16, BLOCK_H], and their sums are added once, at the
end of the step. Every chunk has G right operands: those of the RESIDENT first chunks were loaded
before the time loop and stay in registers, those of the others are read in each step, past
nothing: L1 keeps as many as it can.

W has K innermost in both passes: backward, each gate's matrix was transposed before the launch.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import (
    BLOCK,
    LANES,
    ROWS,
    left_operand,
    load_right_operand,
)


@triton.jit
def load_weights(
    w_ptr,  # [G, H, PITCH] of one direction: gate, own unit, unit of K
    first,  # chunk
    own_first,  # the program's first unit
    COUNT: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The G right operands of each of COUNT chunks, 0 beyond H."""
    WIDE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 32
    weights = ()
    for i in tl.static_range(COUNT):
        unit = (first + i) * (ROWS * SPLIT)
        for g in tl.static_range(G):
            tile = load_right_operand(
                w_ptr + g * H * PITCH,
                unit,
                own_first,
                H=H,
                PITCH=PITCH,
                BLOCK_H=BLOCK_H,
                SPLIT=SPLIT,
                WIDE=WIDE,
            )
            weights = weights + (tile,)
    return weights


@triton.jit
def load_all_weights(
    w_ptr,  # [G, H, PITCH]
    offs,  # [BLOCK_H]
    G: tl.constexpr,
    H: tl.constexpr,
    PITCH: tl.constexpr,
):
    """G tiles [BLOCK_H, BLOCK_H]: units of K by own units, for a program that owns them all."""
    weights = ()
    mask = (offs[:, None] < H) & (offs[None, :] < H)
    for g in tl.static_range(G):
        offs_g = g * H * PITCH + offs[None, :] * PITCH + offs[:, None]
        weights = weights + (tl.load(w_ptr + offs_g, mask=mask, other=0.0),)
    return weights


@triton.jit
def multiply(
    left,  # [BLOCK_B, K], or split
    weights,  # right operands; those from FIRST on belong to `sums`
    sums,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[i] + left @ weights[FIRST + i], for all i.

    PRECISION, of float32, is "tf32" or "ieee". Tensor cores know only the first, which has 11 bits.
    So for the second each factor is taken apart, and three products are added: of the upper parts,
    and of each with the other's rest. That loses at most 5 * 2^-22 of every product: of both rests
    what is beyond 11 bits, and the product of the two.
    """
    EXACT: tl.constexpr = PRECISION == "ieee" and left.dtype == tl.float32
    if EXACT:
        whole = left
        left, left_rest = take_apart(whole)
        left_rest = tl.where(whole == left, 0.0, left_rest)  # h may be infinite, weights may not
    totals = ()
    for i in tl.static_range(len(sums)):
        right = weights[FIRST + i]
        total = sums[i]
        if EXACT:
            right, right_rest = take_apart(right)
            total = tl.dot(left_rest, right, total, input_precision="tf32")
            total = tl.dot(left, right_rest, total, input_precision="tf32")
        totals = totals + (tl.dot(left, right, total, input_precision="tf32"),)
    return totals


@triton.jit
def take_apart(x):
    """float32 rounded to 11 bits, as tensor cores take them, and what that leaves."""
    upper = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return upper, x - upper


@triton.jit
def as_new(weights):
    """The same values, but the compiler does not know it. The parts of weights would else be kept
    from step to step, in registers that there are not."""
    renewed = ()
    for i in tl.static_range(len(weights)):
        tile = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [weights[i]], dtype=tl.float32, is_pure=False, pack=1
        )
        renewed = renewed + (tile,)
    return renewed


@triton.jit
def own_product(
    lefts,  # PLANES tiles [BLOCK_B, BLOCK_H]: of all units
    weights,  # G
    G: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product where one program owns all units, and K is a single chunk of BLOCK_H."""
    sums = ()
    for _ in tl.static_range(G // len(lefts)):
        sums = sums + (tl.zeros([lefts[0].shape[0], lefts[0].shape[1]], tl.float32),)
    for plane in tl.static_range(len(lefts)):
        sums = multiply(lefts[plane], weights, sums, FIRST=plane, PRECISION=PRECISION)
    return sums


@triton.jit
def recurrent_product(
    own,  # PLANES tiles [BLOCK_B, BLOCK_H] unless EXCHANGED: one program owns all units
    ring_ptr,  # of the group
    signal_ptr,
    at,
    anchor,
    weights,
    w_ptr,
    own_first,
    step,
    spin_limit,
    SLOT: tl.constexpr,  # elements
    G: tl.constexpr,
    PLANES: tl.constexpr,
    H: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCHANGED: tl.constexpr,
    PAIRWISE: tl.constexpr,
):
    """The product with what a batch tile's units were at `step`; NaN after a time-out."""
    if EXCHANGED:
        sums = exchanged_product(
            ring_ptr + sync.slot(step) * SLOT,
            at,
            anchor,
            weights,
            w_ptr,
            own_first,
            step,
            signal_ptr,
            spin_limit,
            G=G,
            PLANES=PLANES,
            H=H,
            PITCH=PITCH,
            BLOCK_B=BLOCK_B,
            BLOCK_H=BLOCK_H,
            CHUNKS=CHUNKS,
            RESIDENT=RESIDENT,
            AHEAD=AHEAD,
            SPLIT=SPLIT,
            PRECISION=PRECISION,
            PAIRWISE=PAIRWISE,
        )
    else:
        sums = own_product(own, weights, G=G, PRECISION=PRECISION)
    return sums


@triton.jit
def exchanged_product(
    slot_ptr,  # what the group publishes as `step`, see `fragments.offset_in_slot`
    at,  # `fragments.vectors`
    anchor,  # see `sync.load`
    weights,  # RESIDENT * G
    w_ptr,  # [G, H, PITCH] of this direction, for the chunks that are not resident
    own_first,
    step,
    signal_ptr,
    spin_limit,
    G: tl.constexpr,
    PLANES: tl.constexpr,
    H: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRWISE: tl.constexpr,
):
    """The product with what all programs of the group hold."""
    sums = ()
    for _ in tl.static_range(G // PLANES):
        sums = sums + (tl.zeros([SPLIT, BLOCK_B, BLOCK_H], tl.float32),)
    coming = ()
    if RESIDENT < CHUNKS:
        coming = load_weights(
            w_ptr, RESIDENT, own_first, COUNT=1, G=G, H=H, PITCH=PITCH, BLOCK_H=BLOCK_H, SPLIT=SPLIT
        )
    for first in tl.static_range(0, CHUNKS, AHEAD):
        # The left operands of all these chunks are on their way before the first is looked at:
        # one trip to L2, which is far longer than the products.
        lefts = sync.load(
            slot_ptr + first * PLANES * SPLIT * BLOCK,
            at,
            anchor,
            step,
            sync.arrivals(step, tl.num_programs(0)) if first == 0 else 0,
            signal_ptr,
            spin_limit,
            COUNT=min(AHEAD, CHUNKS - first) * PLANES,
            VECTORS=at.numel // at.shape[1] // (SPLIT * LANES),
            STRIDE=SPLIT * BLOCK,
            PAIRWISE=PAIRWISE,
        )
        for chunk in tl.static_range(first, min(first + AHEAD, CHUNKS)):
            right = weights[chunk * G : (chunk + 1) * G]
            if PRECISION == "ieee" and w_ptr.dtype.element_ty == tl.float32:
                right = as_new(right)
            if chunk >= RESIDENT:
                right = coming
                if chunk + 1 < CHUNKS:  # is on its way while this one is multiplied
                    coming = load_weights(
                        w_ptr,
                        chunk + 1,
                        own_first,
                        COUNT=1,
                        G=G,
                        H=H,
                        PITCH=PITCH,
                        BLOCK_H=BLOCK_H,
                        SPLIT=SPLIT,
                    )
            for plane in tl.static_range(PLANES):
                left = left_operand(lefts[(chunk - first) * PLANES + plane], SPLIT=SPLIT)
                sums = multiply(left, right, sums, FIRST=plane, PRECISION=PRECISION)
    return add_up(sums, SPLIT=SPLIT)


@triton.constexpr_function
def halvings(n):
    """How often n, a power of two, can be halved."""
    return n.bit_length() - 1


@triton.jit
def add_up(sums, SPLIT: tl.constexpr):
    """The finished sums, [BLOCK_B, BLOCK_H] each.

    The groups of warps hand each other their sums through shared memory: of up to four gates
    at a time, so that they meet once for all of them.
    """
    totals = ()
    COUNT: tl.constexpr = len(sums)
    for i in tl.static_range(0, COUNT - COUNT % 4, 4):
        joined = tl.join(tl.join(sums[i], sums[i + 1]), tl.join(sums[i + 2], sums[i + 3]))
        left, right = tl.split(fold(joined))
        first, second = tl.split(left)
        third, fourth = tl.split(right)
        totals = totals + (first, second, third, fourth)
    FIRST: tl.constexpr = COUNT - COUNT % 4
    if COUNT % 4 >= 2:
        first, second = tl.split(fold(tl.join(sums[FIRST], sums[FIRST + 1])))
        totals = totals + (first, second)
    if COUNT % 2 == 1:
        totals = totals + (fold(sums[COUNT - 1]),)
    return totals


@triton.jit
def fold(x):
    """The sum over the first axis.

    Not tl.sum, which sends partial sums through shared memory in a layout with bank conflicts:
    here the axis comes to lie within each thread, in one change of layout.
    """
    SPLIT: tl.constexpr = x.shape[0]
    COUNT: tl.constexpr = x.numel // SPLIT
    y = tl.trans(tl.reshape(x, (SPLIT, COUNT)))
    for i in tl.static_range(halvings(SPLIT) - 1):
        left, right = tl.split(tl.reshape(y, (COUNT, SPLIT >> (i + 1), 2)))
        y = left + right
    if SPLIT > 1:
        left, right = tl.split(y)
        y = left + right
    return tl.reshape(y, x.shape[1:])
