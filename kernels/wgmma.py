"""The recurrent product of a forward step by warp groups, in Gluon, for compute capability 9.0.

    sums[gate, unit, row] = W[gate, unit, :] @ h[row, :]^T

Hopper's wgmma multiplies twice as fast as the instructions that `tl.dot` compiles to for so few
rows. It takes 64 rows of its *left* operand at once, from registers if one likes. So the weights
stand on the left: 16 units of four gates (where there are fewer, zeros), which stay where they are
for the whole sequence. h stands on the right, where wgmma reads from shared memory, and what is
polled goes there first. All else is the loop of `scan_forward`, compiled by Gluon, which lets us
say how tiles lie in registers and in shared memory:

    weights, a chunk          [4 x 16, PART]: (gate, unit), unit of K
    shared memory, a chunk    [2 x block_b, PART]: (group, row), unit of K; swizzled by 128 bytes
    sums                      [4 x 16, 2 x block_b]: (gate, unit), (group, row)
    tile, as the cell has it  [block_b, 16]: row, unit

Two groups of four warps share out every chunk of K. No layout of Gluon says so: it takes the left
operand for the same in both groups, and the right one for a matrix of 2 x block_b columns. But
what a group loads is its own part (`warp_group`), and its columns are the rows of h at that part's
units. So nothing may move the left operand from thread to thread: one group's registers would be
taken for the other's. `layout.check` looks at the compiled code for that.

A slot of the ring is [block_b, K], row by row: the swizzle does what `fragments` does for the other
schedules. Each thread polls 16 bytes of a chunk, or twice 16.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import pitch


def jit(function: Callable[..., Any]) -> Any:
    """`gluon.jit`, whose own type says nothing of what it makes."""
    return gluon.jit(function)


GROUPS = tl.constexpr(2)
UNITS = tl.constexpr(16)  # of a program
GATES = tl.constexpr(4)
LANES, WARPS = tl.constexpr(32), tl.constexpr(8)

# --- layouts -----------------------------------------------------------------------------------


@triton.constexpr_function
def part_of(PLAN):
    """Units of a chunk that a group multiplies: so many that no thread is without a vector."""
    return PLAN.block_k // GROUPS.value


@triton.constexpr_function
def accumulator(PLAN):
    """Of the sums [64, GROUPS * block_b]: (gate, unit) by (group, row)."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, PLAN.block_b, 16]
    )


@triton.constexpr_function
def left_operand(PLAN):
    return gl.DotOperandLayout(0, accumulator(PLAN), 2)


@triton.constexpr_function
def bases(block_b):
    """(row, unit) of the bits of a thread's number and of its elements', for a tile [block_b, 16].

    16 lanes side by side hold the units of a row, which are stored as one sector of L2. Row 4 goes
    to the lanes, so that a warp reads the sums from all banks.
    """
    rows = [row for row in (1, 2, 8, 16) if row < block_b]
    lanes = [[0, 1], [0, 2], [0, 4], [0, 8], [4, 0]]
    warps = [[row, 0] for row in rows[:3]] + [[0, 0]] * (3 - len(rows))
    return [[row, 0] for row in rows[3:]], lanes, warps


@triton.constexpr_function
def tile_layout(PLAN):
    """Of a program's tile [block_b, 16]."""
    return gl.DistributedLinearLayout(*bases(PLAN.block_b), [], [PLAN.block_b, UNITS.value])


@triton.constexpr_function
def sums_layout(PLAN):
    """Of the sums, [64, GROUPS * block_b], each thread with those of its elements of the tile."""
    registers, lanes, warps = ([[unit, row] for row, unit in part] for part in bases(PLAN.block_b))
    groups_and_gates = [[0, PLAN.block_b], [16, 0], [32, 0]]
    shape = [GATES.value * UNITS.value, GROUPS.value * PLAN.block_b]
    return gl.DistributedLinearLayout(groups_and_gates + registers, lanes, warps, [], shape)


@triton.constexpr_function
def polled_layout(PLAN):
    """Of the vectors of 16 bytes, rows by vectors of a row, of which each thread has one."""
    vectors = part_of(PLAN) // 8
    return gl.BlockedLayout([1, 1], [LANES.value // vectors, vectors], [WARPS.value, 1], [1, 0])


WORDS_IN_SHARED = tl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))
CHUNK_IN_SHARED = tl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
SUMS_IN_SHARED = tl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [0, 1]))


@jit
def along_units(PLAN: tl.constexpr):
    """Indices of a tile's units."""
    return gl.arange(0, PLAN.block_h, layout=gl.SliceLayout(0, tile_layout(PLAN)))


@jit
def along_batch(PLAN: tl.constexpr):
    """Indices of a tile's rows."""
    return gl.arange(0, PLAN.block_b, layout=gl.SliceLayout(1, tile_layout(PLAN)))


@jit
def vectors(PLAN: tl.constexpr):
    """Offset of each thread's vector of a chunk, in a slot; a thread has another one in the second
    group's units, where there are more rows than threads for them."""
    PART: tl.constexpr = part_of(PLAN)
    LAYOUT: tl.constexpr = polled_layout(PLAN)
    LENGTH: tl.constexpr = PLAN.chunks * PLAN.block_k
    index = gl.arange(0, 2048 // PART, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    vector = gl.arange(0, PART // 8, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return index % PLAN.block_b * LENGTH + index // PLAN.block_b * PART + vector * 8


@jit
def connect(exchange, tile, PLAN: tl.constexpr):
    """The channel of a program, as `sync.connect`. A slot holds rows of h, one after the other."""
    ring, signal = sync.part_of_group(exchange)
    rows = along_batch(PLAN)[:, None] * (PLAN.chunks * PLAN.block_k)
    return sync.Channel(
        ring, signal, exchange.error, exchange.spin_limit, (rows + tile.head_units,),
        vectors(PLAN), shared_memory(PLAN),
    )  # fmt: skip


@jit
def shared_memory(PLAN: tl.constexpr):
    """What a step goes through: the chunks of h, and the sums. Each chunk is allocated apart:
    between stores into one allocation the compiler would put barriers."""
    CHUNKS: tl.constexpr = PLAN.chunks
    COLUMNS: tl.constexpr = GROUPS * PLAN.block_b
    WORDS: tl.constexpr = part_of(PLAN) // 2
    memory = ()
    for _ in tl.static_range(CHUNKS):
        memory = memory + (gl.allocate_shared_memory(gl.int32, [COLUMNS, WORDS], WORDS_IN_SHARED),)
    sums = gl.allocate_shared_memory(gl.float32, [GATES * UNITS, COLUMNS], SUMS_IN_SHARED)
    return memory + (sums,)


@triton.constexpr_function
def offsets_of(COUNT, EACH, PLAN):
    """Bytes from a thread's first vector to each of them."""
    stride = 2 * PLAN.block_k
    return [n * stride + each * stride // 2 for n in range(COUNT) for each in range(EACH)]


@jit
def poll(
    channel, slot_ptr, step, arrived,
    COUNT: tl.constexpr, EACH: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Four words of 32 bits for each of a thread's vectors, EACH of COUNT chunks: `sync.load`."""
    at = channel.loaded
    nothing = at & 0
    OFFSETS: tl.constexpr = offsets_of(COUNT, EACH, PLAN)
    return gl.inline_asm_elementwise(
        sync.assembly(OFFSETS, 1, 8, True, 1, 0),
        sync.operands(COUNT * EACH, 1, 1, 0),
        [
            (slot_ptr + at).to(gl.int64),
            (channel.signal + nothing).to(gl.int64),
            channel.spin_limit + nothing,
            step + nothing,
            arrived + nothing,
        ],
        dtype=sync.types(4 * COUNT * EACH, gl.int32),
        is_pure=False,
        pack=1,
    )


# --- the product -------------------------------------------------------------------------------


@jit
def warp_group():
    """0 or 1: which warp group a thread belongs to. A scalar, so that loads by it stay loads of
    neighbours; nothing makes it the same in all threads."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 thread; mov.u32 thread, %tid.x; shr.u32 $0, thread, 7; }",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@jit
def load_weights(w_ptr, tile, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """The left operands of all chunks, [64, PART] each: 0 beyond the matrices' sizes."""
    CHUNKS: tl.constexpr = PLAN.chunks
    PART: tl.constexpr = part_of(PLAN)
    PITCH: tl.constexpr = pitch(STAGE.k)
    LAYOUT: tl.constexpr = left_operand(PLAN)
    row = gl.arange(0, GATES * UNITS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    k = gl.arange(0, PART, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    k += warp_group() * PART
    unit = tile.first_unit + row % UNITS
    exists = (row < STAGE.results * UNITS) & (unit < STAGE.units)
    base = w_ptr + (row // UNITS * STAGE.units + unit) * PITCH + k
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        there = exists & (k + chunk * PLAN.block_k < PITCH)
        weights = weights + (gl.load(base + chunk * PLAN.block_k, mask=there, other=0.0),)
    return weights


# Triton 3.9 has dropped the underscore.
_UNDERSCORE = tl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))


@jit
def elements(chunk, DTYPE: tl.constexpr):
    """A chunk's words as elements of 16 bits."""
    COLUMNS: tl.constexpr = chunk.shape[0]
    PART: tl.constexpr = 2 * chunk.shape[1]
    if _UNDERSCORE:
        found = chunk._reinterpret(DTYPE, [COLUMNS, PART], CHUNK_IN_SHARED)
    else:
        found = chunk.reinterpret(DTYPE, [COLUMNS, PART], CHUNK_IN_SHARED)
    return found


@jit
def rows_of(words, FIRST: tl.constexpr):
    """Four words of every thread as a tile, rows by words."""
    even = gl.join(words[FIRST], words[FIRST + 2])
    odd = gl.join(words[FIRST + 1], words[FIRST + 3])
    tile = gl.join(even, odd)
    return gl.reshape(tile, [tile.shape[0], tile.shape[1] * 4])


@jit
def product(channel, weights, step, SLOT: tl.constexpr, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """The sums of a stage, [block_b, 16] each, with what was published as `step`."""
    CHUNKS: tl.constexpr = PLAN.chunks
    COUNT: tl.constexpr = PLAN.prefetch
    EACH: tl.constexpr = 2 if PLAN.block_b == 32 else 1
    DTYPE: tl.constexpr = channel.ring.dtype.element_ty
    shared = channel.anchor
    slot_ptr = channel.ring + sync.slot(step) * SLOT
    for first in tl.static_range(0, CHUNKS, COUNT):
        words = poll(
            channel, slot_ptr + first * PLAN.block_k, step,
            sync.arrivals(step, gl.num_programs(0)) if first == 0 else 0,
            COUNT=min(COUNT, CHUNKS - first), EACH=EACH, PLAN=PLAN,
        )  # fmt: skip
        for chunk in tl.static_range(first, min(first + COUNT, CHUNKS)):
            rows = rows_of(words, FIRST=4 * EACH * (chunk - first))
            if EACH == 2:
                both = gl.join(rows, rows_of(words, FIRST=4 * EACH * (chunk - first) + 4))
                rows = gl.reshape(gl.permute(both, [2, 0, 1]), [2 * both.shape[0], both.shape[1]])
            shared[chunk].store(rows)
    hopper.fence_async_shared()
    BLOCK_B: tl.constexpr = PLAN.block_b
    total = gl.zeros([GATES * UNITS, GROUPS * BLOCK_B], gl.float32, accumulator(PLAN))
    for chunk in tl.static_range(CHUNKS):
        right = elements(shared[chunk], DTYPE)
        total = hopper.warpgroup_mma(
            weights[chunk], right.permute([1, 0]), total, use_acc=chunk > 0, is_async=True
        )
    total = hopper.warpgroup_mma_wait(0, deps=[total])
    shared[CHUNKS].store(total)
    sums = gl.reshape(shared[CHUNKS].load(sums_layout(PLAN)), [2, 2, UNITS, GROUPS, BLOCK_B])
    # row, unit, bits 0 and 1 of the gate
    first_group, second_group = gl.split(gl.permute(sums, [4, 2, 1, 0, 3]))
    low, high = gl.split(first_group + second_group)
    gates = gl.split(low) + gl.split(high)
    RESULTS: tl.constexpr = STAGE.results
    found = ()
    for gate in tl.static_range(RESULTS):
        tile = gl.convert_layout(gates[gate], tile_layout(PLAN), assert_trivial=True)
        found = found + (tile,)
    return found
