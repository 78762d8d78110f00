"""The recurrent product of a backward step by warp groups, in Gluon, for compute capability 9.0.

    parts[unit, row] = W[:, :, unit] @ d_gates[row, :, :]     over gates and the program's own units
    dh[row, unit] = the sum of all programs' parts

Forward, everybody needs the h of all units. Backward the same would bring everybody the gradients
of all gates. So here the product comes first: a program multiplies the gradients of its own 16
units, which nobody else needs, by its own rows of W, which have stayed in its registers. That gives
a part of dh of every unit. It hands each part to the program that owns those units (`scatter`),
which adds up what it gets (`gather`): of four gates a quarter of the bytes, and no less work.

    weights, a chunk          [128, 4 x 16]: unit of dh, (gate, own unit)
    shared memory, gates      [block_b, 4 x 16]: row, (gate, own unit); swizzled by 128 bytes
    parts, a chunk            [128, block_b]: unit of dh, row; 16 units to each of 8 warps
    sums, in shared memory    [8 x 16, block_b]: (warp, own unit), row

A warp has all of what goes to one owner, 8 elements a lane for 16 rows: its sums leave as the
product made them, rounded to 16 bits, in one store of 16 bytes a lane. The owner's warps read the
parts as they were stored, an eighth of the programs each, add them in float32 and meet in shared
memory. A slot is [owner, program, block_b / 16, lane, 8].

A part has one writer and one reader, and there are two slots. What marks it as new is the lowest
bit of every 16 bytes, which alternates from one use of the slot to the next; the element that gives
it loses its last bit to its neighbour (`hand_over`), and nothing is ever put back. Whoever writes
step s + 2 over step s has received everybody's parts of step s + 1, and those were made from all
parts of step s. So this rests on three things alone, all of PTX's memory model: accesses of .b128
are not torn, those to one place are seen in one order, and no load sees a store that depends on it.
No step needs a fence, a counter, or two stores in order.
"""

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import pitch
from fusedrnn.kernels.wgmma import (
    GATES,
    LANES,
    SUMS_IN_SHARED,
    UNITS,
    WARPS,
    bases,
    jit,
    tile_layout,
)

CHUNK = tl.constexpr(128)  # units of dh: 16 of each warp
VECTOR = tl.constexpr(8)  # elements in 16 bytes
THREADS = tl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
GATES_IN_SHARED = tl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))

# --- layouts -----------------------------------------------------------------------------------


@triton.constexpr_function
def accumulator(PLAN):
    """Of the parts [128, block_b]."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, PLAN.block_b, 16]
    )


@triton.constexpr_function
def left_operand(PLAN):
    return gl.DotOperandLayout(0, accumulator(PLAN), 2)


@triton.constexpr_function
def sums_layout(PLAN):
    """Of the sums [8 * 16, block_b], each thread with those of all warps for its elements of the
    tile."""
    registers, lanes, warps = ([[unit, row] for row, unit in part] for part in bases(PLAN.block_b))
    of_warps = [[16, 0], [32, 0], [64, 0]]
    return gl.DistributedLinearLayout(
        of_warps + registers, lanes, warps, [], [CHUNK.value, PLAN.block_b]
    )


@triton.constexpr_function
def vectors_of(PLAN):
    """Vectors of 16 bytes that a lane has of each part."""
    return PLAN.block_b // 16


@triton.constexpr_function
def part_size(PLAN):
    """Elements of a part."""
    return UNITS.value * PLAN.block_b


@triton.constexpr_function
def programs_of(PLAN):
    """Programs of a group: a multiple of 8, the last of them perhaps without any units."""
    return PLAN.chunks * WARPS.value


@triton.constexpr_function
def part_slot_size(PLAN):
    """Elements of a slot."""
    return programs_of(PLAN) ** 2 * part_size(PLAN)


@jit
def connect(exchange, PLAN: tl.constexpr):
    """The channel of a program: where a thread's vector is stored for the first chunk's owner, and
    where its first one for this program is."""
    ring, signal = sync.part_of_group(exchange)
    thread = gl.arange(0, WARPS * LANES, layout=THREADS)
    warp, lane = thread // LANES, thread % LANES
    own = gl.program_id(0)
    PROGRAMS: tl.constexpr = programs_of(PLAN)
    SIZE: tl.constexpr = part_size(PLAN)
    stored = (warp * PROGRAMS + own) * SIZE + lane * VECTOR
    loaded = (own * PROGRAMS + warp) * SIZE + lane * VECTOR
    DTYPE: tl.constexpr = exchange.ring.dtype.element_ty
    gates = gl.allocate_shared_memory(DTYPE, [PLAN.block_b, GATES * UNITS], GATES_IN_SHARED)
    sums = gl.allocate_shared_memory(gl.float32, [CHUNK, PLAN.block_b], SUMS_IN_SHARED)
    return sync.Channel(
        ring, signal, exchange.error, exchange.spin_limit, (stored,), loaded, (gates, sums)
    )


@jit
def slot(step):
    """Index of the ring slot that holds `step`, counted from 1."""
    return tl.cast(step, tl.int32) % 2


@jit
def mark(step):
    """The lowest bit of what is new in the slot of `step`: 1 in its first use, then 0, and so on"""
    return (tl.cast(step, tl.int32) + 1) // 2 % 2


# --- the product, and handing it out ------------------------------------------------------------


@jit
def load_weights(w_ptr, tile, STAGE: tl.constexpr, PLAN: tl.constexpr):
    """The left operands of all chunks, [128, 64] each: 0 beyond the matrices' sizes."""
    CHUNKS: tl.constexpr = PLAN.chunks
    PITCH: tl.constexpr = pitch(STAGE.k)
    LAYOUT: tl.constexpr = left_operand(PLAN)
    unit = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    k = gl.arange(0, GATES * UNITS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    gate, own = k // UNITS, tile.first_unit + k % UNITS
    exists = (gate < STAGE.planes) & (own < STAGE.k)
    base = w_ptr + gate * (STAGE.units * PITCH) + unit * PITCH + own
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        there = exists & (unit + chunk * CHUNK < STAGE.units)
        weights = weights + (gl.load(base + chunk * CHUNK * PITCH, mask=there, other=0.0),)
    return weights


@jit
def side_by_side(planes):
    """Up to four tiles [block_b, 16] as one [block_b, 64], with zeros for what is missing."""
    COUNT: tl.constexpr = len(planes)
    gates = planes
    nothing = gl.where(planes[0] == planes[0], 0.0, 0.0).to(planes[0].dtype)
    for _ in tl.static_range(4 - COUNT):
        gates = gates + (nothing,)
    joined = gl.join(gl.join(gates[0], gates[2]), gl.join(gates[1], gates[3]))
    joined = gl.permute(gl.reshape(joined, [joined.shape[0], UNITS, GATES]), [0, 2, 1])
    return gl.reshape(joined, [joined.shape[0], GATES * UNITS])


@jit
def scatter(channel, planes, weights, step, PLAN: tl.constexpr):
    """Multiplies the program's tiles, [block_b, 16] of each gate, and hands the parts of dh to the
    owners, as `step`."""
    CHUNKS: tl.constexpr = PLAN.chunks
    COUNT: tl.constexpr = PLAN.prefetch
    gates = channel.anchor[0]
    gates.store(side_by_side(planes))
    hopper.fence_async_shared()
    to_ptr = channel.ring + slot(step) * part_slot_size(PLAN) + channel.stored[0]
    for first in tl.static_range(0, CHUNKS, COUNT):
        some = weights[first : min(first + COUNT, CHUNKS)]
        offs = first * (WARPS * programs_of(PLAN) * part_size(PLAN))
        multiply_and_hand_over(to_ptr + offs, gates, some, mark(step), PLAN=PLAN)


@jit
def multiply_and_hand_over(to_ptr, gates, weights, mark, PLAN: tl.constexpr):
    """Some chunks, the first of whose parts are on their way while the others are multiplied."""
    COUNT: tl.constexpr = len(weights)
    OWNERS: tl.constexpr = WARPS * programs_of(PLAN) * part_size(PLAN)  # from chunk to chunk
    BLOCK_B: tl.constexpr = PLAN.block_b
    nothing = gl.zeros([CHUNK, BLOCK_B], gl.float32, accumulator(PLAN))
    right = gates.permute([1, 0])
    parts = ()
    for i in tl.static_range(COUNT):
        part = hopper.warpgroup_mma(weights[i], right, nothing, use_acc=False, is_async=True)
        parts = parts + (part,)
    for i in tl.static_range(COUNT):
        part = hopper.warpgroup_mma_wait(COUNT - 1 - i, deps=[parts[i]])
        hand_over(to_ptr + i * OWNERS, of_thread(part, PLAN=PLAN), mark)


@jit
def of_thread(part, PLAN: tl.constexpr):
    """A thread's elements of a chunk's parts, [256] each: 8 of a vector, then those of the next."""
    VECTORS: tl.constexpr = vectors_of(PLAN)
    # warp, unit: high bit and others, row: vector, high bit, two others, low bit
    x = gl.reshape(part, [WARPS, 2, 8, VECTORS, 2, 4, 2])
    x = gl.permute(x, [0, 2, 5, 6, 4, 1, 3])
    found = (x,)
    if VECTORS == 1:
        found = (gl.reshape(x, [WARPS, 8, 4, 2, 2, 2]),)
    LEVELS: tl.constexpr = len(found[0].shape) - 3
    for _ in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(len(found)):
            left, right = gl.split(found[i])
            halves = halves + (left, right)
        found = halves
    flat = ()
    for i in tl.static_range(len(found)):
        x = gl.reshape(found[i], [WARPS * LANES])
        flat = flat + (gl.convert_layout(x, THREADS, assert_trivial=True),)
    return flat


@jit
def of_program(elements, PLAN: tl.constexpr):
    """The inverse of `of_thread`."""
    found = ()
    for i in tl.static_range(len(elements)):
        found = found + (gl.reshape(elements[i], [WARPS, 8, 4]),)
    LEVELS: tl.constexpr = 2 + vectors_of(PLAN)
    for _ in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(0, len(found), 2):
            pairs = pairs + (gl.join(found[i], found[i + 1]),)
        found = pairs
    (whole,) = found  # type: ignore[misc]
    x = gl.reshape(whole, [WARPS, 8, 4, 2, 2, 2, vectors_of(PLAN)])
    x = gl.permute(x, [0, 5, 1, 6, 4, 2, 3])
    return gl.reshape(x, [CHUNK, PLAN.block_b])


@triton.constexpr_function
def handing_over(dtype):
    """PTX that rounds 8 elements to 16 bits and stores them at once. Where the first one's lowest
    bit is set, the bit above it becomes set, and then the lowest bit is the mark: this moves as
    many elements up as down, none by more than a unit in its last place, and neither zero nor
    what is not finite."""
    kind = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return "\n".join(
        [
            "{ .reg .b32 word<4>, bit; .reg .b64 half<2>; .reg .b128 vector;",
            *(f"cvt.rn.{kind}.f32 word{i}, ${3 + 2 * i}, ${2 + 2 * i};" for i in range(4)),
            "shl.b32 bit, word0, 1;",
            "and.b32 bit, bit, 2;",
            "or.b32 bit, bit, $10;",
            "and.b32 word0, word0, 0xFFFFFFFE;",
            "or.b32 word0, word0, bit;",
            "mov.b64 half0, {word0, word1};",
            "mov.b64 half1, {word2, word3};",
            "mov.b128 vector, {half0, half1};",
            "st.relaxed.gpu.global.b128 [$1], vector;",
            "mov.b32 $0, 0; }",
        ]
    )


@jit
def hand_over(ptr, elements, mark):
    """Stores the vectors of `elements`, each at once."""
    TEXT: tl.constexpr = handing_over(ptr.dtype.element_ty)
    for n in tl.static_range(len(elements) // VECTOR):
        at = (ptr + n * (LANES * VECTOR)).to(gl.int64)
        gl.inline_asm_elementwise(
            TEXT,
            "=r,l,r,r,r,r,r,r,r,r,r",
            [
                at,
                elements[8 * n], elements[8 * n + 1], elements[8 * n + 2], elements[8 * n + 3],
                elements[8 * n + 4], elements[8 * n + 5], elements[8 * n + 6], elements[8 * n + 7],
                mark + (at & 0).to(gl.int32),
            ],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )  # fmt: skip


# --- adding up -----------------------------------------------------------------------------------


@triton.constexpr_function
def offsets_of(COUNT, PLAN):
    """Bytes from a thread's first vector to those of so many rounds."""
    size = 2 * part_size(PLAN)
    return [n * WARPS.value * size + v * 512 for n in range(COUNT) for v in range(vectors_of(PLAN))]


@jit
def poll(channel, slot_ptr, step, COUNT: tl.constexpr, PLAN: tl.constexpr):
    """Four words of 32 bits for each of a thread's vectors, in COUNT rounds: `sync.load`."""
    at = channel.loaded
    nothing = at & 0
    VECTORS: tl.constexpr = vectors_of(PLAN)
    OFFSETS: tl.constexpr = offsets_of(COUNT, PLAN)
    return gl.inline_asm_elementwise(
        sync.assembly(OFFSETS, 1, 8, "mark", 1, 0),
        sync.operands(COUNT * VECTORS, 1, 1, 0),
        [
            (slot_ptr + at).to(gl.int64),
            (channel.signal + nothing).to(gl.int64),
            channel.spin_limit + nothing,
            step + nothing,
            mark(step) + nothing,
        ],
        dtype=sync.types(4 * COUNT * VECTORS, gl.int32),
        is_pure=False,
        pack=1,
    )


@jit
def widened(word, dtype: tl.constexpr):
    """The two elements of 16 bits in a word, in float32."""
    if dtype == tl.bfloat16:
        low = (word << 16).to(gl.float32, bitcast=True)
        high = (word & -65536).to(gl.float32, bitcast=True)
    else:
        low = word.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        high = (word >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return low, high


@jit
def gather(channel, step, PLAN: tl.constexpr):
    """([block_b, 16],): dh as the parts of `step` have it; NaN after a time-out."""
    CHUNKS: tl.constexpr = PLAN.chunks
    COUNT: tl.constexpr = PLAN.prefetch
    EACH: tl.constexpr = 4 * vectors_of(PLAN)  # words of a part
    DTYPE: tl.constexpr = channel.ring.dtype.element_ty
    BLOCK_B: tl.constexpr = PLAN.block_b
    slot_ptr = channel.ring + slot(step) * part_slot_size(PLAN)
    sums = ()
    for first in tl.static_range(0, CHUNKS, COUNT):
        words = poll(
            channel, slot_ptr + first * (WARPS * part_size(PLAN)), step,
            COUNT=min(COUNT, CHUNKS - first), PLAN=PLAN,
        )  # fmt: skip
        for n in tl.static_range(min(COUNT, CHUNKS - first)):
            part = ()
            for i in tl.static_range(EACH):
                word = words[n * EACH + i]
                if i % 4 == 0:
                    word = word & -2  # without the mark
                part = part + widened(word, dtype=DTYPE)
            if first + n == 0:
                sums = part
            else:
                more = ()
                for i in tl.static_range(2 * EACH):
                    more = more + (sums[i] + part[i],)
                sums = more
    shared = channel.anchor[1]
    shared.store(of_program(sums, PLAN=PLAN))
    x = gl.reshape(shared.load(sums_layout(PLAN)), [2, 2, 2, UNITS, BLOCK_B])
    x = gl.permute(x, [4, 3, 2, 1, 0])
    for _ in tl.static_range(3):
        left, right = gl.split(x)
        x = left + right
    return (gl.convert_layout(x, tile_layout(PLAN), assert_trivial=True),)
