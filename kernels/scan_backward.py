"""The backward time loop, for every cell.

    for t, from the last step to the first:
        dh_t += dh_gates_{t+1} @ W_hh
        dx_gates_t, dh_gates_t, d_state, d_params = CELL_BACKWARD(d_state + d_output_t, ...)

The mirror image of `scan_forward`: the same tiles, the same owners, the same schedules. A program
keeps the gradients of its units' states in float32 registers, and the columns of W_hh that lead
back to its units. What the programs hand each other is dh_gates_t, all G gates of it, because
every unit's gradient needs those of all units. It goes through the ring of `sync` although
dh_gates is written out as well: a ring stays in L2, has no rows missing where sequences have
ended, and has an order that suits its readers. Step 1 of the exchange publishes zeros, so that
every step begins with a product; one more follows the last, for the initial state.

The gradients of the weights are not summed here, but afterwards, as single large products of
dx_gates and dh_gates with the layer's inputs and outputs.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.extras import (
    add,
    clamp,
    divide,
    keep_where,
    load_flags,
    start_over,
    zoneout_shares,
)
from fusedrnn.kernels.fragments import offset_in_slot, vectors
from fusedrnn.kernels.product import load_all_weights, load_weights, recurrent_product
from fusedrnn.kernels.tiles import (
    as_float32,
    load_each,
    load_planes,
    one_by_one,
    row_of,
    select,
    store_planes,
)


@triton.jit
def find_rows(
    t,
    offsets_ptr,  # [T], or None
    T,
    stride_t,
    stride_b,
    length,  # [BLOCK_B, 1], or T
    offs_b,  # [BLOCK_B]
):
    """Rows of step t, and which of them exist: none where t lies outside of the sequence."""
    inside = (t >= 0) & (t < T)
    rows = row_of(tl.where(inside, t, 0), offs_b, offsets_ptr, stride_t, stride_b)
    return rows, inside & (t < length)


@triton.jit
def load_states(
    t,
    initial,  # S tiles: the state of rows that have not begun at t
    output_ptr,  # [N, D, H]
    states_ptr,  # [N, D, S - 1, H], or None
    offsets_ptr,  # [T], or None
    T,
    stride_t,
    stride_b,
    length,  # [BLOCK_B, 1]
    offs_b,  # [BLOCK_B]
    own_h,  # [1, BLOCK_H]
    mask_bh,  # [BLOCK_B, BLOCK_H]
    direction,
    D: tl.constexpr,
    H: tl.constexpr,
):
    """The S states after step t.

    One direction begins at t = 0, the other at each row's last step: a t outside of the sequence
    or of the row's own length lies before the beginning.
    """
    rows, begun = find_rows(t, offsets_ptr, T, stride_t, stride_b, length, offs_b)
    begun &= mask_bh
    rows = rows * D + direction
    states = (tl.load(output_ptr + (rows * H + own_h), mask=begun, other=initial[0]),)
    OTHERS: tl.constexpr = len(initial) - 1
    for i in tl.static_range(OTHERS):
        offs = (rows * OTHERS + i) * H + own_h
        states = states + (tl.load(states_ptr + offs, mask=begun, other=initial[i + 1]),)
    return states


@triton.jit
def publish_gates(
    ring_ptr,
    signal_ptr,
    offs_own,  # of the first plane
    rounded,  # G tiles
    step,
    last,
    SLOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Publishes a program's dh_gates as its part of `step`."""
    for g in tl.static_range(len(rounded)):
        offs = offs_own + g * (16 * BLOCK_K)
        sync.publish(ring_ptr, SLOT, offs, rounded[g], step, last)
    sync.arrive(signal_ptr, step)


@triton.jit
def pass_back(
    product,  # dh_gates @ W_hh
    d_state,
    h_mask,  # one tile, or ()
    begins,  # [BLOCK_B, 1]: where a sequence began with the step of dh_gates, or ()
    d_fresh,
):
    """The gradients of the states before a step, complete; and of those that it started from."""
    for i in tl.static_range(len(h_mask)):
        product *= h_mask[i]
    d_state = (d_state[0] + product,) + d_state[1:]
    for i in tl.static_range(len(begins)):
        # The gradient ends where the sequence began: at the state that it started from.
        d_fresh = add(d_fresh, keep_where(begins[i], d_state[: len(d_fresh)]))
        d_state = start_over(d_state, (), begins[i])
    return d_state, d_fresh


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_backward_kernel(
    d_output_ptr,  # [N, D, H]
    d_final_ptrs,  # S x [D, B, H]
    w_ptr,  # [D, G, H, PITCH]: gate, unit of the previous step, unit
    state_ptrs,  # S x [D, B, H]
    param_ptrs,  # P x [D, H]
    output_ptr,  # [N, D, H]
    states_ptr,  # [N, D, S - 1, H], or None
    kept_ptrs,  # (saved [N, D, K, H],), or x_gates and h_gates [N, D, G, H], b_hh included
    dx_gates_ptr,  # [N, D, G, H]
    dh_gates_ptr,  # [N, D, G, H], or None where it equals dx_gates
    d_state_ptrs,  # S x [D, B, H]
    d_param_ptrs,  # P x [batch tiles, D, H] float32, to be summed over the tiles
    d_fresh_ptrs,  # S x [D, B, H], or ()
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    reset_ptr,  # [N, D] int8, or None: where the state starts over before the step
    fresh_ptrs,  # S x [D, B, H]: what it starts from, or () for zeros
    h_mask_ptr,  # [D, B, H], or None: multiplies h before the recurrent product
    zoneout_ptr,  # [N, D, S, H] int8 where ZONEOUT is "drawn", [S] where "expected", or None
    clip,  # bound of the gradient of every h_t, or None
    ring_ptr,  # [groups, slots, slot_size], or None unless EXCHANGED
    signal_ptr,  # [groups, ...], likewise
    error_ptr,  # [1], likewise
    ring_stride,  # from one group to the next; a group is a batch tile of a direction
    signal_stride,
    spin_limit,
    T,
    B,
    first_b,  # the launch covers the batch and the directions from here on
    first_d,
    stride_t,  # in rows
    stride_b,
    CELL_FORWARD: tl.constexpr,  # computes `saved` again from the gates; None where it was saved
    CELL_BACKWARD: tl.constexpr,
    ZONEOUT: tl.constexpr,
    KEPT: tl.constexpr,  # planes of each of kept_ptrs: K or G
    G: tl.constexpr,
    H: tl.constexpr,
    PITCH: tl.constexpr,  # H, or a little more
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_K, over all of H
    RESIDENT: tl.constexpr,  # so many of them stay in registers, the others are read in each step
    AHEAD: tl.constexpr,  # chunks whose left operands are read together
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCHANGED: tl.constexpr,  # between programs; else one owns all units
    PAIRWISE: tl.constexpr,  # see `sync.assembly`
):
    direction = first_d + tl.program_id(2)
    own_first = tl.program_id(0) * BLOCK_H
    offs_h = own_first + tl.arange(0, BLOCK_H)
    if EXCHANGED:
        offs_h = one_by_one(offs_h)
    own_h = offs_h[None, :]
    mask_h = own_h < H

    # Loaded once: the weights of the resident chunks, the parameters.
    w_ptr += direction * G * H * PITCH
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 32
    SLOT: tl.constexpr = BLOCK_B * G * CHUNKS * BLOCK_K
    at = None
    anchor = None
    if not EXCHANGED:
        weights = load_all_weights(w_ptr, offs_h, G=G, H=H, PITCH=PITCH)
    else:
        weights = load_weights(
            w_ptr,
            0,
            own_first,
            COUNT=RESIDENT,
            G=G,
            H=H,
            PITCH=PITCH,
            BLOCK_H=BLOCK_H,
            SPLIT=SPLIT,
        )
    params = ()
    d_params = ()
    for i in tl.static_range(len(param_ptrs)):
        params = params + load_planes(
            param_ptrs[i], 0, own_h, mask_h, direction, D=D, PLANES=1, H=H
        )
        d_params = d_params + (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
    params = as_float32(params)

    # And the lengths, the states before the first step, what states start over from, what
    # multiplies h, and what goes round the loop.
    back = 2 * direction - 1
    t = (1 - direction) * (T - 1)
    offs_b = first_b + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = (offs_b < B)[:, None]
    mask_bh = mask_b & mask_h
    length = T
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + offs_b, mask=offs_b < B, other=0).to(tl.int32)[:, None]
    offs_state = (direction * tl.cast(B, tl.int64) + offs_b[:, None]) * H + own_h
    initial = ()
    for i in tl.static_range(len(state_ptrs)):
        initial = initial + (tl.load(state_ptrs[i] + offs_state, mask=mask_bh, other=0.0),)
    d_state = load_each(d_final_ptrs, offs_state, mask_bh)
    fresh = load_each(fresh_ptrs, offs_state, mask_bh)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    d_fresh = ()
    for _ in tl.static_range(len(fresh_ptrs)):
        d_fresh = d_fresh + (zero,)
    begins = ()  # where a sequence began with the step of dh_gates
    if reset_ptr is not None:
        begins = ((tl.zeros([BLOCK_B, 1], tl.int32) != 0),)
    h_mask = ()
    if h_mask_ptr is not None:
        h_mask = load_each((h_mask_ptr,), offs_state, mask_bh)
    new = load_states(
        t, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, length,
        offs_b, own_h, mask_bh, direction, D=D, H=H,
    )  # fmt: skip
    rounded = ()  # dh_gates of the step that the loop visited last, as they are exchanged
    for _ in tl.static_range(G):
        rounded = rounded + (zero.to(DTYPE),)
    offs_own = None
    if EXCHANGED:
        group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        ring_ptr += group.to(tl.int64) * ring_stride
        signal_ptr += group * signal_stride
        # Rows beyond the batch are exchanged too, and units beyond H, as zeros.
        tile_b = tl.arange(0, BLOCK_B)[:, None]
        offs_own = offset_in_slot(tile_b, own_h, BLOCK_K=BLOCK_K, PLANES=G, WIDE=WIDE)
        at = vectors(SPLIT=SPLIT, WIDE=WIDE)
        anchor = sync.layout_of_loads(ring_ptr, at)
        publish_gates(
            ring_ptr, signal_ptr, offs_own, rounded, 1, T + 1,
            SLOT=SLOT, BLOCK_K=BLOCK_K,
        )  # fmt: skip

    for step in range(T):
        rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
        active = mask_b & (t < length)
        mask = mask_bh & active

        # What the cell needs is asked for before anything is waited for: d_output, what the
        # forward pass kept, and the states before the step. Those after it were those before the
        # step that the loop visited last.
        (d_output,) = load_planes(d_output_ptr, rows, own_h, mask, direction, D=D, PLANES=1, H=H)
        kept = ()
        for i in tl.static_range(len(kept_ptrs)):
            kept = kept + load_planes(
                kept_ptrs[i], rows, own_h, mask, direction, D=D, PLANES=KEPT, H=H
            )
        prev = load_states(
            t + back, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, length,
            offs_b, own_h, mask_bh, direction, D=D, H=H,
        )  # fmt: skip
        begins_here = ()
        if reset_ptr is not None:
            begins_here = (load_flags(reset_ptr, rows, mask_b, direction, D=D),)

        # dh_t += dh_gates_{t+1} @ W_hh
        (product,) = recurrent_product(
            rounded,
            ring_ptr,
            signal_ptr,
            at,
            anchor,
            weights,
            w_ptr,
            own_first,
            step + 1,
            spin_limit,
            SLOT=SLOT,
            G=G,
            PLANES=G,
            H=H,
            PITCH=PITCH,
            BLOCK_B=BLOCK_B,
            BLOCK_H=BLOCK_H,
            CHUNKS=CHUNKS,
            RESIDENT=RESIDENT,
            AHEAD=AHEAD,
            SPLIT=SPLIT,
            PRECISION=PRECISION,
            EXCHANGED=EXCHANGED,
            PAIRWISE=PAIRWISE,
        )
        d_state, d_fresh = pass_back(product, d_state, h_mask, begins, d_fresh)
        begins = begins_here

        values = as_float32(kept)
        prev_32 = as_float32(prev)
        new_32 = as_float32(new)
        if reset_ptr is not None:
            prev_32 = start_over(prev_32, fresh, begins[0])
        if CELL_FORWARD is None:
            saved = values
        else:
            # The cell's own new states: with zoneout not those that were stored.
            new_32, saved = CELL_FORWARD(values[:G], values[G:], prev_32, params)
        dh = d_state[0] + d_output.to(tl.float32)
        if clip is not None:
            dh = clamp(dh, clip)
        d_new = (dh,) + d_state[1:]
        if ZONEOUT is not None:
            share = zoneout_shares(
                zoneout_ptr, rows, own_h, mask, direction, D=D, S=len(d_new), H=H, KIND=ZONEOUT
            )
            d_kept, d_new = divide(share, d_new)
        dx_gates, dh_gates, d_prev, d_param = CELL_BACKWARD(d_new, saved, prev_32, new_32, params)
        if ZONEOUT is not None:
            d_prev = add(d_prev, d_kept)
        # A row that is over passes its gradient on, and has none of its own.
        d_state = select(active, d_prev, d_state)
        new = prev
        rounded = ()
        for g in tl.static_range(G):
            rounded = rounded + (tl.where(active & mask_h, dh_gates[g], 0.0).to(DTYPE),)
        if EXCHANGED:
            publish_gates(
                ring_ptr, signal_ptr, offs_own, rounded, step + 2, T + 1,
                SLOT=SLOT, BLOCK_K=BLOCK_K,
            )  # fmt: skip

        # While the others catch up: write what only later launches read.
        exists = mask_bh
        if offsets_ptr is not None:
            exists = mask
        store_planes(dx_gates_ptr, dx_gates, rows, own_h, active, exists, direction, D=D, H=H)
        if dh_gates_ptr is not None:
            store_planes(dh_gates_ptr, rounded, rows, own_h, active, exists, direction, D=D, H=H)
        for i in tl.static_range(len(d_params)):
            d_params = (
                d_params[:i]
                + (d_params[i] + tl.where(active, d_param[i], 0.0),)
                + d_params[i + 1 :]
            )
        t += back

    (product,) = recurrent_product(
        rounded,
        ring_ptr,
        signal_ptr,
        at,
        anchor,
        weights,
        w_ptr,
        own_first,
        T + 1,
        spin_limit,
        SLOT=SLOT,
        G=G,
        PLANES=G,
        H=H,
        PITCH=PITCH,
        BLOCK_B=BLOCK_B,
        BLOCK_H=BLOCK_H,
        CHUNKS=CHUNKS,
        RESIDENT=RESIDENT,
        AHEAD=AHEAD,
        SPLIT=SPLIT,
        PRECISION=PRECISION,
        EXCHANGED=EXCHANGED,
        PAIRWISE=PAIRWISE,
    )
    d_state, d_fresh = pass_back(product, d_state, h_mask, begins, d_fresh)

    for i in tl.static_range(len(d_state_ptrs)):
        d_initial = d_state[i].to(d_state_ptrs[i].dtype.element_ty)
        tl.store(d_state_ptrs[i] + offs_state, d_initial, mask=mask_bh)
    for i in tl.static_range(len(d_fresh_ptrs)):
        total = d_fresh[i].to(d_fresh_ptrs[i].dtype.element_ty)
        tl.store(d_fresh_ptrs[i] + offs_state, total, mask=mask_bh)
    batch_tile = first_b // BLOCK_B + tl.program_id(1)
    for i in tl.static_range(len(d_param_ptrs)):
        total = tl.sum(d_params[i], axis=0)
        offs = (batch_tile * D + direction) * H + offs_h
        tl.store(d_param_ptrs[i] + offs, total, mask=offs_h < H)
    if EXCHANGED:
        sync.report(signal_ptr, error_ptr)
