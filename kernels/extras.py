"""What a time loop may do to the states between steps: resets, zoneout, clipping.

Everything random was drawn before the launch. Tuples hold one tile [BLOCK_B, BLOCK_H] a state.
"""

import triton
import triton.language as tl

from fusedrnn.kernels.tiles import load_planes


@triton.jit
def load_flags(
    ptr,  # [N, D] int8
    rows,  # [BLOCK_B, 1]
    mask,  # [BLOCK_B, 1]
    direction,
    D: tl.constexpr,
):
    """[BLOCK_B, 1]: whether the flag of a row block is set."""
    return tl.load(ptr + rows * D + direction, mask=mask, other=0) != 0


@triton.jit
def start_over(state, fresh, begins):
    """The states, replaced by `fresh` (zeros if it is empty) where a sequence begins."""
    started = ()
    for i in tl.static_range(len(state)):
        if len(fresh) == 0:
            tile = tl.where(begins, 0.0, state[i])
        else:
            tile = tl.where(begins, fresh[i], state[i])
        started = started + (tile,)
    return started


@triton.jit
def keep_where(condition, tiles):
    """The tiles, 0 where the condition does not hold."""
    kept = ()
    for i in tl.static_range(len(tiles)):
        kept = kept + (tl.where(condition, tiles[i], 0.0),)
    return kept


@triton.jit
def add(left, right):
    """Two tuples, tile by tile."""
    sums = ()
    for i in tl.static_range(len(left)):
        sums = sums + (left[i] + right[i],)
    return sums


@triton.jit
def clamp(tile, bound):
    """The tile within [-bound, bound]; NaN, which fails both comparisons, stays NaN."""
    tile = tl.where(tile > bound, bound, tile)
    return tl.where(tile < -bound, -bound, tile)


@triton.jit
def zoneout_shares(
    ptr,  # [N, D, S, H] int8 where KIND is "drawn", [S] float32 where it is "expected"
    rows,  # [BLOCK_B, 1]
    own_h,  # [1, BLOCK_H]
    mask,  # [BLOCK_B, BLOCK_H]
    direction,
    D: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
):
    """The share of its previous value that every state keeps in this step: S tiles or scalars."""
    if KIND == "drawn":
        shares = ()
        drawn = load_planes(ptr, rows, own_h, mask, direction, D=D, PLANES=S, H=H)
        for i in tl.static_range(S):
            shares = shares + (drawn[i].to(tl.float32),)
    else:
        shares = ()
        for i in tl.static_range(S):
            shares = shares + (tl.load(ptr + i),)
    return shares


@triton.jit
def mix(shares, old, new):
    """share * old + (1 - share) * new, for every state; exactly one of them where share is 0 or
    1, whatever the other is."""
    mixed = ()
    for i in tl.static_range(len(new)):
        tile = new[i] + shares[i] * (old[i] - new[i])
        tile = tl.where(shares[i] == 1.0, old[i], tl.where(shares[i] == 0.0, new[i], tile))
        mixed = mixed + (tile,)
    return mixed


@triton.jit
def divide(shares, d_mixed):
    """The gradients of `mix`: those of `old`, and those of `new`."""
    d_old = ()
    d_new = ()
    for i in tl.static_range(len(d_mixed)):
        part = shares[i] * d_mixed[i]
        d_old = d_old + (part,)
        d_new = d_new + (d_mixed[i] - part,)
    return d_old, d_new
