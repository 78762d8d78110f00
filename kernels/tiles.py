"""What both time loops do with tiles: address rows, load, store, choose.

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
def one_by_one(offs):
    """The same offsets, of which the compiler does not know that they are neighbours.

    Loads of two elements at once are taken apart right behind the load, and so waited for, however
    much later they are needed.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [offs], dtype=tl.int32, is_pure=True, pack=1
    )


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
def load_each(
    ptrs,  # S x [D, B, H], or ()
    offs,  # [BLOCK_B, BLOCK_H]
    mask,
):
    """Their tiles in float32, 0 where masked."""
    tiles = ()
    for i in tl.static_range(len(ptrs)):
        tiles = tiles + (tl.load(ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32),)
    return tiles


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
