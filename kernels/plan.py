"""Which tiles a time loop runs with: pure arithmetic, from the shape, the dtype and the device.

The schedules, for both passes or for one:

    multi_block    programs that run at the same time own BLOCK_H units each, their weights in
                   registers
    streamed       the same, but not all chunks of K fit: the others are read through L1 in each
                   step
    wgmma          as multi_block, forward, with Hopper's products of warp groups
    wgmma_scatter  with these, backward: each program multiplies its own units' gradients, and hands
                   everybody a part of dh
    single_block   one program owns all units, and nothing is exchanged: for the interpreter, which
                   runs one program after the other. For a GPU the meter prefers the others.

A plan is the cheapest of a few candidates by an estimate of the clock cycles of a step, among
those whose registers and shared memory fit a program and whose grid fits the device. The batch
decides only between a few ways to divide it, and T decides nothing, so a new batch size or
sequence length mostly runs what is compiled already. A batch or a number of directions too large
for one grid is split into several launches, each over the whole sequence.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedrnn.cells import Cell, Dense, Linear, Mean

PASSES = ("forward", "backward")
ITEM_SIZE = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a device.

    Attributes:
        capability: of CUDA, (9, 0) for example.
        shared_per_program: largest shared memory of one program, in bytes.
        shared_per_multiprocessor: what programs on one multiprocessor share; each program also
            takes 1 KiB of it for itself.
        backend: "cuda", "hip" or "interpreter".
        gluon: whether Triton has Gluon, which `wgmma` is written in.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_per_program: int
    shared_per_multiprocessor: int
    backend: str = "cuda"
    gluon: bool = True


INTERPRETER = Device((0, 0), 1, 1 << 50, 1 << 50, "interpreter")


@dataclass(frozen=True)
class StageSizes:
    """What a stage of a cell is to a kernel of one pass; sizes are those of a head.

    Attributes:
        planes, results: left operands of its product, and sums; W has a matrix for each pair. Of a
            mean, both are what it is the mean of, and there is no W.
        k, units: units that are summed over, and units of a sum.
        matrices, first_matrix: how many stand in the tensor that W is read from, and where W's do.
        gates, first_gate: gates of the input, and where they stand among the cell's.
        sums, first_sum: what it receives through matrices of gates or of its own, and where that
            stands among the cell's; of a mean, where it stands among the means.
        params, first_param: the same of the cell's own parameters.
    """

    planes: int
    results: int
    k: int
    units: int
    matrices: int
    first_matrix: int
    gates: int
    first_gate: int
    sums: int
    first_sum: int
    params: int
    first_param: int
    mean: bool
    diagonal: bool

    @property
    def pairs(self) -> int:
        """How many matrices W has; of a diagonal one, vectors."""
        return 0 if self.mean else self.planes * self.results

    @property
    def projection(self) -> bool:
        """Whether it is one of h."""
        return self.sums == 0 and not self.mean


@functools.lru_cache(maxsize=4096)
def stage_sizes(cell: Cell, pass_: str, H: int, P: int) -> tuple[StageSizes, ...]:
    """The stages of a cell with heads of H units, the widest stage's, whose h has P features."""
    stages, gate, sums, means, param, width = [], 0, 0, 0, 0, P
    for stage in cell.stages:
        receives, products, mean = stage.receives, stage.products, isinstance(stage.receives, Mean)
        # The last stage makes h.
        units = P if stage is cell.stages[-1] and not mean else H
        if isinstance(receives, (Linear, Dense)) and receives.width is not None:
            units = receives.width
        planes, results, k, after = stage.exchanged, products, width, units
        if pass_ == "backward":
            planes, results, k, units = products, stage.exchanged, units, k
        matrices, first = (len(cell.gates), gate) if stage.gates else (len(stage.sums) or 1, 0)
        of_gates = (len(stage.gates), gate)
        of_sums = (len(stage.sums), means if mean else sums)
        of_params = (len(stage.params), param)
        diagonal = isinstance(receives, Linear) and receives.diagonal
        sizes = StageSizes(
            planes, results, k, units, matrices, first, *of_gates, *of_sums, *of_params, mean,
            diagonal,
        )  # fmt: skip
        stages.append(sizes)
        gate, sums = gate + len(stage.gates), sums + len(stage.sums)
        means, param = means + products * mean, param + len(stage.params)
        width = H if mean else after
    return tuple(stages)


@dataclass(frozen=True)
class Plan:
    """How one pass of one layer runs; the kernels take it whole, as a constant.

    Attributes:
        schedule: "single_block", "multi_block", "streamed", "wgmma", "wgmma_scatter" or
            "independent".
        block_b, block_h: batch elements of a tile, and units of a program.
        block_k, chunks: K, which is all of H, in equal chunks; narrower stages have fewer.
        resident: chunks of each stage whose weights stay on the multiprocessor.
        split_k: groups of warps that share out each chunk.
        max_registers: per thread, or None for the compiler's own choice.
        prefetch: chunks whose left operands are read together, before the first is multiplied.
        programs_per_sm: programs that run at the same time on each multiprocessor.
        pairwise: the device compares pairs of 16 bits at once, see `sync.assembly`.
        batch_per_launch, lanes_per_launch: the most of one launch; None for any.
    """

    schedule: str
    block_b: int
    block_h: int
    block_k: int
    chunks: int
    resident: int
    split_k: int
    num_warps: int
    max_registers: int | None = None
    prefetch: int = 1
    programs_per_sm: int = 1
    pairwise: bool = False
    batch_per_launch: int | None = None
    lanes_per_launch: int | None = None

    @property
    def exchanged(self) -> bool:
        """Whether programs hand each other what they compute."""
        return self.schedule not in ("single_block", "independent")

    @property
    def warp_groups(self) -> bool:
        """Whether Gluon compiles the loop, for products of warp groups."""
        return self.schedule.startswith("wgmma")

    def programs(self, H: int) -> int:
        """How many hand each other what they compute, for H units. Parts of dh are handed to so
        many at once as there are warps."""
        owners = -(-H // self.block_h)
        return -(-owners // 8) * 8 if self.schedule == "wgmma_scatter" else owners

    def of_kernel(self) -> "Plan":
        """The plan without what is no part of a kernel: how a batch is cut into launches."""
        return replace(self, batch_per_launch=None, lanes_per_launch=None)

    def options(self, device: Device) -> dict[str, Any]:
        """The compiler's options. The time loop itself is never pipelined: each step needs the
        last one, and its loads are moved ahead by hand."""
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        if device.backend == "cuda" and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        if self.exchanged:
            options["launch_cooperative_grid"] = True
        return options

    def shared_bytes(self, cell: Cell, pass_: str) -> int:
        """An upper bound of a program's shared memory, for the partial sums of up to four gates;
        the ahead-of-time suite holds it to that."""
        if self.schedule == "wgmma":  # what is multiplied, and the sums
            return 4 * self.block_b * self.chunks * self.block_k // 2 + 4 * 64 * 2 * self.block_b
        if self.schedule == "wgmma_scatter":  # the gates, and the sums
            return 2 * self.block_b * 64 + 4 * 128 * self.block_b
        backward = pass_ == "backward"
        results = max(s.exchanged if backward else min(s.products, 4) for s in cell.stages)
        return 4 * self.block_b * self.block_h * (self.split_k * results + 1)


def plan_scan(
    cell: Cell, pass_: str, dtype: torch.dtype, *, B: int, H: int, D: int, device: Device,
    P: int = 0, input_precision: str = "tf32", step_times: Mapping[Plan, float] | None = None,
) -> Plan:  # fmt: skip
    """The plan for one pass ("forward" or "backward") of a layer of D lanes.

    Args:
        D: lanes: directions, times the heads of each. H: units of a lane.
        P: features of a projected h, or 0.
        step_times: measured times of a step of `candidates`, to choose by instead of the
            estimate; a candidate without one is not considered.
    Raises:
        ValueError: no candidate fits the device; says what would have been needed.
    """
    if pass_ not in PASSES:
        raise ValueError(f"pass_ must be one of {PASSES}, got {pass_!r}")
    if dtype not in ITEM_SIZE:
        raise ValueError(f"dtype must be one of {list(ITEM_SIZE)}, got {dtype}")
    times = None if step_times is None else tuple(step_times.items())
    return _plan_scan(cell, pass_, dtype, B, H, P or H, D, device, input_precision, times)


def candidates(
    cell: Cell, pass_: str, dtype: torch.dtype, H: int, device: Device, input_precision: str,
    P: int = 0,
) -> list[Plan]:  # fmt: skip
    """The plans that `plan_scan` chooses from, before the batch is cut into launches."""
    if cell.diagonal:
        return [Plan("independent", 16, 32, 32, 1, 1, 1, num_warps=4)]
    if device.backend == "interpreter":
        block = max(16, 1 << (H - 1).bit_length())
        return [Plan("single_block", 16, block, block, 1, 1, 1, num_warps=4)]
    return list(_candidates(cell, pass_, ITEM_SIZE[dtype], H, P or H, device, input_precision))


@functools.lru_cache(maxsize=4096)
def _plan_scan(cell, pass_, dtype, B, H, P, D, device, input_precision, times=None) -> Plan:
    item = ITEM_SIZE[dtype]
    precision = input_precision if item == 4 else "16-bit"
    step_times = None if times is None else dict(times)
    best, best_cost, least = None, float("inf"), None
    for plan in candidates(cell, pass_, dtype, H, device, input_precision, P):
        if plan.exchanged:
            least = min(plan.programs(H), least or plan.programs(H))
        fitting = placed(plan, H, D, B, device)
        if fitting is None:
            continue
        whole, launches, programs = fitting
        if step_times is None:
            cost = cycles(plan, cell, pass_, item, H, precision, programs, device, P)
        else:
            cost = step_times.get(plan, float("inf"))
        if launches * cost < best_cost:
            best, best_cost = whole, launches * cost
    if best is not None:
        return best
    why = f"no tile fits the {device.shared_per_program} bytes of shared memory of a program"
    if least is not None:
        why = (
            f"at least {least} programs must run at the same time, "
            f"and the device has {device.multiprocessors} multiprocessors"
        )
    raise ValueError(f"no plan for {pass_} of {cell.name!r} with H = {H}, {dtype}: {why}")


def placed(plan: Plan, H: int, D: int, B: int, device: Device) -> tuple[Plan, int, int] | None:
    """The plan with the most of the batch and of the D lanes that one launch takes; the number
    of launches, and of programs that run at the same time. None where one tile is too many."""
    if not plan.exchanged:
        return plan, 1, 1
    owners = plan.programs(H)
    room = device.multiprocessors * plan.programs_per_sm
    if owners > room:
        return None
    lanes = min(D, room // owners)
    batch = room // (owners * lanes) * plan.block_b
    launches = -(-D // lanes) * -(-B // batch)
    programs = owners * lanes * -(-min(B, batch) // plan.block_b)
    plan = replace(plan, batch_per_launch=batch, lanes_per_launch=lanes)
    return plan, launches, programs


def warp_groups(H: int, block_b: int) -> Plan:
    """The plan of a forward pass by warp groups (`wgmma`), for tiles of 8, 16 or 32 rows."""
    block_k = 256 if block_b == 8 else 128
    chunks = -(-H // block_k)
    return Plan("wgmma", block_b, 16, block_k, chunks, chunks, 2, 8, 255, chunks, pairwise=True)


def warp_groups_backward(H: int, block_b: int) -> Plan:
    """The plan of a backward pass by warp groups (`wgmma_backward`), for tiles of 16 or 32 rows.

    Parts of chunks that are multiplied, and read, together: as many as registers hold."""
    chunks = -(-H // 128)
    ahead = min(chunks, 128 // block_b)
    return Plan("wgmma_scatter", block_b, 16, 128, chunks, chunks, 1, 8, 255, ahead, pairwise=True)


def _serve_warp_groups(
    cell: Cell, pass_: str, item: int, stages: tuple[StageSizes, ...], device: Device
) -> bool:
    """Whether a pass of such a cell can run by warp groups."""
    (stage, *others) = stages
    gates, one = (stage.results, stage.planes)[:: 1 if pass_ == "forward" else -1]
    return (
        device.backend == "cuda"
        and device.gluon
        and device.capability == (9, 0)
        and item == 2
        and not others
        and not (stage.mean or stage.diagonal)
        and one == 1
        and gates <= 4
        and max(stage.k, stage.units) <= WARP_GROUP_K
    )


def _candidates(
    cell: Cell, pass_: str, item: int, H: int, P: int, device: Device, precision: str
) -> Iterator[Plan]:
    """What fits a program, best first among equals. Each kind was compiled and keeps its values
    in registers (bench/aot.py)."""

    def fits(plan: Plan) -> bool:
        used = plan.shared_bytes(cell, pass_)
        shared = device.shared_per_multiprocessor // plan.programs_per_sm - 1024
        return used <= min(shared, device.shared_per_program)

    stages = stage_sizes(cell, pass_, H, P)
    planes = max(stage.planes for stage in stages)
    results = max(stage.results for stage in stages)
    exact = item == 4 and precision == "ieee"
    kinds = [(16, 8), (16, 4), (8, 4)]
    if device.multiprocessors < -(-H // 16):
        kinds.append((32, 8))
    for block_h, split in kinds:
        chunks = -(-H // (16 * split))

        def weights(resident: int, block_h=block_h, block_k=16 * split) -> int:
            counts = (min(resident, -(-s.k // block_k)) * s.pairs for s in stages)
            return sum(counts) * block_h * item // 8

        def most(room: int) -> int:
            return max(n for n in range(chunks + 1) if weights(n) <= max(room, 0))  # noqa: B023

        # Registers of a thread: what a second element and the sums take, the chunks' weights, its
        # left operands.
        elements = block_h // (2 * split)
        room = REGISTERS[pass_] - results * block_h // 2
        room -= (32 if exact else 16) * (elements - 1)
        lhs = planes * 4 * (item // 2)
        held = most(room - lhs)
        if held < chunks:
            # Of those that do not stay, one is multiplied while the next is on its way.
            room -= 12 * item
            held = max(2, most(room - lhs))
        resident = chunks if held >= chunks else held - 2
        ahead = max(1, min(chunks, (room - weights(held)) // lhs))
        if exact:
            # Products take longer than the trip, and registers that operands would wait in.
            ahead = min(ahead, max(1, 16 // lhs))
        if resident < chunks and split < 8:
            continue  # two programs would share what L1 keeps
        schedule = "multi_block" if resident == chunks else "streamed"
        plan = Plan(
            schedule, 16, block_h, 16 * split, chunks, resident, split, split,
            255, ahead, 8 // split, device.capability >= (9, 0),
        )  # fmt: skip
        if fits(plan):
            yield plan
    if _serve_warp_groups(cell, pass_, item, stages, device):
        if pass_ == "forward":
            yield from filter(fits, (warp_groups(H, rows) for rows in (16, 8, 32)))
        else:
            rows = (16, 32) if H <= WARP_GROUP_WIDE_TILES else (16,)
            yield from filter(fits, (warp_groups_backward(H, count) for count in rows))


# The most units of K of which warp groups keep the weights in registers.
WARP_GROUP_K = 1024
# Backward, the most units with 32 rows: beyond, values would be spilled.
WARP_GROUP_WIDE_TILES = 768

# Registers for weights, left operands and sums, of 255; found by compiling, for the cell with the
# most gates and everything switched on (bench/aot.py).
REGISTERS = {"forward": 192, "backward": 168}

# What a step is made of, in clock cycles: the meter's figures (bench/step_cost), and those of the
# code fitted to what the meter reads off all candidates (bench/aot.py).
TRIP = 420  # from a store to a load that finds it, half a poll included
ANOTHER_TRIP = 100  # where registers hold only a part of what is read
L2_BYTES = 45  # a clock, into one multiprocessor; and into all of them
L2_BYTES_OF_ALL = 3200
L1_BYTES = 29
SHARED_BYTES = 128
MULTIPLY_ADDS: dict[str, float] = {"16-bit": 1024, "tf32": 512, "ieee": 512 / 3}
# Of warp groups: the trip and the way through shared memory; each gate of an element; of what is
# read, the part that nothing hides. All a fifth above the meter, as the others' estimate is.
WARP_GROUP = 960
WARP_GROUP_CELL_OF_GATE = 150
WARP_GROUP_MULTIPLY_ADDS = 2048
WARP_GROUP_READ = 0.88
# Backward: the same; what is written and added up hides nothing of what is read.
WARP_GROUP_BACKWARD = 830
WARP_GROUP_BACKWARD_CELL_OF_GATE = 108
WARP_GROUP_WRITTEN = 1.27
CHAIN = 16  # from one product to the next that adds to it
CELL = 100  # and all else that a step does once
CELL_OF_GATE = 83  # for each element of a thread
TOGETHER = 0.36  # of a step, what a second program on the multiprocessor adds


def cycles(
    plan: Plan, cell: Cell, pass_: str, item: int, H: int, precision: str, programs: int,
    device: Device, P: int = 0,
) -> float:  # fmt: skip
    """An estimate of the clock cycles of a step, while so many programs run."""
    elements = plan.block_b * plan.block_h / (32 * plan.num_warps)
    l2 = min(L2_BYTES, L2_BYTES_OF_ALL / min(programs, device.multiprocessors))
    busy, wait = CELL + CELL_OF_GATE * len(cell.gates) * max(1.0, elements), 0.0
    if plan.schedule == "wgmma":
        received = plan.block_b * plan.chunks * plan.block_k
        multiply = received * 64 / WARP_GROUP_MULTIPLY_ADDS
        cell_of_gates = WARP_GROUP_CELL_OF_GATE * len(cell.gates) * max(1.0, elements)
        return WARP_GROUP + cell_of_gates + multiply + WARP_GROUP_READ * received * item / l2
    if plan.schedule == "wgmma_scatter":
        parts = plan.block_b * plan.block_h * plan.programs(H) * item
        cell_of_gates = WARP_GROUP_BACKWARD_CELL_OF_GATE * len(cell.gates) * max(1.0, elements)
        moved = WARP_GROUP_WRITTEN * parts / L2_BYTES + parts / l2
        return WARP_GROUP_BACKWARD + cell_of_gates + moved
    for stage in stage_sizes(cell, pass_, H, P or H):
        chunks = -(-stage.k // plan.block_k)
        streamed = max(chunks - plan.resident, 0) * plan.block_k
        matrices = stage.pairs * plan.block_h
        products = stage.planes * plan.block_h if stage.mean else matrices
        multiply = plan.block_b * products * chunks * plan.block_k / MULTIPLY_ADDS[precision]
        busy += max(multiply, chunks * stage.planes * CHAIN * (item // 2))
        busy += matrices * streamed * item / L1_BYTES
        busy += 2 * 4 * plan.split_k * plan.block_b * plan.block_h * stage.results / SHARED_BYTES
        busy += stage.planes * plan.block_b * chunks * plan.block_k * item / l2
        wait += TRIP + (-(-chunks // plan.prefetch) - 1) * ANOTHER_TRIP
    if programs > device.multiprocessors:
        busy *= 1 + TOGETHER
    return busy + wait
