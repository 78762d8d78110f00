"""The forward time loop, for every cell.

    for t:  h_gates = h_{t-1} @ W_hh^T + b_hh
            state_t, saved_t = CELL(x_gates_t, h_gates, state_{t-1}, params)

One launch runs the whole sequence. A program owns BLOCK_H units of BLOCK_B elements of the batch
in one direction: it keeps their states and their rows of the recurrent weights in registers from
the first step to the last. Where one program owns all units (schedule single_block), nothing
else is needed. Otherwise the programs of one batch tile and direction hand each other their h in
every step, through a ring in global memory (`sync`). Step 1 of the exchange publishes h_0, so that
the loop reads every h_{t-1} from the same place.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.matmul import load_weights, recurrent_matmul, slot_size
from fusedrnn.kernels.state_ops import (
    load_begins,
    load_h_mask,
    load_shares,
    masked,
    start_over,
    zoneout,
)
from fusedrnn.kernels.tiles import (
    add,
    as_float32,
    load_params,
    load_planes,
    load_states,
    load_vectors,
    of_direction,
    program_tile,
    row_of,
    store_planes,
    store_states,
    where,
)


@triton.jit
def publish_h(channel, h, tile, step, last, PLAN: tl.constexpr):
    """Publishes h as this program's part of `step`. Rows beyond the batch are exchanged too, and
    units beyond H, as zeros."""
    rounded = tl.where(tile.unit_mask, h, 0.0).to(channel.ring.dtype.element_ty)
    sync.publish(channel, (rounded,), step, last, SLOT=slot_size(1, PLAN), BLOCK_K=PLAN.block_k)


@triton.jit(do_not_specialize=["T", "B", "first_b", "first_d", "stride_t", "stride_b"])
def scan_forward_kernel(
    x_gates_ptr,  # [N, D, G, H]
    w_ptrs,  # D x [G, H, pitch]: gate, unit, unit of the previous step
    b_hh_ptrs,  # D x [G, H], or None
    param_ptrs,  # P x D x [H]
    state_ptrs,  # S x [D, B, H]
    output_ptr,  # [N, D, H]
    final_ptrs,  # S x [D, B, H]
    saved_ptr,  # [N, D, K, H], or None
    states_ptr,  # [N, D, S - 1, H], or None
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    ops,  # `StateOps`
    exchange,  # `sync.Exchange`, or None where one program owns all units
    T, B, first_b, first_d, stride_t, stride_b,  # strides in rows
    CELL: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    # Loaded once: weights, bias, parameters, states, what they start over from, what multiplies h.
    tile = program_tile(T, B, first_b, first_d, lengths_ptr, H=H, PLAN=PLAN)
    w_ptr = of_direction(w_ptrs, tile)
    weights = load_weights(w_ptr, tile, G=G, H=H, PLAN=PLAN)
    bias = ()
    if b_hh_ptrs is not None:
        bias = load_vectors(b_hh_ptrs, tile, PLANES=G, H=H)
    params = load_params(param_ptrs, tile, H=H)
    state = load_states(state_ptrs, tile)
    reset_state = load_states(ops.reset_state, tile)
    h_mask = load_h_mask(ops, tile)

    t = tile.direction * (T - 1)
    if ops.reset is not None:
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        first = load_begins(ops, rows, tile.batch_mask, tile, D=D)
        state = start_over(state, reset_state, first)
    channel = None
    if PLAN.exchanged:
        channel = sync.connect(exchange, tile.units, PLANES=1, BLOCK_K=PLAN.block_k)
        publish_h(channel, masked(state[0], h_mask), tile, 1, T + 1, PLAN=PLAN)

    for step in range(T):
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        active = tile.batch_mask
        if lengths_ptr is not None:
            active = tile.batch_mask & (t < tile.length)
        exists = tile.mask
        if offsets_ptr is not None:
            exists = tile.mask & active

        # What the cell needs is asked for before anything is waited for. Not in the step before:
        # what goes round the loop is packed, and so waited for, at its end.
        x_gates = load_planes(x_gates_ptr, rows, tile, exists, D=D, PLANES=G, H=H)
        if ops.reset is not None:
            ahead = tile.batch_mask & (step + 1 + tl.zeros_like(tile.length) < T)
            t_next = tl.where(step + 1 < T, t + 1 - 2 * tile.direction, t)  # a step that there is
            next_rows = row_of(t_next, tile, offsets_ptr, stride_t, stride_b)
            begins = load_begins(ops, next_rows, ahead, tile, D=D)

        # h_gates = h_{t-1} @ W_hh^T + b_hh
        h = (masked(state[0], h_mask).to(w_ptr.dtype.element_ty),)
        h_gates = recurrent_matmul(
            h, channel, weights, w_ptr, tile, step + 1,
            G=G, H=H, PRECISION=PRECISION, PLAN=PLAN,
        )  # fmt: skip
        if b_hh_ptrs is not None:
            h_gates = add(h_gates, bias)

        new, saved = CELL(as_float32(x_gates), h_gates, state, params)
        if ops.zoneout is not None:
            shares = load_shares(ops, rows, tile, exists, D=D, S=len(state), H=H)
            new = zoneout(shares, state, new)
        if lengths_ptr is not None:
            new = where(active, new, state)
        # Where a sequence begins with the next step, the next step's state is another one: what
        # is handed on, to oneself and to the others, is what that step reads.
        state = new
        if ops.reset is not None:
            state = start_over(new, reset_state, begins)
        if PLAN.exchanged:
            publish_h(channel, masked(state[0], h_mask), tile, step + 2, T + 1, PLAN=PLAN)

        # While the others catch up: write what only later launches read.
        store_planes(output_ptr, (new[0],), rows, tile, active, exists, D=D, H=H)
        if saved_ptr is not None:
            store_planes(saved_ptr, saved, rows, tile, active, exists, D=D, H=H)
        if states_ptr is not None:
            store_planes(states_ptr, new[1:], rows, tile, active, exists, D=D, H=H)
        t += 1 - 2 * tile.direction

    store_states(final_ptrs, state, tile)
    if PLAN.exchanged:
        sync.report(channel)
