"""The backward time loop, for every cell.

    for t, from the last step to the first:
        dx_gates_t, dh_gates_t, d_state, d_params = CELL_BACKWARD(d_state + d_output_t, ...)
        dh_{t-1} += dh_gates_t @ W_hh

The mirror image of `scan_forward`: the same tiles, the same owners, the same three schedules. A
program keeps the gradients of its units' states in float32 registers, and the columns of W_hh
that lead back to its units on the chip. What the programs hand each other is dh_gates_t, all G
gates of it, because every unit's gradient needs those of all units. It goes through the ring
of `sync` although dh_gates is written out as well: a ring stays in L2, has no rows missing where
sequences have ended, and can carry the step number that some protocols put beside each value.

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
    load_fresh,
    start_over,
    zoneout_shares,
)
from fusedrnn.kernels.product import exchanged_product, load_weights, own_product
from fusedrnn.kernels.tiles import as_float32, load_planes, row_of, select, store_planes


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


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_backward_kernel(
    d_output_ptr,  # [N, D, H]
    d_final_ptrs,  # S x [D, B, H]
    w_hh_ptr,  # [D, G, H, H]: gate, unit, unit of the previous step
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
    ring_ptr,  # [groups, slots, BLOCK_B, G, H], or None where PROTOCOL is
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
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_K, over all of H
    RESIDENT: tl.constexpr,  # so many of them stay on the chip, the others are read in each step
    AHEAD: tl.constexpr,  # chunks whose left operands are read together
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,  # of the exchange; None: one program owns all units
    FLAGS_BLOCK: tl.constexpr,
):
    direction = first_d + tl.program_id(2)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = first_b + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = (offs_b < B)[:, None]
    mask_h = (offs_h < H)[None, :]
    mask_bh = mask_b & mask_h
    own_h = offs_h[None, :]
    length = T
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + offs_b, mask=offs_b < B, other=0).to(tl.int32)[:, None]

    # Loaded once: the weights of the resident chunks, the parameters, the initial states.
    w_hh_ptr += direction * G * H * H
    weights = load_weights(
        w_hh_ptr,
        0,
        offs_h,
        BACKWARD=True,
        G=G,
        H=H,
        BLOCK_K=BLOCK_K,
        COUNT=RESIDENT,
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
    offs_state = (direction * tl.cast(B, tl.int64) + offs_b[:, None]) * H + own_h
    initial = ()
    d_state = ()
    for i in tl.static_range(len(state_ptrs)):
        initial = initial + (tl.load(state_ptrs[i] + offs_state, mask=mask_bh, other=0.0),)
        d_state = d_state + (tl.load(d_final_ptrs[i] + offs_state, mask=mask_bh, other=0.0),)
    d_state = as_float32(d_state)
    fresh = load_fresh(fresh_ptrs, offs_state, mask_bh)
    d_fresh = ()
    for _ in tl.static_range(len(fresh_ptrs)):
        d_fresh = d_fresh + (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
    if h_mask_ptr is not None:
        h_mask = tl.load(h_mask_ptr + offs_state, mask=mask_bh, other=0.0).to(tl.float32)

    alive = 1
    if PROTOCOL is not None:
        group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        ring_ptr += tl.cast(group, tl.int64) * ring_stride
        signal_ptr += group * signal_stride
        # Rows beyond the batch are exchanged too, as zeros: one mask less in the polls.
        tile_b = tl.arange(0, BLOCK_B)
        offs_own = tile_b[:, None] * (G * H) + own_h

    # A step needs d_output, what the forward pass kept, and the states before and after it. Those
    # before it are those after the step that the loop visits next, so each is loaded once.
    back = 2 * direction - 1
    t = (1 - direction) * (T - 1)
    rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
    active = mask_b & (t < length)
    mask = mask_bh & active
    (d_output,) = load_planes(d_output_ptr, rows, own_h, mask, direction, D=D, PLANES=1, H=H)
    next_rows, there = find_rows(t + back, offsets_ptr, T, stride_t, stride_b, length, offs_b)
    (d_output_next,) = load_planes(
        d_output_ptr, next_rows, own_h, mask_bh & there, direction, D=D, PLANES=1, H=H
    )
    kept = ()
    for i in tl.static_range(len(kept_ptrs)):
        kept = kept + load_planes(kept_ptrs[i], rows, own_h, mask, direction, D=D, PLANES=KEPT, H=H)
    new = load_states(
        t,
        initial,
        output_ptr,
        states_ptr,
        offsets_ptr,
        T,
        stride_t,
        stride_b,
        length,
        offs_b,
        own_h,
        mask_bh,
        direction,
        D=D,
        H=H,
    )
    prev = load_states(
        t + back,
        initial,
        output_ptr,
        states_ptr,
        offsets_ptr,
        T,
        stride_t,
        stride_b,
        length,
        offs_b,
        own_h,
        mask_bh,
        direction,
        D=D,
        H=H,
    )

    for step in range(T):
        values = as_float32(kept)
        prev_32 = as_float32(prev)
        new_32 = as_float32(new)
        if reset_ptr is not None:
            begins = load_flags(reset_ptr, rows, mask_b, direction, D=D)
            prev_32 = start_over(prev_32, fresh, begins)
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
        d_prev = select(active, d_prev, d_state)
        rounded = ()
        for g in tl.static_range(G):
            d_gate = tl.where(active, dh_gates[g], 0.0).to(w_hh_ptr.dtype.element_ty)
            rounded = rounded + (d_gate,)

        if PROTOCOL is not None:
            slot_ptr = ring_ptr + sync.slot(step + 1, PROTOCOL) * (BLOCK_B * G * H)
            for g in tl.static_range(G):
                offs_gate = offs_own + g * H
                sync.store(slot_ptr, offs_gate, rounded[g], mask_h, step + 1, PROTOCOL)
            sync.arrive(signal_ptr, tl.program_id(0), step + 1, alive, PROTOCOL)

        # While the others catch up: write what only later launches read, fetch the next step.
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
        if step + 1 < T:
            t += back
            rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
            active = mask_b & (t < length)
            mask = mask_bh & active
            kept = ()
            for i in tl.static_range(len(kept_ptrs)):
                kept = kept + load_planes(
                    kept_ptrs[i], rows, own_h, mask, direction, D=D, PLANES=KEPT, H=H
                )
            new = prev
            prev = load_states(
                t + back,
                initial,
                output_ptr,
                states_ptr,
                offsets_ptr,
                T,
                stride_t,
                stride_b,
                length,
                offs_b,
                own_h,
                mask_bh,
                direction,
                D=D,
                H=H,
            )

        # dh_{t-1} += dh_gates_t @ W_hh
        if PROTOCOL is None:
            sums = own_product(rounded, weights, G=G, PRECISION=PRECISION)
        else:
            alive = sync.wait(
                signal_ptr,
                step + 1,
                tl.num_programs(0),
                error_ptr,
                spin_limit,
                alive,
                PROTOCOL,
                FLAGS_BLOCK,
            )
            sums, alive = exchanged_product(
                ring_ptr + sync.slot(step + 1, PROTOCOL) * (BLOCK_B * G * H),
                weights,
                w_hh_ptr,
                offs_h,
                step + 1,
                error_ptr,
                spin_limit,
                alive,
                BACKWARD=True,
                G=G,
                H=H,
                BLOCK_B=BLOCK_B,
                BLOCK_H=BLOCK_H,
                BLOCK_K=BLOCK_K,
                CHUNKS=CHUNKS,
                RESIDENT=RESIDENT,
                AHEAD=AHEAD,
                SPLIT=SPLIT,
                PRECISION=PRECISION,
                PROTOCOL=PROTOCOL,
            )
        # Two steps ahead, and only here: a load that the states meet behind the product makes the
        # compiler lay them out as loads are, one element a thread, and not as the split product
        # is, of which every group of warps holds all (ten changes of layout a step less).
        d_output = d_output_next
        next_rows, there = find_rows(t + back, offsets_ptr, T, stride_t, stride_b, length, offs_b)
        (d_output_next,) = load_planes(
            d_output_ptr, next_rows, own_h, mask_bh & there, direction, D=D, PLANES=1, H=H
        )
        dh = sums[0]
        if h_mask_ptr is not None:
            dh *= h_mask
        dh += d_prev[0]
        if PROTOCOL is not None:
            dh += sync.poison(alive)
        d_state = (dh,) + d_prev[1:]
        if reset_ptr is not None:
            # The gradient ends where the sequence began: at the state that it started from.
            d_fresh = add(d_fresh, keep_where(begins, d_state[: len(d_fresh)]))
            d_state = start_over(d_state, (), begins)

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
