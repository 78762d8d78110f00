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
from fusedrnn.kernels.matmul import load_weights, recurrent_matmul, slot_size
from fusedrnn.kernels.state_ops import (
    clamp,
    load_begins,
    load_h_mask,
    load_shares,
    masked,
    start_over,
    zoneout_backward,
)
from fusedrnn.kernels.tiles import (
    add,
    as_float32,
    load_params,
    load_planes,
    load_states,
    of_direction,
    program_tile,
    row_of,
    store_planes,
    store_states,
    where,
    zeros,
)


@triton.jit
def load_states_at(
    t, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, tile,
    D: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The S states after step t, `initial` in rows that have not begun then.

    One direction begins at t = 0, the other at each row's last step: a t outside of the sequence
    or of the row's own length lies before the beginning.
    """
    rows = row_of(tl.where((t >= 0) & (t < T), t, 0), tile, offsets_ptr, stride_t, stride_b)
    times = t + tl.zeros_like(tile.length)
    begun = (times >= 0) & (times < T) & (times < tile.length) & tile.mask
    rows = rows * D + tile.direction
    states = (tl.load(output_ptr + (rows * H + tile.units), mask=begun, other=initial[0]),)
    OTHERS: tl.constexpr = len(initial) - 1
    for i in tl.static_range(OTHERS):
        offs = (rows * OTHERS + i) * H + tile.units
        states = states + (tl.load(states_ptr + offs, mask=begun, other=initial[i + 1]),)
    return states


@triton.jit
def pass_back(product, d_state, h_mask, begins, d_reset_state):
    """The gradients of the states before a step, complete; and of those that it started from.

    product: dh_gates @ W_hh. h_mask: one tile, or (). begins: [BLOCK_B, 1], where a sequence began
    with the step of dh_gates, or ().
    """
    d_state = (d_state[0] + masked(product, h_mask),) + d_state[1:]
    for i in tl.static_range(len(begins)):
        # The gradient ends where the sequence began: at the state that it started from.
        for k in tl.static_range(len(d_reset_state)):
            here = d_reset_state[k] + tl.where(begins[i], d_state[k], 0.0)
            d_reset_state = d_reset_state[:k] + (here,) + d_reset_state[k + 1 :]
        d_state = start_over(d_state, (), begins[i])
    return d_state, d_reset_state


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_backward_kernel(
    d_output_ptr,  # [N, D, H]
    d_final_ptrs,  # S x [D, B, H]
    w_ptrs,  # D x [G, H, pitch]: gate, unit of the previous step, unit
    param_ptrs,  # P x D x [H]
    state_ptrs,  # S x [D, B, H]
    output_ptr,  # [N, D, H]
    states_ptr,  # [N, D, S - 1, H], or None
    kept_ptrs,  # (saved [N, D, K, H],), or x_gates and h_gates [N, D, G, H], b_hh included
    dx_gates_ptr,  # [N, D, G, H]
    dh_gates_ptr,  # [N, D, G, H], or None where it equals dx_gates
    d_state_ptrs,  # S x [D, B, H]
    d_param_ptrs,  # P x [batch tiles, D, H] float32, to be summed over the tiles
    d_reset_state_ptrs,  # S x [D, B, H], or ()
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    ops,  # `StateOps`
    exchange,  # `sync.Exchange`, or None where one program owns all units
    T, B, first_b, first_d, stride_t, stride_b,  # strides in rows
    CELL_FORWARD: tl.constexpr,  # computes `saved` again from the gates; None where it was saved
    CELL_BACKWARD: tl.constexpr,
    KEPT: tl.constexpr,  # planes of each of kept_ptrs: K or G
    G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    # Loaded once: weights, parameters, the states before the first step, what states start over
    # from, what multiplies h, and what goes round the loop.
    tile = program_tile(T, B, first_b, first_d, lengths_ptr, H=H, PLAN=PLAN)
    w_ptr = of_direction(w_ptrs, tile)
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    SLOT: tl.constexpr = slot_size(G, PLAN)
    weights = load_weights(w_ptr, tile, G=G, H=H, PLAN=PLAN)
    params = load_params(param_ptrs, tile, H=H)
    d_params = zeros(len(param_ptrs), tl.float32, PLAN)
    initial = load_states(state_ptrs, tile)
    d_state = load_states(d_final_ptrs, tile)
    reset_state = load_states(ops.reset_state, tile)
    d_reset_state = zeros(len(ops.reset_state), tl.float32, PLAN)
    begins = ()  # where a sequence began with the step of dh_gates
    if ops.reset is not None:
        begins = (tl.zeros_like(tile.length) != 0,)
    h_mask = load_h_mask(ops, tile)
    back = 2 * tile.direction - 1
    t = (1 - tile.direction) * (T - 1)
    new = load_states_at(
        t, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, tile, D=D, H=H
    )
    # dh_gates of the step that the loop visited last, as they are exchanged
    rounded = zeros(G, DTYPE, PLAN)
    channel = None
    if PLAN.exchanged:
        channel = sync.connect(exchange, tile.units, PLANES=G, BLOCK_K=PLAN.block_k)
        sync.publish(channel, rounded, 1, T + 1, SLOT=SLOT, BLOCK_K=PLAN.block_k)

    for step in range(T):
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        active = tile.batch_mask & (t < tile.length)
        mask = tile.mask & active

        # What the cell needs is asked for before anything is waited for: d_output, what the
        # forward pass kept, and the states before the step. Those after it were those before the
        # step that the loop visited last.
        (d_output,) = load_planes(d_output_ptr, rows, tile, mask, D=D, PLANES=1, H=H)
        kept = ()
        for i in tl.static_range(len(kept_ptrs)):
            kept = kept + load_planes(kept_ptrs[i], rows, tile, mask, D=D, PLANES=KEPT, H=H)
        prev = load_states_at(
            t + back, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, tile,
            D=D, H=H,
        )  # fmt: skip
        begins_here = ()
        if ops.reset is not None:
            begins_here = (load_begins(ops, rows, tile.batch_mask, tile, D=D),)

        # dh_t += dh_gates_{t+1} @ W_hh
        (product,) = recurrent_matmul(
            rounded, channel, weights, w_ptr, tile, step + 1,
            G=G, H=H, PRECISION=PRECISION, PLAN=PLAN,
        )  # fmt: skip
        d_state, d_reset_state = pass_back(product, d_state, h_mask, begins, d_reset_state)
        begins = begins_here

        values = as_float32(kept)
        prev_32 = as_float32(prev)
        new_32 = as_float32(new)
        if ops.reset is not None:
            prev_32 = start_over(prev_32, reset_state, begins[0])
        if CELL_FORWARD is None:
            saved = values
        else:
            # The cell's own new states: with zoneout not those that were stored.
            new_32, saved = CELL_FORWARD(values[:G], values[G:], prev_32, params)
        dh = d_state[0] + d_output.to(tl.float32)
        if ops.clip is not None:
            dh = clamp(dh, ops.clip)
        d_new = (dh,) + d_state[1:]
        if ops.zoneout is not None:
            shares = load_shares(ops, rows, tile, mask, D=D, S=len(d_new), H=H)
            d_kept, d_new = zoneout_backward(shares, d_new)
        dx_gates, dh_gates, d_prev, d_param = CELL_BACKWARD(d_new, saved, prev_32, new_32, params)
        if ops.zoneout is not None:
            d_prev = add(d_prev, d_kept)
        # A row that is over passes its gradient on, and has none of its own.
        d_state = where(active, d_prev, d_state)
        new = prev
        rounded = ()
        for g in tl.static_range(G):
            rounded = rounded + (tl.where(active & tile.unit_mask, dh_gates[g], 0.0).to(DTYPE),)
        if PLAN.exchanged:
            sync.publish(channel, rounded, step + 2, T + 1, SLOT=SLOT, BLOCK_K=PLAN.block_k)

        # While the others catch up: write what only later launches read.
        exists = tile.mask
        if offsets_ptr is not None:
            exists = mask
        store_planes(dx_gates_ptr, dx_gates, rows, tile, active, exists, D=D, H=H)
        if dh_gates_ptr is not None:
            store_planes(dh_gates_ptr, rounded, rows, tile, active, exists, D=D, H=H)
        d_params = add(d_params, where(active, d_param, zeros(len(d_param), tl.float32, PLAN)))
        t += back

    (product,) = recurrent_matmul(
        rounded, channel, weights, w_ptr, tile, T + 1,
        G=G, H=H, PRECISION=PRECISION, PLAN=PLAN,
    )  # fmt: skip
    d_state, d_reset_state = pass_back(product, d_state, h_mask, begins, d_reset_state)

    store_states(d_state_ptrs, d_state, tile)
    store_states(d_reset_state_ptrs, d_reset_state, tile)
    batch_tile = first_b // PLAN.block_b + tl.program_id(1)
    for i in tl.static_range(len(d_param_ptrs)):
        offs = (batch_tile * D + tile.direction) * H + tile.units
        total = tl.sum(d_params[i], axis=0, keep_dims=True)
        tl.store(d_param_ptrs[i] + offs, total, mask=tile.unit_mask)
    if PLAN.exchanged:
        sync.report(channel)
