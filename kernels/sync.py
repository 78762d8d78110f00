"""How the programs of one launch hand each other what they compute.

Programs of one *group* (one batch tile, one lane) exchange a tile of `h` (forward) or of the gates'
gradients (backward) at every step; groups never wait for each other. A time loop of one stage
spells a step like this:

    channel = sync.connect(exchange, ...)
    publish h_0 as step 1, as below
    for t in range(T):
        slot_ptr = channel.ring + sync.slot(t + 1) * SLOT
        lhs = sync.load(channel, slot_ptr, t + 1, sync.arrivals(t + 1, n_programs), ...)
        h = cell(dot(lhs, w), ...)
        sync.publish(channel, (h,), t + 2, last, ...)
        ...                                          # whatever nobody waits for
    sync.report(channel)

Steps count from 1; a time step of n stages is n steps of the exchange. User data is never polled in
place, where it could look like anything: h_0 goes through `publish` as all else does.

The value is the flag. A slot holds -0.0, the *sentinel*, until a value has been stored there, and
every thread polls the elements that it needs itself, each of which is read and written at once; no
fence, no counter and no barrier lies between a store and the product that waits for it. A value of
-0.0 is published as 0.0; NaN is a value like others.

The ring has 2 * LAP slots. When a program publishes step s, all have read step s - LAP, and it puts
-0.0 back into its part of that slot. (It has read s - 1, which each had published after it read
s - 2. A stage that receives fewer units waits only for their owners; then this holds for one of the
few steps before, since some stage of every cell receives all units.) That these reach everybody
before the slot is polled again is what the one fence of a lap is for: in every LAP-th step all
programs add to a counter with release, and every thread reads it with acquire until all have.

A slot serves the same stage in every lap: from one time step to the next it is a power of two of
the exchange's steps, as LAP is. A cell of three stages leaves out one (`matmul.round_of`), which
nobody waits for; every LAP-th step is one that is published.

What this rests on: elements of 16 or 32 bits are coherent, relaxed loads and stores of them are not
torn, and a store does not overtake the loads that its value was computed from, or that a block
barrier lies behind. (PTX orders relaxed accesses to different addresses by no rule, and leaves
open what a load of two 16-bit elements at once sees of stores of one; hardware reads both from one
sector of L2.)

Rules for the caller:
- Every program of the group publishes its part of every step, all of it: an element that is
  polled and never stored is waited for until the limit.
- A step's loads (of all chunks) come before its publication: the reuse of slots rests on it. The
  first of them is the one that waits for arrivals.
- The time loop does not end at a time-out. Who gives up, says so in a word of the group, so that
  nobody waits long for anything any more, and goes on with NaN, which reaches all results; `report`
  says at which step.
- All programs are resident at once (cooperative launch), or the first wait times out.

The data go round in 16 bytes a lane, see `fragments`.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedrnn.kernels.fragments import LANES, ROWS, offset_in_slot, vectors

LAP = tl.constexpr(64)

# A group's signal, in int32 words: the counter, and, 128 bytes further, the step at which somebody
# gave up. Counters of different groups share no cache line.
_GAVE_UP = tl.constexpr(32)
_SIGNAL = 64


class Exchange(NamedTuple):
    """What the programs of one launch exchange through, as a kernel takes it; fresh for every
    launch, so no launch can hurt the next.

    Attributes:
        ring: [groups, slots, slot_size]. signal: [groups, 64] int32, zero.
        error: [1] int32: 0, or the step at which a wait timed out.
        ring_stride, signal_stride: elements from one group to the next.
        spin_limit: polls before a wait gives up.
    """

    ring: Any
    signal: Any
    error: Any
    ring_stride: Any
    signal_stride: Any
    spin_limit: Any


# --- on the device -----------------------------------------------------------------------------


class Channel(NamedTuple):
    """A program's access to its group's part of an `Exchange`."""

    ring: Any
    signal: Any
    error: Any
    spin_limit: Any
    stored: Any  # offsets of the first plane of the program's tile: in a slot of each stage
    loaded: Any  # `fragments.vectors`: [lanes, LENGTH]
    anchor: Any  # see `load`


@triton.jit
def connect(exchange, units, PLANES: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channel of a program that publishes `units`, [1, BLOCK_H]; a group is a batch tile of a
    lane. PLANES: a tuple, of how many tiles are published for each stage."""
    WIDE: tl.constexpr = exchange.ring.dtype.element_ty.primitive_bitwidth == 32
    ring, signal = part_of_group(exchange)
    rows = tl.arange(0, ROWS)[:, None]
    stored = ()
    for stage in tl.static_range(len(PLANES)):
        offs = offset_in_slot(rows, units, BLOCK_K=BLOCK_K, PLANES=PLANES[stage], WIDE=WIDE)
        stored = stored + (offs,)
    loaded = vectors(SPLIT=BLOCK_K // ROWS, WIDE=WIDE)
    anchor = layout_of_loads(ring, loaded)
    return Channel(ring, signal, exchange.error, exchange.spin_limit, stored, loaded, anchor)


@triton.jit
def part_of_group(exchange):
    """Where ring and signal of the program's group begin."""
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    ring = exchange.ring + group.to(tl.int64) * exchange.ring_stride
    return ring, exchange.signal + group * exchange.signal_stride


@triton.jit
def slot(step):
    """Index of the ring slot that holds `step`."""
    return tl.cast(step, tl.int32) % (2 * LAP)


@triton.jit
def publish(
    channel, planes, step, last, SLOT: tl.constexpr, BLOCK_K: tl.constexpr, STAGE: tl.constexpr = 0
):  # fmt: skip
    """Stores this program's tiles, in the dtype that is exchanged, as its part of `step`.

    last: the last step of the launch. SLOT: elements of a slot. STAGE: for which it is.
    """
    for plane in tl.static_range(len(planes)):
        offs = channel.stored[STAGE] + plane * (ROWS * BLOCK_K)
        _publish(channel.ring, SLOT, offs, planes[plane], step, last)
    arrive(channel, step)


@triton.jit
def _publish(ring_ptr, SLOT: tl.constexpr, offs, tile, step, last):
    BITS: tl.constexpr = tile.dtype.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    # In integers: of a float, compilers may think that x + 0.0 is x.
    bits = tile.to(INTEGER, bitcast=True)
    minus_zero = tl.cast(-(2 ** (BITS - 1)), INTEGER)
    bits = tl.where(bits == minus_zero, bits & 0, bits)
    _store(ring_ptr + slot(step) * SLOT + offs, bits)
    step = tl.cast(step, tl.int32)
    if (step > LAP) & (step + LAP <= last):
        again_ptr = ring_ptr + slot(step + LAP) * SLOT
        _store(again_ptr + offs, (bits & 0) | minus_zero)


@triton.jit
def _store(ptr, bits):
    """Stores elements past L1, each at once."""
    WIDE: tl.constexpr = bits.dtype.primitive_bitwidth == 32
    TEXT: tl.constexpr = "st.relaxed.gpu.global.b32" if WIDE else "st.relaxed.gpu.global.b16"
    tl.inline_asm_elementwise(
        TEXT + " [$1], $2; mov.b32 $0, 0;",
        "=r,l,r" if WIDE else "=r,l,h",
        [ptr.to(tl.int64), bits],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def arrive(channel, step):
    """Says, once a lap, that this program has published `step`."""
    if tl.cast(step, tl.int32) % LAP == 0:
        # One thread releases for all, and Triton puts no barrier before it.
        tl.debug_barrier()
        tl.atomic_add(channel.signal, 1, sem="release", scope="gpu")


@triton.jit
def arrivals(step, n_programs):
    """How many must have come before `step` is polled: 0, but for one step of a lap."""
    step = tl.cast(step, tl.int32)
    return tl.where(step % LAP == 0, step // LAP * n_programs, 0)


@triton.jit
def load(
    channel, slot_ptr, step, arrived,
    COUNT: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr, PAIRWISE: tl.constexpr,
):  # fmt: skip
    """COUNT tiles shaped like `channel.loaded`, of what the group published as `step`: STRIDE
    elements apart from `slot_ptr` on, once so many `arrivals` have come.

    One block of assembly for each thread, so that all loads are on their way before one is looked
    at. A thread asks again for the vectors in which an element is missing, and after `spin_limit`
    times, or where another has given up, takes NaN for all of them.

    The block reads one vector for each row of `at`, and writes the row's elements into consecutive
    registers. So a thread must hold whole rows. It does, because the channel's anchor was loaded
    from memory so, and the compiler lays out as it was loaded what is computed from it
    (bench/aot.py and `launch` look at the compiled code).
    """
    DTYPE: tl.constexpr = slot_ptr.dtype.element_ty
    at = channel.loaded
    LENGTH: tl.constexpr = at.shape[1]
    VECTORS: tl.constexpr = at.shape[0] // (WARPS * LANES)  # rows that a thread holds
    nothing = at & 0
    return tl.inline_asm_elementwise(
        assembly(
            strided(COUNT, STRIDE * 16 // LENGTH),
            VECTORS,
            LENGTH,
            PAIRWISE,
            VECTORS * LENGTH,
            4 * VECTORS,
        ),
        operands(COUNT, VECTORS, VECTORS * LENGTH, 4 * VECTORS),
        [
            (slot_ptr + at).to(tl.int64),
            channel.anchor,
            (channel.signal + nothing).to(tl.int64),
            channel.spin_limit + nothing,
            step + nothing,
            arrived + nothing,
        ],
        dtype=types(COUNT, DTYPE),
        is_pure=False,
        pack=VECTORS * LENGTH,
    )


@triton.jit
def layout_of_loads(slot_ptr, at):
    """The anchor of `load`; its values do not matter."""
    tile = tl.load(slot_ptr + at, cache_modifier=".cg")
    INTEGER: tl.constexpr = tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32
    return tile.to(INTEGER, bitcast=True)


@triton.constexpr_function
def types(COUNT, DTYPE):
    return [DTYPE] * COUNT


@triton.constexpr_function
def operands(COUNT, VECTORS, ELEMENTS, ANCHOR):
    """The registers of `assembly`: 4 for every vector, then those of the inputs: ELEMENTS of
    each, ANCHOR of the anchor."""
    inputs = ["l"] * ELEMENTS + ["r"] * ANCHOR + ["l"] * ELEMENTS + ["r"] * (3 * ELEMENTS)
    return ",".join(["=&r"] * (4 * COUNT * VECTORS) + inputs)


@triton.constexpr_function
def strided(COUNT, STRIDE):
    return [n * STRIDE for n in range(COUNT)]


@triton.constexpr_function
def assembly(OFFSETS, VECTORS, LENGTH, PAIRWISE, ELEMENTS, ANCHOR):
    """PTX of `load` for one thread: VECTORS rows at each of OFFSETS, in bytes. The pointer of a row
    is that of its first element. ELEMENTS, ANCHOR: as for `operands`.

    Every thread waits for the arrivals itself, so that no barrier has to lie behind that.

    -0.0 is the least integer. Where there is a minimum of pairs of int16 (PAIRWISE, from compute
    capability 9.0 on), the least of all elements tells whether one is missing. Elsewhere a 16-bit
    half of y is 0 where (y - 1) & ~y is negative. Or PAIRWISE is "mark": then a vector is read at
    once, and is there where its lowest bit is what is given in place of arrivals.
    """
    vectors = range(len(OFFSETS) * VECTORS)
    words = [[f"${4 * n + i}" for i in range(4)] for n in vectors]
    pointers = 4 * len(vectors)
    counter = pointers + ELEMENTS + ANCHOR
    limit, step, arrived = (counter + n * ELEMENTS for n in (1, 2, 3))
    gave_up = f"[${counter} + {4 * _GAVE_UP.value}]"
    MARKED = PAIRWISE == "mark"

    def load(n):
        pointer = f"[${pointers + n % VECTORS * LENGTH} + {OFFSETS[n // VECTORS]}]"
        if MARKED:
            return f"ld.relaxed.gpu.global.b128 vector{n}, {pointer};"
        return f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(words[n])}}}, {pointer};"

    if MARKED:
        merge = ["or.b32 {0}, {0}, {1};"]
        summarize = [f"xor.b32 {{0}}, {{1}}, ${arrived};"]
        test = ["and.b32 x, {0}, 1;", "setp.ne.b32 {1}, x, 0;"]
    elif LENGTH == 4:
        merge = ["min.s32 {0}, {0}, {1};"]
        summarize = ["min.s32 {0}, {1}, {2};", "min.s32 x, {3}, {4};", "min.s32 {0}, {0}, x;"]
        test = ["setp.eq.b32 {1}, {0}, 0x80000000;"]
    elif PAIRWISE:
        merge = ["min.s16x2 {0}, {0}, {1};"]
        summarize = ["min.s16x2 {0}, {1}, {2};", "min.s16x2 x, {3}, {4};", "min.s16x2 {0}, {0}, x;"]
        test = [
            "prmt.b32 x, {0}, {0}, 0x1032;",
            "min.s16x2 x, x, {0};",
            "setp.eq.b32 {1}, x, 0x80008000;",
        ]
    else:
        merge = ["or.b32 {0}, {0}, {1};"]
        summarize = ["mov.b32 {0}, 0;"]
        for i in range(1, 5):
            summarize += [
                f"xor.b32 x, {{{i}}}, 0x80008000;",
                "sub.u32 y, x, 0x00010001;",
                "not.b32 x, x;",
                "and.b32 x, x, y;",
                "or.b32 {0}, {0}, x;",
            ]
        test = ["and.b32 x, {0}, 0x80008000;", "setp.ne.b32 {1}, x, 0;"]

    def filled(template, *names):
        return [line.format(*names) for line in template]

    # Around another attempt, so that whether somebody gave up is on its way with it.
    before = [
        "setp.eq.s32 missing, left, 0;",
        "@missing bra TIMED_OUT;",
        "sub.s32 left, left, 1;",
        f"ld.relaxed.gpu.global.b32 told, {gave_up};",
    ]
    after = ["setp.ne.s32 missing, told, 0;", "@missing bra GIVE_UP;"]
    lines = [
        f".reg .pred missing, late<{len(words)}>;",
        f".reg .b32 least<{len(words)}>, all, x, y, left, told;",
        f"mov.b32 left, ${limit};",
    ]
    if MARKED:
        lines += [f".reg .b128 vector<{len(words)}>;", f".reg .b64 half<{2 * len(words)}>;"]
    else:
        lines += [
            f"setp.eq.s32 missing, ${arrived}, 0;",
            "@missing bra READ;",
            "WAIT:",
            *before,
            f"ld.acquire.gpu.global.b32 x, [${counter}];",
            *after,
            f"setp.lt.s32 missing, x, ${arrived};",
            "@missing bra WAIT;",
            "READ:",
        ]
    lines += [*map(load, vectors), "AGAIN:"]
    if MARKED:
        for n in vectors:
            low, high = f"half{2 * n}", f"half{2 * n + 1}"
            lines += [f"mov.b128 {{{low}, {high}}}, vector{n};"]
            lines += [f"mov.b64 {{{words[n][0]}, {words[n][1]}}}, {low};"]
            lines += [f"mov.b64 {{{words[n][2]}, {words[n][3]}}}, {high};"]
    for n in vectors:
        lines += filled(summarize, f"least{n}", *words[n])
    lines += ["mov.b32 all, least0;"]
    for n in vectors[1:]:
        lines += filled(merge, "all", f"least{n}")
    lines += [*filled(test, "all", "missing"), "@!missing bra DONE;", *before]
    for n in vectors:
        lines += filled(test, f"least{n}", f"late{n}")
    lines += [f"@late{n} {load(n)}" for n in vectors]
    nan = "0x7FFFFFFF" if LENGTH == 4 else "0x7FFF7FFF"
    lines += [
        *after,
        "bra AGAIN;",
        "TIMED_OUT:",
        f"st.relaxed.gpu.global.b32 {gave_up}, ${step};",
        "GIVE_UP:",
        *(f"mov.b32 {word}, {nan};" for vector in words for word in vector),
        "DONE:",
    ]
    return "\n".join(["{", *lines, "}"])


@triton.jit
def report(channel):
    """At the end of a program: sets the error word if anybody in its group has given up."""
    step = tl.atomic_add(channel.signal + _GAVE_UP, 0, sem="relaxed", scope="gpu")
    # A plain store: the error word may lie in host memory, where atomics need not work.
    tl.store(channel.error, step, mask=step != 0)


# --- on the host -------------------------------------------------------------------------------


# Memory that is filled at once for several launches: no more than stays in a GPU's L2 until then.
_FILLED_BYTES = 1 << 24


def workspaces(
    launches: int, *, groups: int, programs: int, steps: int, chunks: int, planes: Sequence[int],
    block_b: int, block_h: int, block_k: int,
    dtype: torch.dtype, device: torch.device | str, error: torch.Tensor | None = None,
    in_rows: bool = False,
) -> Iterator[Exchange]:  # fmt: skip
    """Allocates and fills what launches exchange through, one for each.

    Args:
        launches: how many follow each other; several small ones are filled together.
        groups: batch tiles times lanes, at most.
        programs: programs of each group, of block_h units each.
        steps: steps that are published, counted from 1.
        planes: that steps 1, 2, ... publish, again and again: one number for each stage of a cell,
            0 for a step that is left out.
        chunks, block_b, block_k: of a slot, see `fragments.offset_in_slot`.
        error: [1] int32, zero, to use as the error word; by default one on the device.
        in_rows: a slot is [block_b, chunks * block_k], see `wgmma`; one plane.
    Raises:
        ValueError: a dtype or size that cannot be had.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if steps * programs >= 2**31:
        raise ValueError(f"steps * programs must stay below 2**31, got {steps} * {programs}")
    slots = min(steps + 1, 2 * LAP.value)
    slot_size = block_b * max(planes) * chunks * block_k
    empty = _without_owner(
        slots, tuple(planes), programs, chunks, block_b, block_h, block_k, dtype == torch.float32,
        in_rows,
    )  # fmt: skip
    return _exchanges(launches, groups, (slots, slot_size), -0.0, empty, dtype, device, error)


def part_workspaces(
    launches: int, *, groups: int, slot_size: int, dtype: torch.dtype, device: torch.device | str,
    error: torch.Tensor | None = None,
) -> Iterator[Exchange]:  # fmt: skip
    """As `workspaces`, for what `wgmma_backward` hands out: two slots, in which nothing is marked.

    Args:
        slot_size: elements of a slot.
    """
    return _exchanges(launches, groups, (2, slot_size), 0.0, [], dtype, device, error)


def _exchanges(
    launches: int, groups: int, ring_shape: tuple[int, int], fill: float, empty, dtype: torch.dtype,
    device: torch.device | str, error: torch.Tensor | None,
) -> Iterator[Exchange]:  # fmt: skip
    """Of each launch, all filled with `fill` but for the parts `empty`, which are zero."""
    if error is None:
        error = torch.zeros(1, dtype=torch.int32, device=device)
    limit, size = spin_limit(device), math.prod(ring_shape)
    at_once = max(1, _FILLED_BYTES // (groups * size * dtype.itemsize))
    for first in range(0, launches, at_once):
        count = min(at_once, launches - first)
        ring = torch.full((count, groups, *ring_shape), fill, dtype=dtype, device=device)
        for shape, stride, offset in empty:
            shape, stride = (count * groups, *shape), (size, *stride)
            ring.as_strided(shape, stride, offset).zero_()
        signal = torch.zeros((count, groups, _SIGNAL), dtype=torch.int32, device=device)
        for own_ring, own_signal in zip(ring.unbind(), signal.unbind(), strict=True):
            yield Exchange(own_ring, own_signal, error, size, _SIGNAL, limit)


@functools.cache
def _without_owner(
    slots: int, planes: tuple[int, ...], programs: int, chunks: int, block_b: int, block_h: int,
    block_k: int, wide: bool, in_rows: bool,
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:  # fmt: skip
    """Sizes, strides and offsets of the parts of a group's ring whose units nobody owns, at the end
    of the last chunk: they are 0 from the beginning."""
    slot_size = block_b * max(planes) * chunks * block_k
    ring = torch.empty((slots, slot_size), device="meta")
    if in_rows:
        p = ring.unflatten(-1, (block_b, -1))[:, :, programs * block_h :]
        return [(p.shape, p.stride(), int(p.storage_offset()))] if p.numel() else []
    block, rest = divmod(programs * block_h - (chunks - 1) * block_k, 16)
    elements = (2, 8, 4, 4) if wide else (8, 4, 8)
    parts = []
    for i, count in enumerate(planes):
        first = (i + 1) % len(planes)  # step 1 lies in slot 1
        part = ring[first :: len(planes), : block_b * count * chunks * block_k]
        blocks = (block_b // 16, chunks, count, block_k // 16)
        last = part.unflatten(-1, (*blocks, *elements))[:, :, -1]
        if rest:  # 8 units: half of a block
            half = (slice(1, 2),) if wide else (slice(None), slice(2, 4))
            parts.append(last[(slice(None),) * 3 + (block, *half)])
        parts.append(last[:, :, :, block + (rest > 0) :])
    return [(p.shape, p.stride(), int(p.storage_offset())) for p in parts if p.numel()]


def spin_limit(device: torch.device | str) -> int:
    """Polls before a wait gives up: seconds on a GPU, where a step takes microseconds."""
    return 1 << 22 if torch.device(device).type == "cuda" else 20_000


def raise_if_timed_out(error: torch.Tensor) -> None:
    """Raises RuntimeError where the error word of a finished launch is set."""
    step = int(error.item())
    if step:
        raise RuntimeError(
            f"a wait between the programs of one launch timed out at step {step}: its results are "
            "NaN from there on. All programs must run at once; does another process hold the GPU?"
        )
