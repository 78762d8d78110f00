"""Operands of the recurrent product in the order in which tensor cores take them.

A tensor-core instruction multiplies 16 rows of the batch by 16 units of K (8 with float32), and
every lane of a warp supplies four 32-bit registers of the left operand: two groups of rows, `r`,
and two groups of units, `i`. Lane 4 * g + t holds rows g and g + 8. Which units of K a lane holds
is free, as long as both operands agree. So they are dealt out such that a lane finds all it needs
side by side in memory:

    16 bit   unit = 4 * t + 2 * i + e          e: the two halves of a register
    32 bit   unit = 8 * j + 2 * t + i          j: two instructions for 16 units

A *block* is 16 rows by 16 units of the left operand in this order, 256 elements: lane by lane, in
a lane (i, r, e), or for each j lane by lane of (i, r). A lane reads its registers with one load of
16 bytes (two with 32 bit), neighbouring lanes read neighbouring bytes, and what arrives goes
into the instruction without a detour through shared memory. A row of W has a lane's units of
the right operand side by side by itself.

With SPLIT groups of warps, each multiplies its own blocks, and their sums are added at the end of
the step. Tiles in this order have shape [lanes, elements of 16 or 8 bytes]; two axes, because the
compiler then gives every thread a row, whatever its version.

(mma.sync.m16n8k16 and .m16n8k8: PTX ISA, "Matrix Fragments".)
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # of a block, and units
BLOCK = tl.constexpr(256)  # elements of a block
LANES = tl.constexpr(32)


@triton.constexpr_function
def pitch(K):
    """Elements from one row of W to the next: a multiple of 16 bytes."""
    return -(-K // 8) * 8


@triton.jit
def offset_in_block(row, unit, WIDE: tl.constexpr):
    """Where a block holds (row, unit), both below 16. WIDE: elements of 32 bits."""
    if WIDE:
        j = unit // 8
        t = unit % 8 // 2
        i = unit % 2
        offset = j * (BLOCK // 2) + (row % 8 * 4 + t) * 4 + i * 2 + row // 8
    else:
        t = unit // 4
        i = unit // 2 % 2
        e = unit % 2
        offset = (row % 8 * 4 + t) * 8 + i * 4 + row // 8 * 2 + e
    return offset


@triton.jit
def offset_in_slot(
    rows, units, BLOCK_K: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Where a slot of the ring holds (row, unit) of the first plane; the next lies 16 * BLOCK_K
    further.

    A slot is [chunks, PLANES, BLOCK_K // 16] blocks.
    """
    block = units // BLOCK_K * (PLANES * BLOCK_K // ROWS) + units % BLOCK_K // ROWS
    return block * BLOCK + offset_in_block(rows, units % ROWS, WIDE)


@triton.jit
def vectors(SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a chunk's vectors of 16 bytes from its first block.

    [SPLIT * 32, 8], or [2 * SPLIT * 32, 4]: a thread of SPLIT warps holds one row, or two.
    """
    LENGTH: tl.constexpr = 4 if WIDE else 8
    index = tl.arange(0, (BLOCK // (LANES * LENGTH)) * SPLIT * LANES)[:, None]
    group = index // LANES % SPLIT
    vector = index // (LANES * SPLIT)
    offset = group * BLOCK + vector * (BLOCK // 2) + index % LANES * LENGTH
    return offset + tl.arange(0, LENGTH)[None, :]


@triton.jit
def lhs_operand(tile, SPLIT: tl.constexpr):
    """[SPLIT, 16, 16], rows by units, of what was read from `vectors`."""
    if tile.dtype.primitive_bitwidth == 32:
        tile = tl.reshape(tile, (2, SPLIT, 8, 4, 2, 2))  # j s g t i r
        tile = tl.permute(tile, (1, 5, 2, 0, 4, 3))  # s (r g) (j i t)
    else:
        tile = tl.reshape(tile, (SPLIT, 8, 4, 2, 2, 2))  # s g t i r e
        tile = tl.permute(tile, (0, 4, 1, 3, 2, 5))  # s (r g) (i t e)
    return tl.reshape(tile, (SPLIT, ROWS, ROWS))


@triton.jit
def load_rhs_operand(w_ptr, first_k, first_unit, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """[SPLIT, 16, BLOCK_H]: units of K by the program's units, 0 beyond, of [units, pitch]."""
    WIDE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 32
    BLOCK_H: tl.constexpr = PLAN.block_h
    SPLIT: tl.constexpr = PLAN.split_k
    EACH: tl.constexpr = 2 if WIDE else 1
    LENGTH: tl.constexpr = 2 if WIDE else 4
    N: tl.constexpr = BLOCK_H // 8
    index = tl.arange(0, EACH * N * SPLIT * LANES)[:, None]
    lane = index % LANES
    group = index // LANES % SPLIT
    n = index // (LANES * SPLIT) % N
    j = index // (LANES * SPLIT * N)
    unit = first_unit + n * 8 + lane // 4
    k = first_k + group * ROWS + j * 8 + lane % 4 * LENGTH + tl.arange(0, LENGTH)[None, :]
    PITCH: tl.constexpr = pitch(STAGE.k)
    mask = (k < PITCH) & (unit < STAGE.units)
    tile = tl.load(w_ptr + unit * PITCH + k, mask=mask, other=0.0)
    if WIDE:
        tile = tl.reshape(tile, (2, N, SPLIT, 8, 4, 2))  # j n s g t i
        tile = tl.permute(tile, (2, 0, 5, 4, 1, 3))  # s (j i t) (n g)
    else:
        tile = tl.reshape(tile, (N, SPLIT, 8, 4, 2, 2))  # n s g t i e
        tile = tl.permute(tile, (1, 4, 3, 5, 0, 2))  # s (i t e) (n g)
    return tl.reshape(tile, (SPLIT, ROWS, BLOCK_H))
