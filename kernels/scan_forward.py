"""The forward time loop, for every cell.

    for t:  h_gates = h_{t-1} @ W_hh^T + b_hh
            state_t, saved_t = CELL(x_gates_t, h_gates, state_{t-1}, params)

One launch runs the whole sequence. A program owns BLOCK_H units of BLOCK_B elements of the batch
in one direction: it keeps their states and their rows of the recurrent weights in registers from
the first step to the last. Where one program owns all units (the *resident* schedule), nothing
else is needed. Otherwise the programs of one batch tile and direction hand each other their h in
every step, through a ring in global memory (`sync`). Step 1 of the exchange publishes h_0, so that
the loop reads every h_{t-1} from the same place.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.extras import add, load_flags, mix, start_over, zoneout_shares
from fusedrnn.kernels.fragments import offset_in_slot, vectors
from fusedrnn.kernels.product import (
    load_all_weights,
    load_weights,
    recurrent_product,
)
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
def masked_h(
    state,
    h_mask,  # one tile, or ()
):
    """What goes into the recurrent product."""
    h = state[0]
    for i in tl.static_range(len(h_mask)):
        h *= h_mask[i]
    return h


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_forward_kernel(
    x_gates_ptr,  # [N, D, G, H]
    w_ptr,  # [D, G, H, PITCH]: gate, unit, unit of the previous step
    b_hh_ptr,  # [D, G, H], or None
    state_ptrs,  # S x [D, B, H]
    param_ptrs,  # P x [D, H]
    output_ptr,  # [N, D, H]
    final_ptrs,  # S x [D, B, H]
    saved_ptr,  # [N, D, K, H], or None
    states_ptr,  # [N, D, S - 1, H], or None
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    reset_ptr,  # [N, D] int8, or None: where the state starts over before the step
    fresh_ptrs,  # S x [D, B, H]: what it starts from, or () for zeros
    h_mask_ptr,  # [D, B, H], or None: multiplies h before the recurrent product
    zoneout_ptr,  # [N, D, S, H] int8 where ZONEOUT is "drawn", [S] where "expected", or None
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
    CELL: tl.constexpr,
    ZONEOUT: tl.constexpr,
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

    # Loaded once: the weights of the resident chunks, the bias, the parameters.
    w_ptr += direction * G * H * PITCH
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 32
    SLOT: tl.constexpr = BLOCK_B * CHUNKS * BLOCK_K
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
    bias = ()
    if b_hh_ptr is not None:
        bias = as_float32(load_planes(b_hh_ptr, 0, own_h, mask_h, direction, D=D, PLANES=G, H=H))
    params = ()
    for i in tl.static_range(len(param_ptrs)):
        params = params + load_planes(
            param_ptrs[i], 0, own_h, mask_h, direction, D=D, PLANES=1, H=H
        )
    params = as_float32(params)

    # And the states, what they start over from, what multiplies h, the lengths.
    offs_b = first_b + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = (offs_b < B)[:, None]
    mask_bh = mask_b & mask_h
    offs_state = (direction * tl.cast(B, tl.int64) + offs_b[:, None]) * H + own_h
    state = load_each(state_ptrs, offs_state, mask_bh)
    fresh = load_each(fresh_ptrs, offs_state, mask_bh)
    h_mask = ()
    if h_mask_ptr is not None:
        h_mask = load_each((h_mask_ptr,), offs_state, mask_bh)
    length = T
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + offs_b, mask=offs_b < B, other=0).to(tl.int32)[:, None]

    t = direction * (T - 1)
    if reset_ptr is not None:
        rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
        state = start_over(state, fresh, load_flags(reset_ptr, rows, mask_b, direction, D=D))
    if EXCHANGED:
        group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        ring_ptr += group.to(tl.int64) * ring_stride
        signal_ptr += group * signal_stride
        # Rows beyond the batch are exchanged too, and units beyond H, as zeros.
        tile_b = tl.arange(0, BLOCK_B)[:, None]
        offs_own = offset_in_slot(tile_b, own_h, BLOCK_K=BLOCK_K, PLANES=1, WIDE=WIDE)
        at = vectors(SPLIT=SPLIT, WIDE=WIDE)
        anchor = sync.layout_of_loads(ring_ptr, at)
        h = tl.where(mask_h, masked_h(state, h_mask), 0.0).to(DTYPE)
        sync.publish(ring_ptr, SLOT, offs_own, h, 1, T + 1)
        sync.arrive(signal_ptr, 1)

    for step in range(T):
        rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
        active = mask_b
        if lengths_ptr is not None:
            active = mask_b & (t < length)
        exists = mask_bh
        if offsets_ptr is not None:
            exists = mask_bh & active

        # What the cell needs is asked for before anything is waited for. Not in the step before:
        # what goes round the loop is packed, and so waited for, at its end.
        x_gates = load_planes(x_gates_ptr, rows, own_h, exists, direction, D=D, PLANES=G, H=H)
        if reset_ptr is not None:
            ahead = mask_b & (step + 1 < T)
            t_next = tl.where(step + 1 < T, t + 1 - 2 * direction, t)  # a step that there is
            next_rows = row_of(t_next, offs_b, offsets_ptr, stride_t, stride_b)
            begins = load_flags(reset_ptr, next_rows, ahead, direction, D=D)

        # h_gates = h_{t-1} @ W_hh^T + b_hh
        own = ()
        if not EXCHANGED:
            own = (masked_h(state, h_mask).to(DTYPE),)
        h_gates = recurrent_product(
            own,
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
            PLANES=1,
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
        if b_hh_ptr is not None:
            h_gates = add(h_gates, bias)

        new, saved = CELL(as_float32(x_gates), h_gates, state, params)
        if ZONEOUT is not None:
            share = zoneout_shares(
                zoneout_ptr, rows, own_h, exists, direction, D=D, S=len(state), H=H, KIND=ZONEOUT
            )
            new = mix(share, state, new)
        if lengths_ptr is not None:
            new = select(active, new, state)
        # Where a sequence begins with the next step, the next step's state is another one: what
        # is handed on, to oneself and to the others, is what that step reads.
        state = new
        if reset_ptr is not None:
            state = start_over(new, fresh, begins)
        if EXCHANGED:
            h = tl.where(mask_h, masked_h(state, h_mask), 0.0).to(DTYPE)
            sync.publish(ring_ptr, SLOT, offs_own, h, step + 2, T + 1)
            sync.arrive(signal_ptr, step + 2)

        # While the others catch up: write what only later launches read.
        store_planes(output_ptr, (new[0],), rows, own_h, active, exists, direction, D=D, H=H)
        if saved_ptr is not None:
            store_planes(saved_ptr, saved, rows, own_h, active, exists, direction, D=D, H=H)
        if states_ptr is not None:
            store_planes(states_ptr, new[1:], rows, own_h, active, exists, direction, D=D, H=H)
        t += 1 - 2 * direction

    for i in tl.static_range(len(final_ptrs)):
        final = state[i].to(final_ptrs[i].dtype.element_ty)
        tl.store(final_ptrs[i] + offs_state, final, mask=mask_bh)
    if EXCHANGED:
        sync.report(signal_ptr, error_ptr)
