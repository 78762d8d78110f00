"""What a time loop may do to the states between steps: resets, masks, zoneout, clipping.

Everything random was drawn before the launch. Tuples hold one tile [BLOCK_B, BLOCK_H] a state.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedrnn.kernels.tiles import as_float32, load_planes, load_states


class StateOps(NamedTuple):
    """The tensors and the number for that, as a kernel takes them; see `fusedrnn.regularizers`.

    Attributes:
        reset: [N, D] int8, not 0 where a state starts over before the step, in the direction's
            own order of time.
        reset_state: what it starts from: S tensors [D, B, H], or () for zeros.
        h_mask: [D, B, H], multiplies what W_hh multiplies.
        zoneout: [N, D, S, H] int8, 1 where a unit keeps its state; or [S] float32, the share of
            its previous value that every state keeps.
        clip: bound of the gradient of every h_t.
    """

    reset: Any = None
    reset_state: Any = ()
    h_mask: Any = None
    zoneout: Any = None
    clip: Any = None


@triton.jit
def load_begins(ops, rows, mask, tile, D: tl.constexpr):
    """[BLOCK_B, 1]: whether a sequence begins with the step of these rows."""
    return tl.load(ops.reset + rows * D + tile.direction, mask=mask, other=0) != 0


@triton.jit
def start_over(state, reset_state, begins):
    """The states, replaced by `reset_state` (zeros if it is empty) where a sequence begins."""
    started = ()
    for i in tl.static_range(len(state)):
        if len(reset_state) == 0:
            value = tl.where(begins, 0.0, state[i])
        else:
            value = tl.where(begins, reset_state[i], state[i])
        started = started + (value,)
    return started


@triton.jit
def load_h_mask(ops, h_tile):
    """(one tile,), or () where h is not masked."""
    h_mask = ()
    if ops.h_mask is not None:
        h_mask = load_states((ops.h_mask,), h_tile, h_tile)
    return h_mask


@triton.jit
def masked(x, h_mask):
    """What W_hh multiplies, or the gradient behind the product."""
    for i in tl.static_range(len(h_mask)):
        x *= h_mask[i]
    return x


@triton.jit
def clamp(x, bound):
    """x within [-bound, bound]; NaN, which fails both comparisons, stays NaN."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def load_shares(ops, rows, tile, mask, D: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
    """The share of its previous value that every state keeps in this step: S tiles or scalars."""
    shares = ()
    if ops.zoneout.dtype.element_ty == tl.int8:
        shares = as_float32(load_planes(ops.zoneout, rows, tile, mask, D=D, PLANES=S, H=H))
    else:
        for i in tl.static_range(S):
            shares = shares + (tl.load(ops.zoneout + i),)
    return shares


@triton.jit
def zoneout(shares, old, new):
    """share * old + (1 - share) * new, for every state; exactly one of them where share is 0 or
    1, whatever the other is."""
    mixed = ()
    for i in tl.static_range(len(new)):
        value = new[i] + shares[i] * (old[i] - new[i])
        value = tl.where(shares[i] == 1.0, old[i], tl.where(shares[i] == 0.0, new[i], value))
        mixed = mixed + (value,)
    return mixed


@triton.jit
def zoneout_backward(shares, d_mixed):
    """The gradients of `zoneout`: those of `old`, and those of `new`."""
    d_old = ()
    d_new = ()
    for i in tl.static_range(len(d_mixed)):
        part = shares[i] * d_mixed[i]
        d_old = d_old + (part,)
        d_new = d_new + (d_mixed[i] - part,)
    return d_old, d_new
