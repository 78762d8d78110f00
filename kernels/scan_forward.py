"""The forward time loop, for every cell.

    for t:  h_gates = h_{t-1} @ W_hh^T + b_hh
            state_t, saved_t = CELL(x_gates_t, h_gates, state_{t-1}, params)

One launch runs the whole sequence. A program owns BLOCK_H units of BLOCK_B elements of the batch
in one direction: it keeps their states in float32 registers from the first step to the last, and
their rows of the recurrent weights on the chip. Where one program owns all units (the *resident*
schedule), nothing else is needed. Otherwise the programs of one batch tile and direction hand
each other their h in every step, through a ring in global memory (`sync`). Step 1 of the exchange
publishes h_0, so that the loop reads every h_{t-1} from the same place.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.extras import load_flags, load_fresh, mix, start_over, zoneout_shares
from fusedrnn.kernels.product import exchanged_product, load_weights, own_product
from fusedrnn.kernels.tiles import as_float32, load_planes, row_of, select, store_planes


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_forward_kernel(
    x_gates_ptr,  # [N, D, G, H]
    w_hh_ptr,  # [D, G, H, H]: gate, unit, unit of the previous step
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
    ring_ptr,  # [groups, slots, BLOCK_B, H], or None where PROTOCOL is
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

    # Loaded once: the weights of the resident chunks, the bias, the parameters, the states.
    w_hh_ptr += direction * G * H * H
    weights = load_weights(
        w_hh_ptr,
        0,
        offs_h,
        BACKWARD=False,
        G=G,
        H=H,
        BLOCK_K=BLOCK_K,
        COUNT=RESIDENT,
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
    offs_state = (direction * tl.cast(B, tl.int64) + offs_b[:, None]) * H + own_h
    state = ()
    for i in tl.static_range(len(state_ptrs)):
        state = state + (tl.load(state_ptrs[i] + offs_state, mask=mask_bh, other=0.0),)
    state = as_float32(state)
    fresh = load_fresh(fresh_ptrs, offs_state, mask_bh)
    if h_mask_ptr is not None:
        h_mask = tl.load(h_mask_ptr + offs_state, mask=mask_bh, other=0.0).to(tl.float32)

    t = direction * (T - 1)
    rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
    exists = mask_bh
    if offsets_ptr is not None:
        exists = mask_bh & (t < length)
    if reset_ptr is not None:
        state = start_over(state, fresh, load_flags(reset_ptr, rows, mask_b, direction, D=D))

    alive = 1
    if PROTOCOL is not None:
        group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        ring_ptr += tl.cast(group, tl.int64) * ring_stride
        signal_ptr += group * signal_stride
        # Rows beyond the batch are exchanged too, as zeros: one mask less in the polls.
        tile_b = tl.arange(0, BLOCK_B)
        offs_own = tile_b[:, None] * H + own_h
        h = state[0]
        if h_mask_ptr is not None:
            h *= h_mask
        h = h.to(w_hh_ptr.dtype.element_ty)
        slot_ptr = ring_ptr + sync.slot(1, PROTOCOL) * (BLOCK_B * H)
        sync.store(slot_ptr, offs_own, h, mask_h, 1, PROTOCOL)
        sync.arrive(signal_ptr, tl.program_id(0), 1, alive, PROTOCOL)

    x_next = load_planes(x_gates_ptr, rows, own_h, exists, direction, D=D, PLANES=G, H=H)

    for step in range(T):
        x_gates = as_float32(x_next)
        if reset_ptr is not None:
            ahead = mask_b & (step + 1 < T)
            t_next = tl.where(step + 1 < T, t + 1 - 2 * direction, t)  # a step that there is
            next_rows = row_of(t_next, offs_b, offsets_ptr, stride_t, stride_b)
            begins = load_flags(reset_ptr, next_rows, ahead, direction, D=D)

        # h_gates = h_{t-1} @ W_hh^T + b_hh
        if PROTOCOL is None:
            h = state[0]
            if h_mask_ptr is not None:
                h *= h_mask
            h = h.to(w_hh_ptr.dtype.element_ty)
            sums = own_product((h,), weights, G=G, PRECISION=PRECISION)
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
                ring_ptr + sync.slot(step + 1, PROTOCOL) * (BLOCK_B * H),
                weights,
                w_hh_ptr,
                offs_h,
                step + 1,
                error_ptr,
                spin_limit,
                alive,
                BACKWARD=False,
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
        h_gates = ()
        for g in tl.static_range(G):
            h_gate = sums[g]
            if b_hh_ptr is not None:
                h_gate += bias[g]
            if PROTOCOL is not None:
                h_gate += sync.poison(alive)
            h_gates = h_gates + (h_gate,)

        new, saved = CELL(x_gates, h_gates, state, params)
        if ZONEOUT is not None:
            share = zoneout_shares(
                zoneout_ptr, rows, own_h, exists, direction, D=D, S=len(state), H=H, KIND=ZONEOUT
            )
            new = mix(share, state, new)
        active = mask_b
        if lengths_ptr is not None:
            active = mask_b & (t < length)
            new = select(active, new, state)
        # Where a sequence begins with the next step, the next step's state is another one: what
        # is handed on, to oneself and to the others, is what that step reads.
        state = new
        if reset_ptr is not None:
            state = start_over(new, fresh, begins)

        if PROTOCOL is not None:
            h = state[0]
            if h_mask_ptr is not None:
                h *= h_mask
            h = h.to(w_hh_ptr.dtype.element_ty)
            slot_ptr = ring_ptr + sync.slot(step + 2, PROTOCOL) * (BLOCK_B * H)
            sync.store(slot_ptr, offs_own, h, mask_h, step + 2, PROTOCOL)
            sync.arrive(signal_ptr, tl.program_id(0), step + 2, alive, PROTOCOL)

        # While the others catch up: write what only later launches read, fetch the next x_gates.
        store_planes(output_ptr, (new[0],), rows, own_h, active, exists, direction, D=D, H=H)
        if saved_ptr is not None:
            store_planes(saved_ptr, saved, rows, own_h, active, exists, direction, D=D, H=H)
        if states_ptr is not None:
            store_planes(states_ptr, new[1:], rows, own_h, active, exists, direction, D=D, H=H)
        if step + 1 < T:
            t += 1 - 2 * direction
            rows = row_of(t, offs_b, offsets_ptr, stride_t, stride_b)
            if offsets_ptr is not None:
                exists = mask_bh & (t < length)
            x_next = load_planes(x_gates_ptr, rows, own_h, exists, direction, D=D, PLANES=G, H=H)

    for i in tl.static_range(len(final_ptrs)):
        final = state[i].to(final_ptrs[i].dtype.element_ty)
        tl.store(final_ptrs[i] + offs_state, final, mask=mask_bh)
