"""Which tiles a time loop runs with: pure arithmetic, from the shape, the dtype and the device.

Three schedules, one kernel each for forward and backward:

    resident   one program owns all units: the weights fit one multiprocessor, nothing is exchanged
    spread     programs that run at the same time own BLOCK_H units each, with their weights
    streaming  as spread, but not all chunks of K fit: the others are read from L2 in every step

A plan is the cheapest of a few candidates by a rough count of clock cycles a step, among those
whose shared memory fits a program and whose grid fits the device. The batch decides only between
a few heights of the batch tile, and T decides nothing, so a new batch size or sequence length
mostly runs what is compiled already. A batch or a number of directions too large for one grid is
split into several launches, each over the whole sequence.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedrnn.cells import Cell

PASSES = ("forward", "backward")
ITEM_SIZE = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}

# Of one multiprocessor, per clock cycle: rough, to compare candidates with, not to predict.
SHARED_BYTES = 128
L2_BYTES = 24
MULTIPLY_ADDS = {"16-bit": 1024, "tf32": 512, "ieee": 128}
# An exchange: store, signal, poll, load, each a trip to L2, and a counter that all add to.
EXCHANGE_CYCLES = 2000
CYCLES_PER_PROGRAM = 8


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a device.

    Attributes:
        capability: of CUDA, (9, 0) for example.
        shared_per_program: largest shared memory of one program, in bytes.
        shared_per_multiprocessor: what programs on one multiprocessor share; each program also
            takes 1 KiB of it for itself.
        backend: "cuda", "hip" or "interpreter".
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_per_program: int
    shared_per_multiprocessor: int
    backend: str = "cuda"


# Runs one program after the other, which must therefore not wait for each other.
INTERPRETER = Device((0, 0), 1, 1 << 50, 1 << 50, "interpreter")


@dataclass(frozen=True)
class Plan:
    """How one pass of one layer runs. The fields in capitals in the kernels have these names.

    Attributes:
        schedule: "resident", "spread" or "streaming"; follows from the numbers below.
        block_b, block_h: batch elements and units of a program.
        block_k, chunks: K, which is all of H, in equal chunks.
        resident: chunks whose weights stay on the chip.
        split: groups of warps that share out each chunk.
        protocol: how programs wait for each other (`sync`); None where there is nobody to.
        max_registers: per thread, or None for the compiler's own choice.
        ahead: chunks whose left operands are read together, before the first is multiplied.
        programs_each: programs that run at the same time on each multiprocessor.
        slab_b, slab_d: the most batch elements and directions of one launch; None for any.
    """

    schedule: str
    block_b: int
    block_h: int
    block_k: int
    chunks: int
    resident: int
    split: int
    num_warps: int
    protocol: str | None = None
    max_registers: int | None = None
    ahead: int = 1
    programs_each: int = 1
    slab_b: int | None = None
    slab_d: int | None = None

    def constants(self) -> dict[str, Any]:
        """The kernels' constexpr arguments."""
        return {
            "BLOCK_B": self.block_b,
            "BLOCK_H": self.block_h,
            "BLOCK_K": self.block_k,
            "CHUNKS": self.chunks,
            "RESIDENT": self.resident,
            "AHEAD": self.ahead,
            "SPLIT": self.split,
            "PROTOCOL": self.protocol,
        }

    def options(self, device: Device) -> dict[str, Any]:
        """The compiler's options. The time loop itself is never pipelined: each step needs the
        last one, and its loads are moved ahead by hand."""
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        if device.backend == "cuda" and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        if self.protocol is not None:
            options["launch_cooperative_grid"] = True
        return options

    def shared_bytes(self, cell: Cell, which: str, item: int) -> int:
        """An upper bound of a program's shared memory; the ahead-of-time suite holds it to that.

        The weights, resident and on their way in; and the larger of the left operands on their
        way into the product and the partial sums, two gates at a time, on their way out of it;
        and a tile that changes from one layout to another.
        """
        gates = len(cell.gates)
        chunk = gates * self.block_k * self.block_h * item
        left = self.block_b * self.block_k * item
        if which == "backward":
            left *= gates
        sums = 2 * self.split * self.block_b * self.block_h * 4
        weights = self.resident * chunk
        if self.schedule == "streaming":
            weights += self.ahead * chunk
        conversion = self.block_b * self.block_h * 4
        return weights + max(self.ahead * left, sums) + conversion


def plan_scan(
    cell: Cell,
    which: str,
    dtype: torch.dtype,
    *,
    B: int,
    H: int,
    D: int,
    device: Device,
    input_precision: str = "tf32",
    step_times: Mapping[Plan, float] | None = None,
) -> Plan:
    """The plan for one pass ("forward" or "backward") of a layer of D directions.

    Args:
        step_times: measured times of a step of `candidates`, to choose by instead of the
            estimate; a candidate without one is not considered.
    Raises:
        ValueError: no candidate fits the device; says what would have been needed.
    """
    if which not in PASSES:
        raise ValueError(f"which must be one of {PASSES}, got {which!r}")
    if dtype not in ITEM_SIZE:
        raise ValueError(f"dtype must be one of {list(ITEM_SIZE)}, got {dtype}")
    times = None if step_times is None else tuple(step_times.items())
    return _plan_scan(cell, which, dtype, B, H, D, device, input_precision, times)


def candidates(
    cell: Cell, which: str, dtype: torch.dtype, H: int, device: Device, input_precision: str
) -> list[Plan]:
    """The plans that `plan_scan` chooses from, before the batch is cut into launches."""
    if device.backend == "interpreter":
        return [_resident(H)]
    plans = list(_candidates(cell, which, ITEM_SIZE[dtype], H, device, input_precision))
    # After all others, so that only a measurement can choose it. Its words are twice as wide, which
    # wider tiles have no registers for.
    polled = [
        replace(plan, protocol="ll", ahead=max(1, plan.ahead // 2))
        for plan in plans
        if plan.protocol is not None and plan.block_h == 16
    ]
    return plans + polled


@functools.lru_cache(maxsize=4096)
def _plan_scan(cell, which, dtype, B, H, D, device, input_precision, times=None) -> Plan:
    item = ITEM_SIZE[dtype]
    precision = input_precision if item == 4 else "16-bit"
    step_times = None if times is None else dict(times)
    best, best_cost, least = None, float("inf"), None
    for plan in candidates(cell, which, dtype, H, device, input_precision):
        if step_times is None:
            cost = _cycles(plan, cell, which, item, H, precision)
        else:
            cost = step_times.get(plan, float("inf"))
        launches = 1
        if plan.protocol is not None:
            tiles = -(-H // plan.block_h)
            room = device.multiprocessors * plan.programs_each
            least = min(tiles, least or tiles)
            if tiles > room:
                continue
            slab_d = min(D, room // tiles)
            slab_b = room // (tiles * slab_d) * plan.block_b
            launches = -(-D // slab_d) * -(-B // slab_b)
            plan = replace(plan, slab_b=slab_b, slab_d=slab_d)
        if launches * cost < best_cost:
            best, best_cost = plan, launches * cost
    if best is not None:
        return best
    why = f"no tile fits the {device.shared_per_program} bytes of shared memory of a program"
    if least is not None:
        why = (
            f"at least {least} programs must run at the same time, "
            f"and the device has {device.multiprocessors} multiprocessors"
        )
    raise ValueError(f"no plan for {which} of {cell.name!r} with H = {H}, {dtype}: {why}")


def _candidates(
    cell: Cell, which: str, item: int, H: int, device: Device, precision: str
) -> Iterator[Plan]:
    """What fits a program's shared memory, best first among equals. Each kind was compiled for
    sm_90 and keeps its values in registers (bench/aot.py)."""

    def fits(plan: Plan) -> bool:
        return plan.shared_bytes(cell, which, item) <= device.shared_per_program

    whole = _resident(H)
    if whole.block_h <= LARGEST_RESIDENT[item] and fits(whole):
        yield whole
    planes = len(cell.gates) if which == "backward" else 1
    # With a single gate both passes are alike: one left operand, one result, a quarter of the
    # weights that the tables below were made for.
    one_gate = len(cell.gates) == 1
    key = ("forward" if one_gate else which, item)
    block_k, split = _chunk(H, item)
    chunks = -(-H // block_k)
    ahead = min(chunks, max(1, AHEAD[key] // (planes * block_k)))
    spread = Plan("spread", 16, 16, block_k, chunks, chunks, split, 8, "counter", 255, ahead)
    largest = LARGEST_SPREAD[key]
    if item == 4 and precision == "ieee":
        # Products without tensor cores keep more in registers.
        largest = {**largest, 32: 0, 8: 0}
    elif one_gate:
        largest = {h: 4 * units for h, units in largest.items()}
    tiles = {h: replace(spread, block_h=h) for h in (16, 32, 8)}
    usable = [h for h, plan in tiles.items() if chunks * block_k <= largest[h] and fits(plan)]
    for block_h in usable:
        if block_h != 8 or usable == [8]:  # half the units only where nothing else will do
            yield tiles[block_h]
    if 16 not in usable:
        block_k, split, ahead, most = PARTIAL[key]
        chunks = -(-H // block_k)
        for resident in range(min(most, chunks - 1), -1, -1):
            plan = Plan(
                "streaming", 16, 16, block_k, chunks, resident, split, 8, "counter", 255, ahead
            )
            if fits(plan):
                yield plan
                break
    streaming = [STREAMING[key]]
    if device.multiprocessors < -(-H // 16):
        streaming.append(WIDE[which])
    for plan in streaming:
        plan = replace(plan, chunks=-(-H // plan.block_k))
        if fits(plan):
            yield plan


# What follows keeps everything in registers on sm_90, for the cell with the most gates; found by
# compiling (bench/aot.py). Keys are the pass and the bytes of an element.

# Units of H up to which the spread schedule does, by BLOCK_H.
LARGEST_SPREAD = {
    ("forward", 2): {16: 2048, 32: 640, 8: 2048},
    ("forward", 4): {16: 640, 32: 384, 8: 1024},
    ("backward", 2): {16: 2048, 32: 640, 8: 2048},
    ("backward", 4): {16: 512, 32: 0, 8: 768},
}

# Elements of a row of the left operands that are read before the first is multiplied.
AHEAD = {("forward", 2): 2048, ("forward", 4): 512, ("backward", 2): 1024, ("backward", 4): 512}

# Where 16 units' weights do not fit: block_k, split, ahead, and the most chunks that stay.
PARTIAL = {
    ("forward", 2): (128, 8, 1, 16),
    ("forward", 4): (128, 8, 1, 0),
    ("backward", 2): (64, 4, 2, 32),
    ("backward", 4): (128, 8, 1, 0),
}

# For a batch so large that multiplying takes longer than reading all weights in every step.
_TALL = Plan("streaming", 64, 16, 64, 0, 0, 1, 8, "counter", 255)
STREAMING = {
    ("forward", 2): replace(_TALL, block_k=128),
    ("forward", 4): replace(_TALL, block_k=128),
    ("backward", 2): _TALL,
    ("backward", 4): replace(_TALL, block_b=32, block_k=128),
}

# For more units than programs of 16 can share out.
WIDE = {
    "forward": replace(_TALL, block_h=32),
    "backward": replace(_TALL, block_b=32, block_h=32),
}

# Units up to which one program holds all of them.
LARGEST_RESIDENT = {2: 128, 4: 64}


def _resident(H: int) -> Plan:
    """One program for all units; K is one chunk, padded to a power of two."""
    block = max(16, 1 << (H - 1).bit_length())
    return Plan("resident", 16, block, block, 1, 1, 1, 4 if block <= 32 else 8, max_registers=255)


def _chunk(H: int, item: int) -> tuple[int, int]:
    """The chunk of K and its split: large chunks, as long as they leave none of the last one
    empty, because every one of them is a load and a product more to compile. The smallest is one
    instruction, 16 elements, for each of 4 groups of warps; with float32 that would spill."""
    if H % 256 == 0:
        return 256, 8
    half = item == 2 and -(-H // 64) * 64 < -(-H // 128) * 128
    return (64, 4) if half else (128, 8)


def _cycles(plan: Plan, cell: Cell, which: str, item: int, H: int, precision: str) -> float:
    """A rough count of the clock cycles of a step."""
    gates = len(cell.gates)
    planes = gates if which == "backward" else 1
    weights = gates * plan.chunks * plan.block_k * plan.block_h
    multiply = weights * plan.block_b / MULTIPLY_ADDS[precision]
    resident = plan.resident / plan.chunks
    read = weights * item * (resident / SHARED_BYTES + (1 - resident) / L2_BYTES)
    if plan.protocol is None:
        return multiply + read
    exchanged = planes * plan.block_b * H * item / L2_BYTES
    wait = EXCHANGE_CYCLES + CYCLES_PER_PROGRAM * -(-H // plan.block_h)
    return multiply + read + exchanged + wait
