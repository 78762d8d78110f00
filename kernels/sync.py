"""How the programs of one launch wait for each other.

Programs of one *group* (one batch tile, one direction) exchange a tile of `h` (forward) or of
the gates' gradients (backward) at every step; groups never wait for each other. A time loop
spells a step like this, whatever the protocol:

    alive = 1
    publish h_0 as step 1, as below
    for t in range(T):
        alive = sync.wait(signal_ptr, t + 1, n_programs, error_ptr, spin_limit, alive, PROTOCOL,
                          FLAGS_BLOCK)
        slot_ptr = ring_ptr + sync.slot(t + 1, PROTOCOL) * slot_size
        (h,), alive = sync.load(slot_ptr, (offs,), (mask,), t + 1, error_ptr, spin_limit, alive,
                                DTYPE, PROTOCOL)
        h_gates = dot(h, w) + sync.poison(alive)
        h_own = ...
        slot_ptr = ring_ptr + sync.slot(t + 2, PROTOCOL) * slot_size
        sync.store(slot_ptr, offs_own, h_own, mask_own, t + 2, PROTOCOL)
        sync.arrive(signal_ptr, program, t + 2, alive, PROTOCOL)
        ...                                          # whatever nobody waits for

Steps count from 1: step 0 is what an untouched workspace says. User data is never polled in
place, where it could look like anything: h_0 goes through `store` as all else does. `ring_ptr`
and `signal_ptr` point at the group's own part of the workspace (`Workspace.ring_stride`,
`.signal_stride`).

Rules for the caller:
- Every program of the group publishes every step, with the same masks for which the others
  load: a word that is polled and never stored is waited for until the limit.
- A step's loads (of all chunks) come before its store: two ring slots rest on it.
- `load` and the flags of `wait` poll tiles. A polled tile has at least 32 * num_warps elements,
  so that no two threads poll the same element and the verdict is one for the whole block.
- The time loop does not end at a timeout. `alive` becomes 0, no later step spins or arrives,
  and `poison` turns everything that follows into NaN; the error word says why.
- All programs are resident at once (cooperative launch), or the first wait times out.

Protocols (what `PROTOCOL` may be):
- "counter": one counter a group; release to arrive, acquire to wait. The sound default.
- "ll": a word holds a value and its step; readers poll the words themselves. No fence at all.
  Rests on each 32- or 64-bit word being read and written at once, as PTX promises for volatile
  accesses; the stores are plain, which the model calls a race and hardware does not mind.
- "flags": every program has a word for the step that it has published; readers poll them all.
- "sentinel": the ring has a slot for each step, filled with a pattern that no value has;
  readers poll until it is gone. Rests on hardware as "ll" does.

For NVIDIA. On AMD (gfx942, Triton 3.6 to 3.9) a block barrier does not wait for the stores of the
other waves, so a release speaks for its own wave only, and no protocol here is sound.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PROTOCOLS = ("counter", "ll", "flags", "sentinel")

_LINE = 32  # int32 words in 128 bytes: counters of different groups share no cache line
_WORDS = {
    "counter": {torch.float16: torch.float16, torch.bfloat16: torch.bfloat16},
    "ll": {torch.float16: torch.int32, torch.bfloat16: torch.int32, torch.float32: torch.int64},
    "sentinel": {torch.float16: torch.int16, torch.bfloat16: torch.int16},
}
_WORDS["counter"][torch.float32] = torch.float32
_WORDS["sentinel"][torch.float32] = torch.int32
_WORDS["flags"] = _WORDS["counter"]


# --- on the device -----------------------------------------------------------------------------


@triton.jit
def slot(step, PROTOCOL: tl.constexpr):
    """Index of the ring slot that holds `step`.

    Two slots are enough, because step s + 2 is stored over step s only by a program that has
    waited for step s + 1 of all, which each of them published after its last read of step s.
    A sentinel cannot be put back while others poll, so there every step has its own slot.
    """
    if PROTOCOL == "sentinel":
        index = step
    else:
        index = step & 1
    return index


@triton.jit
def store(slot_ptr, offs, tile, mask, step, PROTOCOL: tl.constexpr):
    """Stores this program's own tile, in the dtype that is exchanged, as its part of `step`."""
    if PROTOCOL == "ll":
        if tile.dtype.primitive_bitwidth == 16:
            bits = tile.to(tl.int16, bitcast=True).to(tl.int32)
            word = (bits << 16) | (step & 0xFFFF)
        else:
            bits = tile.to(tl.int32, bitcast=True).to(tl.int64)
            word = (bits << 32) | step
    elif PROTOCOL == "sentinel":
        # In integers: compilers know that a float operation keeps a NaN a NaN and drop it.
        if tile.dtype.primitive_bitwidth == 16:
            bits = tile.to(tl.int16, bitcast=True)
            word = tl.where(bits == -1, 0x7FFF, bits).to(tl.int16)
        else:
            bits = tile.to(tl.int32, bitcast=True)
            word = tl.where(bits == -1, 0x7FFFFFFF, bits).to(tl.int32)
    else:
        word = tile
    tl.store(slot_ptr + offs, word, mask=mask, cache_modifier=".cg")


@triton.jit
def arrive(signal_ptr, program, step, alive, PROTOCOL: tl.constexpr):
    """Says that this program, the `program`-th of its group, has stored all of `step`.

    A program that has timed out says nothing, so that nobody takes its poison for data.
    """
    if PROTOCOL == "counter":
        # One thread releases for all, and Triton puts no barrier before it.
        tl.debug_barrier()
        tl.atomic_add(signal_ptr, alive, sem="release", scope="gpu")
    elif PROTOCOL == "flags":
        tl.debug_barrier()
        tl.atomic_max(signal_ptr + program, step * alive, sem="release", scope="gpu")


@triton.jit
def wait(
    signal_ptr,
    step,
    n_programs,
    error_ptr,
    spin_limit,
    alive,
    PROTOCOL: tl.constexpr,
    FLAGS_BLOCK: tl.constexpr = 1,
):
    """Waits until the whole group has arrived at `step`; returns the new `alive`.

    The verdict of the counter comes from a scalar atomic, which Triton hands to the whole block,
    so no warp gives up while another goes on. "ll" and "sentinel" wait in `load` instead.
    """
    if PROTOCOL == "counter":
        target = step * n_programs
        limit = spin_limit * alive
        # The result of every acquire is used: Triton 3.6 and 3.7 delete those that are not.
        arrived = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="gpu")
        spins = 0
        while (arrived < target) & (spins < limit):
            arrived = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="gpu")
            spins += 1
        # One thread acquired for all.
        tl.debug_barrier()
        alive = _verdict(arrived >= target, step, error_ptr, alive)
    elif PROTOCOL == "flags":
        offs = tl.arange(0, FLAGS_BLOCK)
        mask = offs < n_programs
        limit = spin_limit * alive
        seen = tl.min(tl.load(signal_ptr + offs, mask=mask, other=step, volatile=True))
        spins = 0
        while (seen < step) & (spins < limit):
            seen = tl.min(tl.load(signal_ptr + offs, mask=mask, other=step, volatile=True))
            spins += 1
        # Volatile is relaxed: what it saw is read once more, flag by flag, with acquire.
        flags = tl.atomic_add(
            signal_ptr + offs, tl.zeros_like(offs), mask=mask, sem="acquire", scope="gpu"
        )
        tl.debug_barrier()
        arrived = tl.min(tl.where(mask, flags, step))
        alive = _verdict(arrived >= step, step, error_ptr, alive)
    return alive


@triton.jit
def load(
    slot_ptr,
    offs,
    masks,
    step,
    error_ptr,
    spin_limit,
    alive,
    DTYPE: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Reads tiles of one shape, a tuple of offsets and masks each, of what the group published as
    `step`; returns a tuple of tiles (DTYPE) and `alive`.

    All of them are on their way before one is looked at, and are polled together: one trip to
    L2, and registers for all. Zero where a mask is false. Every read bypasses L1, which other
    multiprocessors do not update.
    """
    if PROTOCOL == "ll" or PROTOCOL == "sentinel":
        limit = spin_limit * alive
        words, late = _poll(slot_ptr, offs, masks, step, PROTOCOL)
        spins = 0
        while (late != 0) & (spins < limit):
            words, late = _poll(slot_ptr, offs, masks, step, PROTOCOL)
            spins += 1
        tiles = (_value(words[0], DTYPE, PROTOCOL),)
        for i in tl.static_range(1, len(offs)):
            tiles = tiles + (_value(words[i], DTYPE, PROTOCOL),)
        alive = _verdict(late == 0, step, error_ptr, alive)
        if PROTOCOL == "ll":
            # Every thread has read this slot before any thread publishes the next step: a store
            # of the step after that overwrites what is read here, and waits for nothing else.
            tl.debug_barrier()
    else:
        tiles = (tl.load(slot_ptr + offs[0], mask=masks[0], other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(1, len(offs)):
            tile = tl.load(slot_ptr + offs[i], mask=masks[i], other=0.0, cache_modifier=".cg")
            tiles = tiles + (tile,)
    return tiles, alive


@triton.jit
def _poll(slot_ptr, offs, masks, step, PROTOCOL: tl.constexpr):
    """Reads the words once; returns them, and whether one of them is not yet that of `step`."""
    words = (tl.load(slot_ptr + offs[0], mask=masks[0], other=0, volatile=True),)
    late = _is_late(words[0], step, PROTOCOL) & masks[0]
    for i in tl.static_range(1, len(offs)):
        words = words + (tl.load(slot_ptr + offs[i], mask=masks[i], other=0, volatile=True),)
        late |= _is_late(words[i], step, PROTOCOL) & masks[i]
    return words, tl.max(late.to(tl.int32))


@triton.jit
def poison(alive):
    """0 while all is well and NaN after a timeout: add it to what was computed from a load."""
    return tl.where(alive != 0, 0.0, float("nan"))


@triton.jit
def _verdict(ok, step, error_ptr, alive):
    """Records the first timeout of this program in the error word; returns the new `alive`."""
    timed_out = (ok == 0) & (alive != 0)
    # A plain store: the error word may lie in host memory, where atomics need not work.
    tl.store(error_ptr, step, mask=timed_out)
    return alive * ok.to(tl.int32)


@triton.jit
def _is_late(words, step, PROTOCOL: tl.constexpr):
    """Where a polled word is not yet the one of `step`."""
    if PROTOCOL == "sentinel":
        late = words == -1
    elif words.dtype.primitive_bitwidth == 32:
        # 16 bits of the step are enough: before step s, a slot holds step s - 2, or the zeros of
        # the cleared ring where s <= 2.
        late = (words & 0xFFFF) != (step & 0xFFFF)
    else:
        late = words.to(tl.int32) != step
    return late


@triton.jit
def _value(words, DTYPE: tl.constexpr, PROTOCOL: tl.constexpr):
    """The values in polled words."""
    if PROTOCOL == "sentinel":
        bits = words
    elif words.dtype.primitive_bitwidth == 32:
        bits = (words >> 16).to(tl.int16)
    else:
        bits = (words >> 32).to(tl.int32)
    return bits.to(DTYPE, bitcast=True)


# --- on the host -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """What one launch exchanges through; fresh for every launch, so no launch can hurt the next.

    Attributes:
        ring: [groups, slots, slot_size] words.
        signal: [groups, signal_stride] int32, zero: counters or flags.
        error: [1] int32: 0, or the step at which a wait timed out.
        flags_block: the FLAGS_BLOCK of `wait`.
    """

    ring: torch.Tensor
    signal: torch.Tensor
    error: torch.Tensor
    flags_block: int

    @property
    def ring_stride(self) -> int:
        """Words from one group's ring to the next."""
        return self.ring.stride(0)

    @property
    def signal_stride(self) -> int:
        """Words from one group's signal to the next."""
        return self.signal.stride(0)


def ring_dtype(dtype: torch.dtype, protocol: str) -> torch.dtype:
    """The dtype of a ring that exchanges values of `dtype`."""
    _check_protocol(protocol)
    words = _WORDS[protocol]
    if dtype not in words:
        raise ValueError(f"dtype must be one of {sorted(map(str, words))}, got {dtype}")
    return words[dtype]


def workspace(
    protocol: str,
    *,
    groups: int,
    programs: int,
    steps: int,
    slot_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    num_warps: int,
    error: torch.Tensor | None = None,
) -> Workspace:
    """Allocates and clears what one launch exchanges through.

    Args:
        groups: batch tiles times directions.
        programs: programs of each group.
        steps: steps that are published, counted from 1.
        slot_size: elements that a group publishes in a step.
        error: [1] int32, zero, to use as the error word; by default one on the device.
    Raises:
        ValueError: a protocol, dtype or size that cannot be had.
    """
    word = ring_dtype(dtype, protocol)
    if steps * programs >= 2**31:
        raise ValueError(f"steps * programs must stay below 2**31, got {steps} * {programs}")
    slots = steps + 1 if protocol == "sentinel" else 2
    shape = (groups, slots, slot_size)
    if protocol == "ll":
        ring = torch.zeros(shape, dtype=word, device=device)
    elif protocol == "sentinel":
        ring = torch.full(shape, -1, dtype=word, device=device)
    else:
        ring = torch.empty(shape, dtype=word, device=device)
    flags_block = max(triton.next_power_of_2(programs), 32 * num_warps)
    stride = flags_block if protocol == "flags" else _LINE
    signal = torch.zeros((groups, stride), dtype=torch.int32, device=device)
    if error is None:
        error = torch.zeros(1, dtype=torch.int32, device=device)
    return Workspace(ring, signal, error, flags_block)


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


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
