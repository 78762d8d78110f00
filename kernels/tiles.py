"""What both time loops do with tiles: address rows, load, store, multiply.

All tensors of a sequence are contiguous over rows, [N, D, planes, H]; a row is one time step of
one element of the batch. Only the row of (t, b) depends on the layout:

    time first   t * B + b            both as t * stride_t + b * stride_b
    batch first  b * T + t
    packed       offsets[t] + b       rows of ended sequences do not exist

A tile of a row block is [BLOCK_B, BLOCK_H]. Offsets are int64: N * D * G * H passes 2**31.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(
    t,
    offs_b,  # [BLOCK_B]
    offsets_ptr,  # [T] int64, or None
    stride_t,
    stride_b,
):
    """Rows of step t: [BLOCK_B, 1] int64."""
    if offsets_ptr is None:
        rows = tl.cast(stride_t, tl.int64) * t + tl.cast(stride_b, tl.int64) * offs_b
    else:
        rows = tl.load(offsets_ptr + t) + offs_b
    return rows[:, None]


@triton.jit
def load_planes(
    ptr,  # [N, D, PLANES, H]
    rows,  # [BLOCK_B, 1]
    offs_h,  # [1, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    direction,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    H: tl.constexpr,
):
    """The PLANES tiles of a row block, in their own dtype, 0 where masked."""
    base = ptr + ((rows * D + direction) * PLANES * H + offs_h)
    tiles = ()
    for plane in tl.static_range(PLANES):
        tiles = tiles + (tl.load(base + plane * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_planes(
    ptr,  # [N, D, len(tiles), H]
    tiles,
    rows,  # [BLOCK_B, 1]
    offs_h,  # [1, BLOCK_H]
    active,  # [BLOCK_B, 1]: rows that the sequence has reached; the others receive 0
    mask,  # [BLOCK_B, BLOCK_H]: what exists
    direction,
    D: tl.constexpr,
    H: tl.constexpr,
):
    """Stores a row block's tiles, rounded to the dtype of `ptr`."""
    base = ptr + ((rows * D + direction) * len(tiles) * H + offs_h)
    for plane in tl.static_range(len(tiles)):
        tile = tl.where(active, tiles[plane], 0.0)
        tl.store(base + plane * H, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def as_float32(tiles):
    """The tiles, as the body of a cell wants them."""
    wide = ()
    for i in tl.static_range(len(tiles)):
        wide = wide + (tiles[i].to(tl.float32),)
    return wide


@triton.jit
def select(condition, ours, theirs):
    """`where`, for two tuples of tiles."""
    chosen = ()
    for i in tl.static_range(len(ours)):
        chosen = chosen + (tl.where(condition, ours[i], theirs[i]),)
    return chosen


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr):
    """COUNT float32 accumulators for `multiply`."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        if SPLIT == 1:
            tiles = tiles + (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
        else:
            tiles = tiles + (tl.zeros([SPLIT, BLOCK_B, BLOCK_H], tl.float32),)
    return tiles


# A product sums over K in chunks of BLOCK_K. With SPLIT > 1, each of SPLIT groups of warps sums a
# part of the chunk by itself, as a batched product [SPLIT, BLOCK_B, BLOCK_K / SPLIT] @ [SPLIT,
# BLOCK_K / SPLIT, BLOCK_H], and the partial sums are added once, at the end of the step. Without
# it every warp would compute the same 16 x 16 outputs.


@triton.jit
def left_tile(
    offs_b,  # [BLOCK_B]
    offs_k,  # [BLOCK_K]
    SPLIT: tl.constexpr,
):
    """Row and column of every element of a left operand; the two broadcast together."""
    if SPLIT == 1:
        rows = offs_b[:, None]
        columns = offs_k[None, :]
    else:
        rows = offs_b[None, :, None]
        columns = tl.reshape(offs_k, [SPLIT, 1, offs_k.shape[0] // SPLIT])
    return rows, columns


@triton.jit
def load_weight(
    ptr,  # the gate's [K, H] or [H, K], by the strides
    offs_k,  # [BLOCK_K]
    offs_h,  # [BLOCK_H]
    stride_k,
    stride_h,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A right operand: rows offs_k, columns offs_h, 0 beyond H."""
    if SPLIT == 1:
        rows = offs_k[:, None]
        columns = offs_h[None, :]
    else:
        rows = tl.reshape(offs_k, [SPLIT, offs_k.shape[0] // SPLIT, 1])
        columns = offs_h[None, None, :]
    mask = (rows < H) & (columns < H)
    return tl.load(ptr + (rows * stride_k + columns * stride_h), mask=mask, other=0.0)


@triton.jit
def multiply(
    left,  # [BLOCK_B, BLOCK_K], or split
    weights,  # a tuple; those from FIRST on are the right operands of `sums`
    sums,  # accumulators from `zeros`
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
def add_up(total, SPLIT: tl.constexpr):
    """The product, from an accumulator of `multiply`: [BLOCK_B, BLOCK_H]."""
    if SPLIT > 1:
        total = tl.sum(total, axis=0)
    return total
