"""The product that a stage of a cell receives in one step, forward and backward.

    forward   sums[g] = h @ W[g]^T          one left operand, as many results as the stage has gates
    backward  sums[0] = sum_g dh_g @ W[g]   so many left operands, one result
    mean      sums[i] = x_i @ 1 / K         in both passes: a product with ones, without memory
    diagonal  as the first two, with a vector for each W[g]: nothing is exchanged

The left operands are PLANES tiles of [BLOCK_B, H]; the result is summed over K in chunks of
BLOCK_K = 16 * SPLIT. Each of SPLIT groups of warps sums 16 units of every chunk by itself, as a
batched product [SPLIT, BLOCK_B, 16] @ [SPLIT, 16, BLOCK_H], and their sums are added once, at the
end. Every chunk has a right operand for each gate: those of the resident first chunks were loaded
before the time loop and stay in registers, those of the others are read in each step, past
nothing: L1 keeps as many as it can.

W has K innermost in both passes: backward, each gate's matrix was transposed before the launch.
"""

import triton
import triton.language as tl

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import BLOCK, lhs_operand, load_rhs_operand, pitch
from fusedrnn.kernels.tiles import load_vectors, of_direction
from fusedrnn.kernels.with_gluon import wgmma, wgmma_backward


@triton.jit
def matrices_of(w_ptrs, tile, STAGE: tl.constexpr):
    """Where the stage's matrices of a program's lane begin; w_ptrs: for each direction [heads,
    matrices, units, pitch]: matrix, the program's unit, unit of K."""
    skipped = tile.head * STAGE.matrices + STAGE.first_matrix
    return of_direction(w_ptrs, tile) + skipped * (STAGE.units * row_length(STAGE))


@triton.jit
def load_weights(w_ptr, tile, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """The right operands that are loaded once: of the resident chunks; of a program that owns all
    units, tiles [BLOCK_H, BLOCK_H], units of K by the program's units; of a diagonal, vectors.

    w_ptr: as `matrices_of` returns it.
    """
    COUNT: tl.constexpr = min(PLAN.resident, chunks_of(STAGE, PLAN))
    MATRICES: tl.constexpr = STAGE.pairs
    PITCH: tl.constexpr = pitch(STAGE.k)
    weights = ()
    if STAGE.diagonal:
        weights = load_vectors((w_ptr,), tile, PLANES=MATRICES, H=STAGE.units)
    elif PLAN.schedule == "wgmma":
        weights = wgmma.load_weights(w_ptr, tile, STAGE=STAGE, PLAN=PLAN)
    elif PLAN.schedule == "wgmma_scatter":
        weights = wgmma_backward.load_weights(w_ptr, tile, STAGE=STAGE, PLAN=PLAN)
    elif PLAN.exchanged:
        for chunk in tl.static_range(COUNT):
            weights = weights + load_chunk(w_ptr, chunk, tile, STAGE=STAGE, PLAN=PLAN)
    else:
        units = tl.arange(0, PLAN.block_h)
        mask = (units[:, None] < STAGE.k) & (units[None, :] < STAGE.units)
        for g in tl.static_range(MATRICES):
            offs = g * STAGE.units * PITCH + units[None, :] * PITCH + units[:, None]
            weights = weights + (tl.load(w_ptr + offs, mask=mask, other=0.0),)
    return weights


@triton.jit
def load_chunk(w_ptr, chunk, tile, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """The right operands of one chunk, 0 beyond the matrices' sizes."""
    MATRICES: tl.constexpr = STAGE.pairs
    weights = ()
    for g in tl.static_range(MATRICES):
        rhs = load_rhs_operand(
            w_ptr + g * STAGE.units * pitch(STAGE.k), chunk * PLAN.block_k, tile.first_unit,
            STAGE=STAGE, PLAN=PLAN,
        )  # fmt: skip
        weights = weights + (rhs,)
    return weights


@triton.jit
def multiply(lhs, weights, sums, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """sums[i] + lhs @ weights[FIRST + i], for all i.

    PRECISION, of float32, is "tf32" or "ieee". Tensor cores know only the first, which has 11 bits.
    So for the second each factor is split, and three products are added: of the upper parts, and of
    each with the other's rest. That loses at most 5 * 2^-22 of every product: of both rests what is
    beyond 11 bits, and the product of the two.
    """
    EXACT: tl.constexpr = PRECISION == "ieee" and lhs.dtype == tl.float32
    if EXACT:
        whole = lhs
        lhs, lhs_rest = split_tf32(whole)
        lhs_rest = tl.where(whole == lhs, 0.0, lhs_rest)  # h may be infinite, weights may not
    totals = ()
    for i in tl.static_range(len(sums)):
        rhs = weights[FIRST + i]
        total = sums[i]
        if EXACT:
            rhs, rhs_rest = split_tf32(rhs)
            total = tl.dot(lhs_rest, rhs, total, input_precision="tf32")
            total = tl.dot(lhs, rhs_rest, total, input_precision="tf32")
        totals = totals + (tl.dot(lhs, rhs, total, input_precision="tf32"),)
    return totals


@triton.jit
def add_up(lhs, totals, PLANE: tl.constexpr):
    """totals[PLANE] + the sums over K of lhs, in every column; of float32 as `multiply` does it
    exactly."""
    total = totals[PLANE]
    ones = tl.full([lhs.shape[0], lhs.shape[2], total.shape[2]], 1.0, tl.float32).to(lhs.dtype)
    if lhs.dtype == tl.float32:
        whole = lhs
        lhs, rest = split_tf32(whole)
        rest = tl.where(whole == lhs, 0.0, rest)
        total = tl.dot(rest, ones, total, input_precision="tf32")
    total = tl.dot(lhs, ones, total, input_precision="tf32")
    return totals[:PLANE] + (total,) + totals[PLANE + 1 :]


@triton.jit
def split_tf32(x):
    """float32 rounded to 11 bits, as tensor cores take them, and what that leaves."""
    upper = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return upper, x - upper


@triton.jit
def hide_invariance(weights):
    """The same values, of which the compiler does not know that they are loop-invariant. It would
    else hoist `split_tf32` of weights out of the time loop, into registers that there are not."""
    hidden = ()
    for i in tl.static_range(len(weights)):
        tile = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [weights[i]], dtype=tl.float32, is_pure=False, pack=1
        )
        hidden = hidden + (tile,)
    return hidden


@triton.jit
def recurrent_matmul(
    planes, channel, weights, w_ptr, tile, step,
    STAGE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The product with what all units of a batch tile were at `step`; NaN after a time-out.

    planes: the program's tiles [BLOCK_B, BLOCK_H]. channel: None where one program owns all units.
    weights: as `load_weights` returns them. w_ptr: where those of the other chunks are.
    """
    if PLAN.schedule == "wgmma":
        sums = wgmma.product(
            channel, weights, step, SLOT=slot_size(STAGES, PLAN), STAGE=STAGE, PLAN=PLAN
        )
    elif PLAN.schedule == "wgmma_scatter":  # multiplied by those who published
        sums = wgmma_backward.gather(channel, step, PLAN=PLAN)
    elif PLAN.exchanged:
        sums = gathered_matmul(
            channel, weights, w_ptr, tile, step,
            STAGE=STAGE, STAGES=STAGES, PRECISION=PRECISION, PLAN=PLAN,
        )  # fmt: skip
    elif STAGE.mean:
        sums = local_sums(planes, tile)
    elif STAGE.diagonal:
        sums = diagonal_product(planes, weights, STAGE=STAGE)
    else:
        sums = local_matmul(planes, weights, STAGE=STAGE, PRECISION=PRECISION)
    if STAGE.mean:
        means = ()
        for i in tl.static_range(len(sums)):
            means = means + (sums[i] * (1.0 / STAGE.k),)
        sums = means
    return sums


@triton.jit
def diagonal_product(planes, weights, STAGE: tl.constexpr):
    """What each unit gives to itself alone."""
    PLANES: tl.constexpr = STAGE.planes
    RESULTS: tl.constexpr = STAGE.results
    sums = ()
    for i in tl.static_range(RESULTS):
        total = planes[0].to(tl.float32) * weights[i]
        for k in tl.static_range(1, PLANES):
            total += planes[k].to(tl.float32) * weights[k]
        sums = sums + (total,)
    return sums


@triton.jit
def local_sums(planes, tile):
    """Of each tile the sum over its units, where one program owns all of them."""
    sums = ()
    for i in tl.static_range(len(planes)):
        x = tl.where(tile.unit_mask, planes[i].to(tl.float32), 0.0)
        total = tl.sum(x, axis=1, keep_dims=True)
        sums = sums + (tl.broadcast_to(total, x.shape),)
    return sums


@triton.jit
def local_matmul(planes, weights, STAGE: tl.constexpr, PRECISION: tl.constexpr):
    """The product where one program owns all units, and K is a single chunk of BLOCK_H."""
    PLANES: tl.constexpr = STAGE.planes
    RESULTS: tl.constexpr = STAGE.results
    sums = ()
    for _ in tl.static_range(RESULTS):
        sums = sums + (tl.zeros([planes[0].shape[0], planes[0].shape[1]], tl.float32),)
    for plane in tl.static_range(PLANES):
        sums = multiply(planes[plane], weights, sums, FIRST=plane, PRECISION=PRECISION)
    return sums


@triton.jit
def gathered_matmul(
    channel, weights, w_ptr, tile, step,
    STAGE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The product with what all programs of the group published as `step`."""
    BLOCK_B: tl.constexpr = PLAN.block_b
    BLOCK_H: tl.constexpr = PLAN.block_h
    SPLIT: tl.constexpr = PLAN.split_k
    PLANES: tl.constexpr = STAGE.planes
    RESULTS: tl.constexpr = STAGE.results
    MATRICES: tl.constexpr = STAGE.pairs
    CHUNKS: tl.constexpr = chunks_of(STAGE, PLAN)
    RESIDENT: tl.constexpr = min(PLAN.resident, CHUNKS)
    PREFETCH: tl.constexpr = PLAN.prefetch
    sums = ()
    for _ in tl.static_range(RESULTS):
        sums = sums + (tl.zeros([SPLIT, BLOCK_B, BLOCK_H], tl.float32),)
    slot_ptr = channel.ring + sync.slot(step) * slot_size(STAGES, PLAN)
    coming = ()
    STREAMED: tl.constexpr = RESIDENT < CHUNKS and not STAGE.mean
    if STREAMED:
        coming = load_chunk(w_ptr, RESIDENT, tile, STAGE=STAGE, PLAN=PLAN)
    for first in tl.static_range(0, CHUNKS, PREFETCH):
        # The left operands of all these chunks are on their way before the first is looked at:
        # one trip to L2, which is far longer than the products.
        loaded = sync.load(
            channel,
            slot_ptr + first * PLANES * SPLIT * BLOCK,
            step,
            sync.arrivals(step, tl.num_programs(0)) if first == 0 else 0,
            COUNT=min(PREFETCH, CHUNKS - first) * PLANES,
            STRIDE=SPLIT * BLOCK,
            WARPS=SPLIT,
            PAIRWISE=PLAN.pairwise,
        )
        for chunk in tl.static_range(first, min(first + PREFETCH, CHUNKS)):
            rhs = weights[chunk * MATRICES : (chunk + 1) * MATRICES]
            if PRECISION == "ieee" and w_ptr.dtype.element_ty == tl.float32:
                rhs = hide_invariance(rhs)
            if STREAMED and chunk >= RESIDENT:
                rhs = coming
                if chunk + 1 < CHUNKS:  # is on its way while this one is multiplied
                    coming = load_chunk(w_ptr, chunk + 1, tile, STAGE=STAGE, PLAN=PLAN)
            for plane in tl.static_range(PLANES):
                lhs = lhs_operand(loaded[(chunk - first) * PLANES + plane], SPLIT=SPLIT)
                if STAGE.mean:
                    sums = add_up(lhs, sums, PLANE=plane)
                else:
                    sums = multiply(lhs, rhs, sums, FIRST=plane, PRECISION=PRECISION)
    return reduce_split_k(sums, SPLIT=SPLIT)


@triton.constexpr_function
def stage_at(STAGES, s):
    """STAGES[s], which Triton 3.6 does not take for a constant."""
    return STAGES[s]


@triton.constexpr_function
def sums_of(STAGES):
    """How many sums all stages receive through matrices of gates or of their own."""
    return sum(stage.sums for stage in STAGES)


@triton.constexpr_function
def planes_of(STAGES):
    """How many tiles are exchanged before each stage."""
    return tuple(stage.planes for stage in STAGES)


@triton.constexpr_function
def round_of(STAGES):
    """Steps of the exchange from one time step to the next: as many as stages, or a few more, so
    that it is a power of two."""
    return 1 << (len(STAGES) - 1).bit_length()


@triton.constexpr_function
def first_of(STAGES):
    """The first step of the exchange: such that the last stage's are multiples of `round_of`."""
    return (1 << (len(STAGES) - 1).bit_length()) - len(STAGES) + 1


@triton.constexpr_function
def chunks_of(STAGE, PLAN):
    """Chunks of K: the stage's own, which may be narrower than the layer."""
    return -(-STAGE.k // PLAN.block_k)


@triton.constexpr_function
def row_length(STAGE):
    """Elements from one unit to the next, where W is read."""
    return 1 if STAGE.diagonal else pitch(STAGE.k)


@triton.constexpr_function
def slot_size(STAGES, PLAN):
    """Elements of a slot: what a group exchanges before the stage that receives most."""
    return PLAN.block_b * max(stage.planes for stage in STAGES) * PLAN.chunks * PLAN.block_k


@triton.constexpr_function
def halvings(n):
    """How often n, a power of two, can be halved."""
    return n.bit_length() - 1


@triton.jit
def reduce_split_k(sums, SPLIT: tl.constexpr):
    """The finished sums, [BLOCK_B, BLOCK_H] each.

    The groups of warps hand each other their sums through shared memory: of up to four gates
    at a time, so that they meet once for all of them.
    """
    totals = ()
    COUNT: tl.constexpr = len(sums)
    for i in tl.static_range(0, COUNT - COUNT % 4, 4):
        joined = tl.join(tl.join(sums[i], sums[i + 1]), tl.join(sums[i + 2], sums[i + 3]))
        left, right = tl.split(fold(joined))
        first, second = tl.split(left)
        third, fourth = tl.split(right)
        totals = totals + (first, second, third, fourth)
    FIRST: tl.constexpr = COUNT - COUNT % 4
    if COUNT % 4 >= 2:
        first, second = tl.split(fold(tl.join(sums[FIRST], sums[FIRST + 1])))
        totals = totals + (first, second)
    if COUNT % 2 == 1:
        totals = totals + (fold(sums[COUNT - 1]),)
    return totals


@triton.jit
def fold(x):
    """The sum over the first axis.

    Not tl.sum, which sends partial sums through shared memory in a layout with bank conflicts:
    here the axis comes to lie within each thread, in one change of layout.
    """
    SPLIT: tl.constexpr = x.shape[0]
    COUNT: tl.constexpr = x.numel // SPLIT
    y = tl.trans(tl.reshape(x, (SPLIT, COUNT)))
    for i in tl.static_range(halvings(SPLIT) - 1):
        left, right = tl.split(tl.reshape(y, (COUNT, SPLIT >> (i + 1), 2)))
        y = left + right
    if SPLIT > 1:
        left, right = tl.split(y)
        y = left + right
    return tl.reshape(y, x.shape[1:])
