"""The backward time loop, for every cell.

    for t, from the last step to the first:
        dh_t += d_received_{t+1} @ W                 of the first stage
        d_values = the gradients of state_t
        for each stage of the cell, from the last to the first:
            dx_gates_t, d_received_t, d_values, d_params = STAGE_BACKWARD(d_values, ...)
            d_values[0] += d_received_t @ W          but for the first stage

The mirror image of `scan_forward`: the same tiles, the same owners, the same schedules. A program
keeps the gradients of its units' states in float32 registers, and the columns of W that lead back
to its units. What the programs hand each other is d_received, a plane for each gate of the stage,
because every unit's gradient needs those of all units. It goes through the ring of `sync` although
it is written out as well: a ring stays in L2, has no rows missing where sequences have ended, and
has an order that suits its readers. The first step of the exchange publishes zeros, so that every
step begins with a product; one more follows the last, for the initial state.

The gradients of the weights are not summed here, but afterwards, as single large products of
dx_gates and dh_gates with the layer's inputs and outputs.
"""

from typing import Any

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.matmul import (
    first_of,
    load_weights,
    matrices_of,
    planes_of,
    recurrent_matmul,
    round_of,
    slot_size,
    stage_at,
    sums_of,
)
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
    narrowed,
    program_tile,
    row_of,
    store_planes,
    store_states,
    where,
    zeros,
)
from fusedrnn.kernels.with_gluon import gluon, wgmma_backward


@triton.jit
def load_states_at(
    t, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, h_tile, tile,
    D: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The S states after step t, `initial` in rows that have not begun then.

    Time begins at t = 0, or where it is reversed at each row's last step: a t outside of the
    sequence or of the row's own length lies before the beginning.
    """
    rows = row_of(tl.where((t >= 0) & (t < T), t, 0), tile, offsets_ptr, stride_t, stride_b)
    times = t + (tile.length & 0)
    begun = (times >= 0) & (times < T) & (times < tile.length)
    rows = rows * D + tile.direction
    h = tl.load(output_ptr + (rows * P + tile.units), mask=begun & h_tile.mask, other=initial[0])
    states = (h,)
    OTHERS: tl.constexpr = len(initial) - 1
    for i in tl.static_range(OTHERS):
        offs = (rows * OTHERS + i) * H + tile.units
        state = tl.load(states_ptr + offs, mask=begun & tile.mask, other=initial[i + 1])
        states = states + (state,)
    return states


@triton.jit
def pass_back(product, d_state, h_mask, begins, d_reset_state):
    """The gradients of the states before a step, complete; and of those that it started from.

    product: what the first stage passes back. h_mask: one tile, or (). begins: [BLOCK_B, 1], where
    a sequence began with the step of dh_gates, or ().
    """
    d_state = (d_state[0] + masked(product, h_mask),) + d_state[1:]
    for i in tl.static_range(len(begins)):
        # The gradient ends where the sequence began: at the state that it started from.
        for k in tl.static_range(len(d_reset_state)):
            here = d_reset_state[k] + tl.where(begins[i], d_state[k], 0.0)
            d_reset_state = d_reset_state[:k] + (here,) + d_reset_state[k + 1 :]
        d_state = start_over(d_state, (), begins[i])
    return d_state, d_reset_state


@triton.jit
def run_stage_backward(
    d_values, saved, prev, new, params, active, unit_mask,
    BODY: tl.constexpr, STAGE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One stage's body. What it gives to its product is rounded to DTYPE, and 0 where there is
    nothing; params are those of all stages."""
    own = params[STAGE.first_param : STAGE.first_param + STAGE.params]
    dx_gates, d_received, d_values, d_params = BODY(d_values, saved, prev, new, own)
    PLANES: tl.constexpr = STAGE.planes
    given = ()
    for i in tl.static_range(PLANES):
        given = given + (tl.where(active & unit_mask, d_received[i], 0.0).to(DTYPE),)
    return dx_gates, given, d_values, d_params


@triton.jit
def hand_on(
    channel, given, weights, step, last,
    STAGE: tl.constexpr, STAGES: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Gives the others, as `step`, what they need for the product of the stage of that number: what
    is multiplied, or what the multiplication of it gave."""
    if PLAN.schedule == "wgmma_scatter":
        wgmma_backward.scatter(channel, given, weights, step, PLAN=PLAN)
    elif PLAN.exchanged:
        SLOT: tl.constexpr = slot_size(STAGES, PLAN)
        sync.publish(channel, given, step, last, SLOT=SLOT, BLOCK_K=PLAN.block_k, STAGE=STAGE)


@triton.jit
def run_again(
    gates, values, stored_h, params,
    BODY: tl.constexpr, STAGE: tl.constexpr, G: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One stage's forward body, from the x_gates, sums and means of all stages. What a projection
    received is the h that was stored."""
    FIRST: tl.constexpr = STAGE.first_gate
    LAST: tl.constexpr = STAGE.first_gate + STAGE.gates
    received = (stored_h,)
    if STAGE.sums > 0:
        received = gates[G + STAGE.first_sum : G + STAGE.first_sum + STAGE.sums]
    if STAGE.mean:
        MEAN: tl.constexpr = G + SUMS + STAGE.first_sum
        received = gates[MEAN : MEAN + STAGE.planes]
    own = params[STAGE.first_param : STAGE.first_param + STAGE.params]
    return BODY(gates[FIRST:LAST], received, values, own)


@triton.jit
def receive(d_values, product, h_mask, STAGE: tl.constexpr):
    """The gradients of the values before a stage, with what its product or mean passes back."""
    COUNT: tl.constexpr = len(product)
    passed = ()
    for i in tl.static_range(COUNT):
        x = product[i]
        if STAGE.gates > 0:  # what else was multiplied was not masked
            x = masked(x, h_mask)
        passed = passed + (d_values[i] + x,)
    return passed + d_values[COUNT:]


@triton.jit(
    do_not_specialize=["T", "B", "first_b", "first_lane", "reverse", "stride_t", "stride_b"]
)
def scan_backward_kernel(
    d_output_ptr,  # [N, D, P]
    d_final_ptrs,  # as state_ptrs
    w_ptrs,  # of each stage, of D directions, as `matrices_of` takes them: transposed
    param_ptrs,  # of each parameter, of D directions [H]
    state_ptrs,  # h [D, B, P], S - 1 others [D, B, H]
    output_ptr,  # [N, D, P]
    states_ptr,  # [N, D, S - 1, H], or None
    kept_ptrs,  # (saved [N, D, K, H],), or x_gates [N, D, G, H] and the sums, b_hh included, with
    # the means behind them, [N, D, sums + means, H]
    dx_gates_ptr,  # [N, D, G, H]
    dh_gates_ptr,  # [N, D, sums, H], or None where it equals dx_gates
    d_projected_ptr,  # [N, D, P]: what a projection received; or None
    d_state_ptrs,  # as state_ptrs
    d_param_ptrs,  # of each parameter [batch tiles, D, H] float32, to be summed over the tiles
    d_reset_state_ptrs,  # as state_ptrs, or ()
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    ops,  # `StateOps`
    exchange,  # `sync.Exchange`, or None where one program owns all units
    forward_bodies,  # of the stages: compute `saved` again from the gates; () where it was saved
    bodies,  # of the stages
    T, B, first_b, first_lane, reverse, stride_t, stride_b,  # strides in rows
    STAGES: tl.constexpr,  # `StageSizes` of each
    KEPT: tl.constexpr,  # planes of each of kept_ptrs
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(STAGES)
    ROUND: tl.constexpr = round_of(STAGES)
    FIRST: tl.constexpr = first_of(STAGES)
    # Loaded once: weights, parameters, the states before the first step, what states start over
    # from, what multiplies h, and what goes round the loop.
    tile = program_tile(
        T, B, first_b, first_lane, reverse, lengths_ptr, H=H, HEADS=HEADS, PLAN=PLAN
    )
    h_tile = narrowed(tile, B, WIDTH=P, H=H)
    matrices = ()
    weights = ()
    for s in tl.static_range(COUNT):
        matrices = matrices + (matrices_of(w_ptrs[s], tile, STAGE=stage_at(STAGES, s)),)
        weights = weights + (load_weights(matrices[s], tile, STAGE=stage_at(STAGES, s), PLAN=PLAN),)
    DTYPE: tl.constexpr = matrices[0].dtype.element_ty
    params = load_params(param_ptrs, tile, H=H)
    d_params = zeros(len(param_ptrs), tl.float32, tile)
    initial = load_states(state_ptrs, h_tile, tile)
    d_state = load_states(d_final_ptrs, h_tile, tile)
    reset_state = load_states(ops.reset_state, h_tile, tile)
    d_reset_state = zeros(len(ops.reset_state), tl.float32, tile)
    begins = ()  # where a sequence began with the step of dh_gates
    if ops.reset is not None:
        begins = ((tile.length & 0) != 0,)
    h_mask = load_h_mask(ops, h_tile)
    back = 2 * tile.reverse - 1
    t = (1 - tile.reverse) * (T - 1)
    new = load_states_at(
        t, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, h_tile, tile,
        D=D, H=H, P=P,
    )  # fmt: skip
    # What the first stage gave to its product in the step that the loop visited last.
    FIRST_PLANES: tl.constexpr = STAGES[0].planes
    rounded = zeros(FIRST_PLANES, DTYPE, tile)
    last = T * ROUND + FIRST
    channel = None
    if PLAN.schedule == "wgmma_scatter":
        channel = wgmma_backward.connect(exchange, PLAN=PLAN)
    elif PLAN.exchanged:
        channel = sync.connect(
            exchange, tile.head_units, PLANES=planes_of(STAGES), BLOCK_K=PLAN.block_k
        )
    hand_on(channel, rounded, weights[0], FIRST, last, STAGE=0, STAGES=STAGES, PLAN=PLAN)

    for step in range(T):
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        active = tile.batch_mask & (t < tile.length)
        mask = tile.mask & active
        h_active = h_tile.mask & active

        # What the cell needs is asked for before anything is waited for: d_output, what the
        # forward pass kept, and the states before the step. Those after it were those before the
        # step that the loop visited last.
        (d_output,) = load_planes(d_output_ptr, rows, h_tile, h_active, D=D, PLANES=1, H=P)
        kept = ()
        for i in tl.static_range(len(kept_ptrs)):
            kept = kept + load_planes(kept_ptrs[i], rows, tile, mask, D=D, PLANES=KEPT[i], H=H)
        prev = load_states_at(
            t + back, initial, output_ptr, states_ptr, offsets_ptr, T, stride_t, stride_b, h_tile,
            tile, D=D, H=H, P=P,
        )  # fmt: skip
        begins_here = ()
        if ops.reset is not None:
            begins_here = (load_begins(ops, rows, tile.batch_mask, tile, D=D),)

        # dh_t += d_received_{t+1} @ W
        exchanged = step * ROUND + FIRST  # the step of the exchange that is received next
        (product,) = recurrent_matmul(
            rounded, channel, weights[0], matrices[0], tile, exchanged,
            STAGE=stage_at(STAGES, 0), STAGES=STAGES, PRECISION=PRECISION, PLAN=PLAN,
        )  # fmt: skip
        d_state, d_reset_state = pass_back(product, d_state, h_mask, begins, d_reset_state)
        begins = begins_here

        saved = as_float32(kept)
        prev_32 = as_float32(prev)
        new_32 = as_float32(new)
        if ops.reset is not None:
            prev_32 = start_over(prev_32, reset_state, begins[0])
        if len(forward_bodies) > 0:
            # The cell's own new states: with zoneout not those that were stored.
            gates = saved
            stored_h = new_32[0]
            saved = ()
            new_32 = prev_32
            for s in tl.static_range(COUNT):
                new_32, more = run_again(
                    gates,
                    new_32,
                    stored_h,
                    params,
                    BODY=forward_bodies[s],
                    STAGE=stage_at(STAGES, s),
                    G=G,
                    SUMS=sums_of(STAGES),
                )
                saved = saved + more
        dh = d_state[0] + d_output.to(tl.float32)
        if ops.clip is not None:
            dh = clamp(dh, ops.clip)
        d_values = (dh,) + d_state[1:]
        if ops.zoneout is not None:
            shares = load_shares(ops, rows, tile, mask, D=D, S=len(d_values), H=H)
            d_kept, d_values = zoneout_backward(shares, d_values)
        exists = tile.mask
        h_exists = h_tile.mask
        if offsets_ptr is not None:
            exists = mask
            h_exists = h_active
        given = rounded
        dx_gates = ()
        dh_gates = ()
        d_param = ()
        for s in tl.static_range(COUNT - 1, -1, -1):
            if s + 1 < COUNT:
                product = recurrent_matmul(
                    given, channel, weights[s + 1], matrices[s + 1], tile,
                    exchanged + (COUNT - 1 - s),
                    STAGE=stage_at(STAGES, s + 1), STAGES=STAGES, PRECISION=PRECISION, PLAN=PLAN,
                )  # fmt: skip
                d_values = receive(d_values, product, h_mask, STAGE=stage_at(STAGES, s + 1))
            unit_mask = tile.head_units < STAGES[s].k  # units of the stage
            dx, given, d_values, d_own = run_stage_backward(
                d_values, saved, prev_32, new_32, params, active, unit_mask,
                BODY=bodies[s], STAGE=stage_at(STAGES, s), DTYPE=DTYPE,
            )  # fmt: skip
            hand_on(
                channel, given, weights[s], exchanged + (ROUND if s == 0 else COUNT - s), last,
                STAGE=s, STAGES=STAGES, PLAN=PLAN,
            )  # fmt: skip
            dx_gates = dx + dx_gates
            d_param = d_own + d_param
            if STAGES[s].sums > 0:
                dh_gates = given + dh_gates
            if STAGES[s].projection:
                store_planes(d_projected_ptr, given, rows, h_tile, active, h_exists, D=D, H=P)
        d_prev = d_values
        if ops.zoneout is not None:
            d_prev = add(d_prev, d_kept)
        # A row that is over passes its gradient on, and has none of its own.
        d_state = where(active, d_prev, d_state)
        new = prev
        rounded = given

        # While the others catch up: write what only later launches read.
        store_planes(dx_gates_ptr, dx_gates, rows, tile, active, exists, D=D, H=H)
        if dh_gates_ptr is not None:
            store_planes(dh_gates_ptr, dh_gates, rows, tile, active, exists, D=D, H=H)
        d_params = add(d_params, where(active, d_param, zeros(len(d_param), tl.float32, tile)))
        t += back

    (product,) = recurrent_matmul(
        rounded, channel, weights[0], matrices[0], tile, last,
        STAGE=stage_at(STAGES, 0), STAGES=STAGES, PRECISION=PRECISION, PLAN=PLAN,
    )  # fmt: skip
    d_state, d_reset_state = pass_back(product, d_state, h_mask, begins, d_reset_state)

    store_states(d_state_ptrs, d_state, h_tile, tile)
    store_states(d_reset_state_ptrs, d_reset_state, h_tile, tile)
    batch_tile = first_b // PLAN.block_b + tl.program_id(1)
    for i in tl.static_range(len(d_param_ptrs)):
        offs = (batch_tile * D + tile.direction) * H + tile.units
        total = tl.sum(d_params[i], axis=0, keep_dims=True)
        tl.store(d_param_ptrs[i] + offs, total, mask=tile.unit_mask)
    if PLAN.exchanged:
        sync.report(channel)


# The same loop in Gluon, as `scan_forward.scan_forward_gluon`.
scan_backward_gluon: Any = None
if gluon is not None:
    scan_backward_gluon = gluon.jit(
        scan_backward_kernel.fn,
        do_not_specialize=["T", "B", "first_b", "first_lane", "reverse", "stride_t", "stride_b"],
    )
