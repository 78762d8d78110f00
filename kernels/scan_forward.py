"""The forward time loop, for every cell.

    for t:  values = state_{t-1}
            for each stage of the cell:
                received = values[0] @ W^T + b
                values, saved_t = STAGE(x_gates_t, received, values, params)
            state_t = values

One launch runs the whole sequence. A program owns BLOCK_H units of BLOCK_B elements of the batch
in one lane: it keeps their states and their rows of the weights in registers from the first step
to the last. Where one program owns all units (schedule single_block), nothing else is needed.
Otherwise the programs of one batch tile and lane hand each other what they multiply, before every
stage, through a ring in global memory (`sync`). With n stages, stage s of time step t receives what
was published as step n * t + s + 1 (of n = 3, and what else is no power of two: `round_of`). The
first step publishes h_0, so that the loop reads every h_{t-1} from the same place.

The same source is compiled by Triton and, where the schedule is wgmma, by Gluon (`wgmma`).
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
    narrowed,
    program_tile,
    row_of,
    store_planes,
    store_states,
    where,
)
from fusedrnn.kernels.with_gluon import gluon, wgmma


@triton.jit
def to_exchange(values, h_mask, like, STAGE: tl.constexpr):
    """What the stage multiplies, or takes the means of, in the dtype of the pointer `like`."""
    PLANES: tl.constexpr = STAGE.planes
    planes = ()
    for i in tl.static_range(PLANES):
        x = values[i]
        if STAGE.gates > 0:  # what else is multiplied is not masked
            x = masked(x, h_mask)
        planes = planes + (x.to(like.dtype.element_ty),)
    return planes


@triton.jit
def publish_tiles(
    channel, planes, tile, step, last,
    STAGE: tl.constexpr, STAGES: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Publishes this program's part of `step`, for the stage of that number. Rows beyond the batch
    are exchanged too, and units that there are not, as zeros."""
    found = ()
    for i in tl.static_range(len(planes)):
        x = tl.where(tile.unit_mask, planes[i], 0.0).to(channel.ring.dtype.element_ty)
        found = found + (x,)
    sync.publish(
        channel, found, step, last, SLOT=slot_size(STAGES, PLAN), BLOCK_K=PLAN.block_k, STAGE=STAGE
    )


@triton.jit
def run_stage(
    x_gates, planes, values, bias, params, channel, weights, w_ptr, tile, step,
    BODY: tl.constexpr, STAGE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """One stage: its product, and its body; x_gates, bias and params are those of all stages."""
    FIRST: tl.constexpr = STAGE.first_gate
    LAST: tl.constexpr = STAGE.first_gate + STAGE.gates
    received = recurrent_matmul(
        planes, channel, weights, w_ptr, tile, step,
        STAGE=STAGE, STAGES=STAGES, PRECISION=PRECISION, PLAN=PLAN,
    )  # fmt: skip
    if len(bias) > 0 and STAGE.sums > 0:
        received = add(received, bias[STAGE.first_sum : STAGE.first_sum + STAGE.sums])
    own = params[STAGE.first_param : STAGE.first_param + STAGE.params]
    return BODY(as_float32(x_gates[FIRST:LAST]), received, values, own)


@triton.jit(
    do_not_specialize=["T", "B", "first_b", "first_lane", "reverse", "stride_t", "stride_b"]
)
def scan_forward_kernel(
    x_gates_ptr,  # [N, D, G, H]
    w_ptrs,  # of each stage, of D directions, as `matrices_of` takes them
    b_hh_ptrs,  # of the sums of all stages, D x [sums, H], or None
    param_ptrs,  # of each parameter, of D directions [H]
    state_ptrs,  # h [D, B, P], S - 1 others [D, B, H]
    output_ptr,  # [N, D, P]
    final_ptrs,  # as state_ptrs
    saved_ptr,  # [N, D, K, H], or None
    published_ptr,  # [N, D, products - 1, H]: what all stages but the first multiply; or None
    states_ptr,  # [N, D, S - 1, H], or None
    offsets_ptr,  # [T], or None
    lengths_ptr,  # [B], or None
    ops,  # `StateOps`
    exchange,  # `sync.Exchange`, or None where one program owns all units
    bodies,  # of the stages
    T, B, first_b, first_lane, reverse, stride_t, stride_b,  # strides in rows
    STAGES: tl.constexpr,  # `StageSizes` of each
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(STAGES)
    ROUND: tl.constexpr = round_of(STAGES)
    FIRST: tl.constexpr = first_of(STAGES)
    # Loaded once: weights, bias, parameters, states, what they start over from, what multiplies h.
    tile = program_tile(
        T, B, first_b, first_lane, reverse, lengths_ptr, H=H, HEADS=HEADS, PLAN=PLAN
    )
    h_tile = narrowed(tile, B, WIDTH=P, H=H)
    matrices = ()
    weights = ()
    for s in tl.static_range(COUNT):
        matrices = matrices + (matrices_of(w_ptrs[s], tile, STAGE=stage_at(STAGES, s)),)
        weights = weights + (load_weights(matrices[s], tile, STAGE=stage_at(STAGES, s), PLAN=PLAN),)
    bias = ()
    if b_hh_ptrs is not None:
        bias = load_vectors(b_hh_ptrs, tile, PLANES=sums_of(STAGES), H=H)
    params = load_params(param_ptrs, tile, H=H)
    state = load_states(state_ptrs, h_tile, tile)
    reset_state = load_states(ops.reset_state, h_tile, tile)
    h_mask = load_h_mask(ops, h_tile)

    t = tile.reverse * (T - 1)
    if ops.reset is not None:
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        first = load_begins(ops, rows, tile.batch_mask, tile, D=D)
        state = start_over(state, reset_state, first)
    channel = None
    last = T * ROUND + FIRST
    if PLAN.schedule == "wgmma":
        channel = wgmma.connect(exchange, tile, PLAN=PLAN)
    elif PLAN.exchanged:
        channel = sync.connect(
            exchange, tile.head_units, PLANES=planes_of(STAGES), BLOCK_K=PLAN.block_k
        )
    if PLAN.exchanged:
        publish_tiles(
            channel, (masked(state[0], h_mask),), h_tile, FIRST, last,
            STAGE=0, STAGES=STAGES, PLAN=PLAN,
        )  # fmt: skip

    for step in range(T):
        rows = row_of(t, tile, offsets_ptr, stride_t, stride_b)
        active = tile.batch_mask
        if lengths_ptr is not None:
            active = tile.batch_mask & (t < tile.length)
        exists = tile.mask
        h_exists = h_tile.mask
        if offsets_ptr is not None:
            exists = tile.mask & active
            h_exists = h_tile.mask & active

        # What the cell needs is asked for before anything is waited for. Not in the step before:
        # what goes round the loop is packed, and so waited for, at its end.
        x_gates = load_planes(x_gates_ptr, rows, tile, exists, D=D, PLANES=G, H=H)
        if ops.reset is not None:
            ahead = tile.batch_mask & (step + 1 + (tile.length & 0) < T)
            t_next = tl.where(step + 1 < T, t + 1 - 2 * tile.reverse, t)  # a step that there is
            next_rows = row_of(t_next, tile, offsets_ptr, stride_t, stride_b)
            begins = load_begins(ops, next_rows, ahead, tile, D=D)

        exchanged = step * ROUND + FIRST  # the step of the exchange that is received next
        new = state
        saved = ()
        published = ()
        for s in tl.static_range(COUNT):
            planes = to_exchange(new, h_mask, matrices[s], STAGE=stage_at(STAGES, s))
            if s > 0:
                if not STAGES[s].mean:
                    published = published + planes
                if PLAN.exchanged:
                    publish_tiles(
                        channel, planes, tile, exchanged + s, last, STAGE=s, STAGES=STAGES,
                        PLAN=PLAN,
                    )  # fmt: skip
            new, more = run_stage(
                x_gates, planes, new, bias, params, channel, weights[s], matrices[s], tile,
                exchanged + s, BODY=bodies[s], STAGE=stage_at(STAGES, s), STAGES=STAGES,
                PRECISION=PRECISION, PLAN=PLAN,
            )  # fmt: skip
            saved = saved + more
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
            publish_tiles(
                channel, (masked(state[0], h_mask),), h_tile, exchanged + ROUND, last,
                STAGE=0, STAGES=STAGES, PLAN=PLAN,
            )  # fmt: skip

        # While the others catch up: write what only later launches read.
        store_planes(output_ptr, (new[0],), rows, h_tile, active, h_exists, D=D, H=P)
        if saved_ptr is not None:
            store_planes(saved_ptr, saved, rows, tile, active, exists, D=D, H=H)
        if published_ptr is not None:
            store_planes(published_ptr, published, rows, tile, active, exists, D=D, H=H)
        if states_ptr is not None:
            store_planes(states_ptr, new[1:], rows, tile, active, exists, D=D, H=H)
        t += 1 - 2 * tile.reverse

    store_states(final_ptrs, state, h_tile, tile)
    if PLAN.exchanged:
        sync.report(channel)


# The same loop in Gluon, for plans whose schedule needs layouts of its own (`wgmma`).
scan_forward_gluon: Any = None
if gluon is not None:
    scan_forward_gluon = gluon.jit(
        scan_forward_kernel.fn,
        do_not_specialize=["T", "B", "first_b", "first_lane", "reverse", "stride_t", "stride_b"],
    )
