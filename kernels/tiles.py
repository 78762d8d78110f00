"""What both time loops do with tiles: address rows, load, store, choose.

All tensors of a sequence are contiguous over rows, [N, D, planes, H]; a row is one time step of
one element of the batch. Only the row of (t, b) depends on the layout:

    time first   t * B + b            both as t * stride_t + b * stride_b
    batch first  b * T + t
    packed       offsets[t] + b       rows of ended sequences do not exist

A tile of a row block is [BLOCK_B, BLOCK_H]. Offsets are int64: N * D * G * H passes 2**31.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedrnn.kernels.with_gluon import wgmma


class Tile(NamedTuple):
    """The part of a layer that one program computes, at every step.

    A *lane* is a head of a direction: lanes have weights and a group of programs of their own.
    """

    direction: Any
    reverse: Any  # 1 where time runs from the last step to the first, else 0
    head: Any
    first_unit: Any  # of the head
    head_units: Any  # [1, BLOCK_H], of the head
    units: Any  # [1, BLOCK_H], of all heads
    batch: Any  # [BLOCK_B]
    length: Any  # [BLOCK_B, 1]: steps of each row
    unit_mask: Any  # [1, BLOCK_H]: units that there are
    batch_mask: Any  # [BLOCK_B, 1]: below B
    mask: Any  # of both
    state_offsets: Any  # [BLOCK_B, BLOCK_H], into [D, B, H]


@triton.jit
def program_tile(
    T, B, first_b, first_lane, reverse, lengths_ptr,
    H: tl.constexpr, HEADS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The tile of this program. The launch covers the batch and the lanes from `first_b` and
    `first_lane` on. reverse: 1 where the first direction runs backwards in time, as the second
    always does. lengths_ptr: [B], or None."""
    lane = first_lane + tl.program_id(2)
    direction = lane // HEADS
    head = lane % HEADS
    first_unit = tl.program_id(0) * PLAN.block_h
    if PLAN.warp_groups:
        head_units = first_unit + wgmma.along_units(PLAN)
        row = wgmma.along_batch(PLAN)
    else:
        head_units = first_unit + tl.arange(0, PLAN.block_h)
        row = tl.arange(0, PLAN.block_b)
    if PLAN.exchanged:
        head_units = hide_contiguity(head_units)
    head_units = head_units[None, :]
    units = head * (H // HEADS) + head_units
    batch = first_b + tl.program_id(1) * PLAN.block_b + row
    # A tile in any case: of a tile and a comparison of scalars, Triton 3.9's interpreter makes no
    # mask.
    length = T + (batch & 0)[:, None]
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch, mask=batch < B, other=0).to(tl.int32)[:, None]
    unit_mask = head_units < H // HEADS
    batch_mask = (batch < B)[:, None]
    state_offsets = (direction * tl.cast(B, tl.int64) + batch[:, None]) * H + units
    mask = batch_mask & unit_mask
    return Tile(
        direction, direction + reverse, head, first_unit, head_units, units, batch, length,
        unit_mask, batch_mask, mask, state_offsets,
    )  # fmt: skip


@triton.jit
def narrowed(tile, B, WIDTH: tl.constexpr, H: tl.constexpr):
    """The tile, of a layer whose H units are projected to WIDTH."""
    if WIDTH != H:
        unit_mask = tile.head_units < WIDTH
        mask = tile.batch_mask & unit_mask
        rows = tile.direction * tl.cast(B, tl.int64) + tile.batch[:, None]
        tile = Tile(
            tile.direction, tile.reverse, tile.head, tile.first_unit, tile.head_units, tile.units,
            tile.batch, tile.length, unit_mask, tile.batch_mask, mask, rows * WIDTH + tile.units,
        )  # fmt: skip
    return tile


@triton.jit
def hide_contiguity(offs):
    """The same offsets, of which the compiler does not know that they are neighbours.

    Loads of two elements at once are taken apart right behind the load, and so waited for, however
    much later they are needed.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [offs], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def row_of(t, tile, offsets_ptr, stride_t, stride_b):
    """Rows of step t: [BLOCK_B, 1] int64; offsets_ptr: [T] int64, or None."""
    if offsets_ptr is None:
        rows = tl.cast(stride_t, tl.int64) * t + tl.cast(stride_b, tl.int64) * tile.batch
    else:
        rows = tl.load(offsets_ptr + t) + tile.batch
    return rows[:, None]


@triton.jit
def load_planes(
    ptr, rows, tile, mask, D: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """The PLANES tiles of a row block of [N, D, PLANES, H], in its dtype, 0 where masked."""
    base = ptr + ((rows * D + tile.direction) * PLANES * H + tile.units)
    tiles = ()
    for plane in tl.static_range(PLANES):
        tiles = tiles + (tl.load(base + plane * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_planes(ptr, tiles, rows, tile, active, mask, D: tl.constexpr, H: tl.constexpr):
    """Stores a row block's tiles into [N, D, len(tiles), H], rounded to its dtype: 0 in rows that
    the sequence has not reached (`active`), nothing where there is none (`mask`)."""
    base = ptr + ((rows * D + tile.direction) * len(tiles) * H + tile.units)
    for plane in tl.static_range(len(tiles)):
        value = tl.where(active, tiles[plane], 0.0)
        tl.store(base + plane * H, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def of_direction(ptrs, tile):
    """Of D pointers that of the tile's direction."""
    ptr = ptrs[0]
    if len(ptrs) == 2:
        ptr = tl.where(tile.direction == 0, ptrs[0], ptrs[1])
    return ptr


@triton.jit
def load_vectors(ptrs, tile, PLANES: tl.constexpr, H: tl.constexpr):
    """PLANES tiles [1, BLOCK_H] in float32; ptrs: [PLANES, H] of each direction."""
    base = of_direction(ptrs, tile) + tile.units
    tiles = ()
    for plane in tl.static_range(PLANES):
        vector = tl.load(base + plane * H, mask=tile.unit_mask, other=0.0)
        tiles = tiles + (vector.to(tl.float32),)
    return tiles


@triton.jit
def load_params(param_ptrs, tile, H: tl.constexpr):
    """The P parameters of a cell, as `load_vectors`; param_ptrs: P x D x [H]."""
    params = ()
    for i in tl.static_range(len(param_ptrs)):
        params = params + load_vectors(param_ptrs[i], tile, PLANES=1, H=H)
    return params


@triton.jit
def load_states(ptrs, h_tile, tile):
    """A tile of each state, h of [D, B, P] and the others of [D, B, H], in float32, 0 where
    masked."""
    states = ()
    for i in tl.static_range(len(ptrs)):
        part = h_tile if i == 0 else tile
        state = tl.load(ptrs[i] + part.state_offsets, mask=part.mask, other=0.0)
        states = states + (state.to(tl.float32),)
    return states


@triton.jit
def store_states(ptrs, states, h_tile, tile):
    """Stores a tile into each state, as `load_states` has them, rounded to its dtype."""
    for i in tl.static_range(len(ptrs)):
        part = h_tile if i == 0 else tile
        rounded = states[i].to(ptrs[i].dtype.element_ty)
        tl.store(ptrs[i] + part.state_offsets, rounded, mask=part.mask)


@triton.jit
def as_float32(tiles):
    """The tiles, as the body of a cell wants them."""
    wide = ()
    for i in tl.static_range(len(tiles)):
        wide = wide + (tiles[i].to(tl.float32),)
    return wide


@triton.jit
def where(condition, x, y):
    """`tl.where`, for two tuples of tiles."""
    chosen = ()
    for i in tl.static_range(len(x)):
        chosen = chosen + (tl.where(condition, x[i], y[i]),)
    return chosen


@triton.jit
def add(x, y):
    """Two tuples, tile by tile."""
    sums = ()
    for i in tl.static_range(len(x)):
        sums = sums + (x[i] + y[i],)
    return sums


@triton.jit
def zeros(COUNT: tl.constexpr, DTYPE: tl.constexpr, tile):
    """COUNT tiles [BLOCK_B, BLOCK_H] of zeros."""
    # Not tl.zeros, of which Gluon would have to know the layout.
    nothing = ((tile.batch & 0)[:, None] + (tile.units & 0)).to(DTYPE)
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (nothing,)
    return tiles
