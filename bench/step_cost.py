"""What a step of the time loop costs, read from the compiled kernel: no GPU is needed.

    python -m bench.step_cost --cell lstm --dtype fp16 --hidden 768 --batch 16
    make step-cost ARGS="--cell gru --dtype bf16 --hidden 512 --batch 64 --every-plan"

Bank conflicts, loads that wait for one another, values fetched ahead and then waited for: those
are facts of the machine code (bench/machine_code.py), and `gate` says what no kernel may show.
Times are predictions of a clock model, which takes from the code the order of the instructions,
stalls, barriers and wavefronts, and assumes `Parameters`. Believe ratios more than microseconds.

- A warp belongs to one of four schedulers; each of them issues one instruction a clock.
- All share one pipe to shared memory, which an access holds for its wavefronts.
- Products (mma, wgmma) and special functions (MUFU) of a scheduler follow each other at an
  interval.
- A load takes its latency, or longer where the bytes before it have not come yet.
- A block barrier opens when the last warp has come to it.
- All programs are in step: what this one has published, all others have at the same time.
- Instruction caches always hit, and clocks of one step are those of the next.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

from bench import machine_code
from bench.machine_code import LANES, NO_BARRIER, PRODUCTS, Access, Instruction, Step
from bench.run import FOLDER, load_folder
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import PASSES, Plan, candidates, placed

LEVELS = ("low", "middle", "high")
PARTS = ("exchange", "product", "reduction", "cell", "stores")


# What the clock model assumes of the hardware. None of these is in the machine code.


@dataclass(frozen=True)
class Range:
    """`low` is what makes a step fastest, whichever of the numbers is smaller."""

    low: float
    middle: float
    high: float
    unit: str
    source: str


_LUO = "Luo et al., Benchmarking and Dissecting the NVIDIA Hopper GPU, arXiv:2402.13499"
_L2 = "arXiv:2501.12084, latencies: near and far partition of L2, hit and miss"
_B300 = "community measurements on a B300, taken as ratios"
_ESTIMATE = "no publication; estimated from the latencies"


@dataclass(frozen=True)
class Parameters:
    """Latencies, issue intervals and rates of one multiprocessor."""

    clock_ghz: Range = Range(1.7, 1.7, 1.7, "GHz", "H100 SXM under load, between base and boost")
    # From a load's issue to its value: one that hits L2, one that does not.
    l2_load: Range = Range(250, 300, 400, "clocks", _L2)
    dram_load: Range = Range(520, 650, 900, "clocks", _L2)
    # From a store until a load of another multiprocessor can see it.
    store_visible: Range = Range(140, 180, 260, "clocks", "half of l2_load, " + _ESTIMATE)
    # How much later than it could be a poll sees what it waits for.
    poll_phase: Range = Range(100, 120, 250, "clocks", "half a poll's trip, " + _ESTIMATE)
    shared_load: Range = Range(29, 30, 33, "clocks", _LUO)
    shuffle: Range = Range(23, 24, 26, "clocks", "as on Volta, arXiv:1804.06826")
    special: Range = Range(18, 24, 42, "clocks", "MUFU: tanh 18, rcp 42: " + _B300)
    mma: Range = Range(24, 33, 33, "clocks", "24.1, about 32 with float32 sums: " + _LUO)
    barrier: Range = Range(14, 20, 30, "clocks", "38 with its issue, of 8 warps: " + _B300)
    # From one instruction to the next in one of the four schedulers.
    special_clocks: Range = Range(8, 8, 8, "clocks", "CUDA C++ Programming Guide: 16 a clock")
    mma_clocks: Range = Range(6.5, 8, 8, "clocks", "1024 multiply-adds a clock: " + _LUO)
    # Of warp groups: from a product to the next that adds to it, and how fast all four go.
    wgmma_chain: Range = Range(8, 13, 18, "clocks", "of 16 columns; " + _ESTIMATE)
    wgmma_multiply_adds: Range = Range(
        2048, 2048, 1365, "multiply-adds a clock", "989 TFLOPS of 132: NVIDIA H100 data sheet"
    )
    # From L2 into one multiprocessor, and into all of them.
    l2_bytes_per_clock: Range = Range(
        64, 45, 24, "bytes a clock", "a multiprocessor's port; its share of 5.5 TB/s: " + _LUO
    )
    l2_bytes_of_all: Range = Range(
        4100, 3200, 2600, "bytes a clock", "5.5 TB/s at 1.7 GHz, and a fifth to both sides: " + _LUO
    )

    def at(self, level: str) -> SimpleNamespace:
        """One number each: all low, all middle or all high."""
        ranges = {f.name: getattr(self, f.name) for f in fields(self)}
        return SimpleNamespace(**{name: getattr(r, level) for name, r in ranges.items()})

    def known(self, values: dict[str, float], source: str) -> Parameters:
        """With some of them measured: low, middle and high alike.

        Raises:
            ValueError: one is no parameter, or no positive number.
        """
        found = self
        for name, value in values.items():
            table = getattr(self, name, None)
            if not isinstance(table, Range) or not value > 0:
                raise ValueError(
                    f"{source}: limits.clocks: expected positive numbers of "
                    f"{[f.name for f in fields(self)]}, got {name!r}: {value!r}"
                )
            measured = Range(value, value, value, table.unit, f"measured, {source}")
            found = replace(found, **{name: measured})
        return found


def load_parameters(folder: Path = FOLDER, capability: str = "sm_90") -> Parameters:
    """The table, with what the newest results of such a GPU have measured (bench/floor.py)."""
    parameters = Parameters()
    runs = [run for device in load_folder(folder).values() for run in device]
    for run in sorted(runs, key=lambda run: run["environment"]["date"]):
        if run["environment"].get("capability") == capability:
            clocks = (run.get("limits") or {}).get("clocks", {})
            parameters = parameters.known(clocks, run["path"])
    return parameters


# The clock model.

SCHEDULERS = 4
# Of other instructions with a latency that varies; nothing on the way through a step waits long
# for one, so they need no range.
OTHER_LATENCY = {"LDC": 40, "ULDC": 40, "LDCU": 40, "S2R": 30, "S2UR": 30}
USUAL_LATENCY = 20
STORE_READ = 12  # until a store has read its registers
JUMP = 8
PIPE_ENTRY = 2  # clocks until an access is at the pipe to shared memory and to L2


class Deadlock(Exception):
    """Warps that wait for what they publish only behind that."""


class Multiprocessor:
    """Runs a step on the warps of one program, or of some `together`, each of another group.

    Args:
        wavefronts: of the accesses to shared memory, by address of the instruction.
        assumed: `Parameters.at`.
        warps: of a program.
    """

    def __init__(
        self, step: Step, wavefronts: dict[int, float], assumed: SimpleNamespace, warps: int,
        together: int = 1,
    ):  # fmt: skip
        self.step, self.near = step, machine_code.near(step)
        self.wavefronts, self.assumed = wavefronts, assumed
        self.warps, self.all_warps = warps, warps * together
        self.issue_free = [0.0] * SCHEDULERS
        self.mma_free = [0.0] * SCHEDULERS
        self.special_free = [0.0] * SCHEDULERS
        # Of each warp: when its group may add to its sums again, and when those are there.
        self.chain_free = [0.0] * self.all_warps
        self.sums_done = [0.0] * self.all_warps
        self.shared_free = self.l2_free = 0.0
        self.released = [[[0.0] for _ in range(6)] for _ in range(self.all_warps)]
        # Of each program: the warps at its block barrier, and their pause behind it.
        self.waiting: list[list[tuple[int, float]]] = [[] for _ in range(together)]
        # How many stores for others a program makes in a step. Of each step and program: how many
        # there are, and when the others see the last of them.
        stores = [n for n, i in enumerate(step) if i.is_publication]
        polls = [n for n, i in enumerate(step) if i.is_ring_load]
        self.expected = warps * len(stores)
        self.published: dict[tuple[int, int], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self.published |= {(0, program): (self.expected, 0.0) for program in range(together)}
        self.parked: list[int] = []  # warps that poll for what is still to be published
        # Backward a step waits for its own stores, forward for those of the step before.
        self.own = bool(stores and polls and stores[0] < polls[0])

    def run(self, steps: int = 4) -> tuple[float, tuple[float, ...]]:
        """Runs a few steps and times the last but one, when the first ones are over.

        Returns:
            clocks of that step, whatever it waits for; and the clock, from its start, at which
            the first warp issued each instruction of it.
        Raises:
            Deadlock: the step publishes only a part before it waits for all of it.
        """
        at = [(0, 0)] * self.all_warps  # step and position of each warp
        issued: list[list[float]] = [[] for _ in range(steps)]  # by the first warp, of each step
        queue: list[tuple[float, int, int]] = []  # when to ask a warp again; the oldest first
        asked = 0

        def ask(warp: int, when: float) -> None:
            nonlocal asked
            asked += 1
            heapq.heappush(queue, (when, asked, warp))

        for warp in range(self.all_warps):
            ask(warp, 0.0)
        while queue:
            now, _, warp = heapq.heappop(queue)
            step, position = at[warp]
            if step == steps:
                continue
            i = self.step[position]
            could = max(now, self.earliest(warp, i))
            if could > now:
                ask(warp, could)
                continue
            program = warp // self.warps
            if i.is_ring_load and self.published[step + self.own, program][0] < self.expected:
                self.parked.append(warp)
                continue
            if warp == 0:
                issued[step].append(now)
            after = self.issue(warp, step, i, now)
            if i.is_publication:
                for other in self.parked:
                    ask(other, now)
                self.parked = []
            position += 1
            if position == len(self.step):
                step, position, after = step + 1, 0, after + JUMP
            at[warp] = (step, position)
            if i.name != "BAR":
                ask(warp, after)
                continue
            waiting = self.waiting[program]
            waiting.append((warp, after - now))
            if len(waiting) == self.warps:
                for other, pause in waiting:
                    ask(other, now + max(pause, self.assumed.barrier))
                waiting.clear()
        if self.parked:
            raise Deadlock(
                f"{len(self.parked)} of {self.all_warps} warps wait for what they publish later"
            )
        start = issued[-2][0]
        return issued[-1][0] - start, tuple(t - start for t in issued[-2])

    def earliest(self, warp: int, i: Instruction) -> float:
        """When nothing keeps the instruction back any more."""
        scheduler = warp % SCHEDULERS
        times = [self.issue_free[scheduler]]
        times += [max(self.released[warp][b]) for b in range(6) if i.wait >> b & 1]
        if i.name in ("HMMA", "HGMMA"):
            times.append(self.mma_free[scheduler])
        if i.name == "HGMMA":
            times.append(self.chain_free[warp])
        elif i.op.startswith("WARPGROUP.DEPBAR"):
            times.append(self.sums_done[warp])
        elif i.name == "MUFU":
            times.append(self.special_free[scheduler])
        return max(times)

    def issue(self, warp: int, step: int, i: Instruction, now: float) -> float:
        """Does what the instruction does; returns when the warp may issue its next one."""
        a, scheduler = self.assumed, warp % SCHEDULERS
        self.issue_free[scheduler] = now + 1
        done, read = now + OTHER_LATENCY.get(i.name, USUAL_LATENCY), now + STORE_READ
        pipe = self.wavefronts.get(i.address, 0.0)
        if i.name == "SHFL":
            pipe = 1
        elif i.name in ("LDG", "STG", "LD", "ST"):
            pipe = max(1, i.width // 4)
        if pipe:
            self.shared_free = max(now + PIPE_ENTRY, self.shared_free) + pipe
            read = self.shared_free
        if i.name == "HMMA":
            self.mma_free[scheduler] = now + a.mma_clocks
            done = now + a.mma
        elif i.name == "HGMMA":
            self.mma_free[scheduler] = now + warp_group_clocks(i, a)
            self.chain_free[warp] = now + a.wgmma_chain
            self.sums_done[warp] = now + a.mma
        elif i.name == "MUFU":
            self.special_free[scheduler] = now + a.special_clocks
            done = now + a.special
        elif i.name in ("LDS", "LDSM", "SHFL"):
            latency = a.shuffle if i.name == "SHFL" else a.shared_load
            done = self.shared_free - 1 - PIPE_ENTRY + latency
        elif i.name in ("LDG", "LD"):
            done = self.load(warp, i, step, read)  # behind what holds the pipe
        if i.is_publication:
            at = step + 1, warp // self.warps
            count, last = self.published[at]
            seen = max(now, read - STORE_READ) + a.store_visible
            self.published[at] = (count + 1, max(last, seen))
        for barrier, when in ((i.write, done), (i.read, read)):
            if barrier != NO_BARRIER:
                pending = [t for t in self.released[warp][barrier] if t > now]
                self.released[warp][barrier] = [*pending, when]
        return now + max(1, i.stall)

    def load(self, warp: int, i: Instruction, step: int, now: float) -> float:
        """When the value of a load from global memory is there."""
        a = self.assumed
        latency = a.l2_load if i.is_strong or i.address in self.near else a.dram_load
        self.l2_free = max(self.l2_free, now) + LANES * i.width / a.l2_bytes_per_clock
        done = max(now + latency, self.l2_free)
        if i.is_ring_load and self.expected:
            _, visible = self.published[step + self.own, warp // self.warps]
            if now + latency / 2 < visible:
                done = max(done, visible + latency / 2 + a.poll_phase)
        return done


def warp_group_clocks(i: Instruction, assumed: SimpleNamespace) -> float:
    """How long a warp's part of a product of its group, a quarter, holds its scheduler's unit."""
    m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", i.op).groups())  # type: ignore[union-attr]
    return m * n * k / assumed.wgmma_multiply_adds


# One compiled kernel, read.


@dataclass(frozen=True)
class Reading:
    """What is known of one compiled kernel; waits, loads and the like are of a step.

    Attributes:
        registers, spill, shared: registers of a thread, bytes it spills, bytes of a program.
        programs, launches, together: that exchange with each other; in sequence, for the whole
            batch; programs on one multiprocessor.
        instructions, products, special, barriers: of one warp, without spins; of these,
            tensor-core and MUFU instructions, and block barriers.
        fences, spin_barriers: what orders accesses of the GPU; block barriers in spins.
        wavefronts, ideal_wavefronts: clocks of shared memory, all warps; without bank conflicts.
        unknown: accesses whose address could not be computed, and of which nothing is counted.
        ring_loads, serial_waits, planned_waits: loads of what others stored; how often one is
            issued only when another's value is there; how often the plan itself asks for that.
        early: loads that are waited for before the step has waited for other programs.
        predicted_us, low_us, high_us, parts_us: of a step of the whole batch, in the clock model;
            where predicted_us goes (see `attribute`).
    """

    registers: int
    spill: int
    shared: int
    programs: int
    launches: int
    together: int
    warps: int
    instructions: int
    products: int
    special: int
    barriers: int
    fences: int
    spin_barriers: int
    wavefronts: int
    ideal_wavefronts: int
    unknown: tuple[str, ...]
    ring_loads: int
    serial_waits: int
    planned_waits: int
    early: tuple[str, ...]
    predicted_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    parts_us: tuple[float, ...] | None = None


def read(
    ptx: str, sass: str, plan: Plan, H: int, used: dict[str, int], *, B: int = 1,
    lanes: int = 1, trips: int | None = None, multiprocessors: int = 132,
    parameters: Parameters | None = None,
) -> Reading:  # fmt: skip
    """Reads one compiled kernel.

    Args:
        used: its registers, spill and shared, as the compiler says.
        B: the batch; decides how many launches there are, and how many programs run at once on
            the multiprocessors. H: units of a lane.
        trips: to L2 in a step, of all stages; by default those of one stage.
        parameters: without them, no time is predicted.
    """
    shared = machine_code.accesses(ptx, 32 * plan.num_warps)
    step, spin_barriers = machine_code.sass_step(sass)
    counts = Counter(i.name for i in step)
    programs = plan.programs(H)
    launches = 1 if plan.batch_per_launch is None else -(-B // plan.batch_per_launch)
    running = programs * lanes * -(-min(B, plan.batch_per_launch or B) // plan.block_b)
    together = 1 if running <= multiprocessors else plan.programs_per_sm
    times: dict[str, float | tuple[float, ...]] = {}
    for level in LEVELS if parameters is not None else ():
        assumed = parameters.at(level)
        share = assumed.l2_bytes_of_all / min(running, multiprocessors)
        assumed.l2_bytes_per_clock = min(assumed.l2_bytes_per_clock, share)
        scale = launches / (assumed.clock_ghz * 1e3)
        model = Multiprocessor(step, by_address(shared, step), assumed, plan.num_warps, together)
        # Programs on one multiprocessor need more steps until they share it evenly.
        clocks, issued = model.run(4 * together)
        times["predicted_us" if level == "middle" else f"{level}_us"] = clocks * scale
        if level == "middle" and plan.exchanged:
            times["parts_us"] = tuple(t * scale for t in attribute(step, issued, clocks))
    return Reading(
        **used,
        programs=programs,
        launches=launches,
        together=together,
        warps=plan.num_warps,
        instructions=len(step),
        products=sum(counts[name] for name in PRODUCTS),
        special=counts["MUFU"],
        barriers=counts["BAR"],
        fences=sum(i.orders for i in step),
        spin_barriers=spin_barriers,
        wavefronts=plan.num_warps * sum(a.wavefronts or 0 for a in shared),
        ideal_wavefronts=plan.num_warps * sum(a.ideal for a in shared if a.wavefronts is not None),
        unknown=tuple(a.text for a in shared if a.wavefronts is None),
        ring_loads=sum(i.is_ring_load for i in step),
        serial_waits=machine_code.serial_waits(step),
        planned_waits=(trips or -(-plan.chunks // plan.prefetch)) - 1,
        early=tuple(f"{i.address:#x} {i.text}" for i in machine_code.early_consumers(step)),
        **times,
    )


def by_address(shared: Iterable[Access], step: Step) -> dict[int, float]:
    """Wavefronts of each machine instruction that uses shared memory.

    Accesses of one name and width keep their order from PTX to machine code, where an inner loop
    may be unrolled: the same accesses over again. Where there are fewer or more than that, all get
    the mean. An unknown address counts as without conflicts, and is reported elsewhere.
    """
    waves_of: dict[tuple[str, int], list[float]] = defaultdict(list)
    for a in shared:
        waves_of[a.name, a.width].append(a.ideal if a.wavefronts is None else a.wavefronts)
    placed: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i in step:
        if i.name in ("LDS", "LDSM", "STS"):
            placed[i.name, i.width].append(i.address)
    found = {}
    for (name, width), addresses in placed.items():
        waves = waves_of.get((name, width)) or [max(1.0, width // 4)]
        if len(addresses) % len(waves):
            waves = [sum(waves) / len(waves)]
        found.update({a: waves[n % len(waves)] for n, a in enumerate(addresses)})
    return found


def attribute(step: Step, issued: tuple[float, ...], clocks: float) -> tuple[float, ...]:
    """Clocks of a step by PARTS, for the first warp.

    The landmarks, in the order in which a step meets them, wherever its code begins:

        exchange    the stores for others; and from the first load of what they stored to the
                    last wait for a loaded value that the first product needs
        product     from there to the last tensor-core instruction
        reduction   to the last access to shared memory before the first special function, or
                    before the first store where there is none
        cell        to the first store for others
        stores      what is stored and fetched from there to the first load

    A wait counts for the instruction that waits.

    Raises:
        ValueError: there is no product, no load or no store of what is exchanged.
    """
    n = len(step)
    ring = next((k for k, i in enumerate(step) if i.is_ring_load), None)
    # Positions of the step from its first load on.
    turn = [(ring + k) % n for k in range(n)] if ring is not None else []
    names = [step[k].name for k in turn]
    products = [p for p, name in enumerate(names) if name in PRODUCTS]
    products = products or [p for p, name in enumerate(names) if name == "FFMA"]
    if not products:
        missing = "load of what others stored" if ring is None else "product"
        raise ValueError(f"expected a {missing} in the time loop, found none")
    first, last = products[0], products[-1]
    outstanding = waited = 0
    for p, k in enumerate(turn[: first + 1]):
        if outstanding & step[k].wait:
            waited, outstanding = p, outstanding & ~step[k].wait
        if step[k].is_ring_load and step[k].write != NO_BARRIER:
            outstanding |= 1 << step[k].write
    published = [p for p in range(last + 1, n) if step[turn[p]].is_publication]
    if not published:
        raise ValueError("expected a store for others behind the product, found none")
    begin, end = published[0], published[-1] + 1
    behind = next((p for p in range(last, begin) if names[p] == "MUFU"), begin)
    mixed = [p for p in range(last, behind) if names[p] in ("LDS", "SHFL")]
    reduced = (mixed[-1] if mixed else last) + 1
    spent = dict.fromkeys(PARTS, 0.0)
    ends = (waited + 1, last + 1, reduced, begin, end, n)
    parts = (*PARTS[:4], "exchange", "stores")
    place = {k: p for p, k in enumerate(turn)}
    for k in range(n):
        part = next(part for part, e in zip(parts, ends, strict=True) if place[k] < e)
        # From the instruction before, so that a wait counts for the one that waits.
        spent[part] += issued[k] - issued[k - 1] if k else clocks - issued[-1]
    return tuple(spent.values())


# Clocks of shared memory over those without bank conflicts. The kernels are made for sm_90; on the
# others a plan may lose a little.
MOST_WAVEFRONTS = {"sm_80": 1.5, "sm_89": 1.5, "sm_90": 1.25, "sm_120": 1.5}


def gate(reading: Reading, target: str, *, exchanged: bool = True) -> list[str]:
    """What no compiled time loop may show, as it has cost a multiple of a step's time; empty for a
    good kernel, and for targets that are only reported. `exchanged`: whether programs hand each
    other anything."""
    if target not in MOST_WAVEFRONTS:
        return []
    found = []
    most = MOST_WAVEFRONTS[target]
    if reading.wavefronts > most * reading.ideal_wavefronts:
        found.append(
            f"bank conflicts: {reading.wavefronts} wavefronts a step, more than {most} times the "
            f"{reading.ideal_wavefronts} without conflicts"
        )
    if reading.unknown:
        found.append(f"shared memory at unknown addresses: {reading.unknown[0]}")
    if reading.spill:
        found.append(f"{reading.spill} bytes spilled")
    if target != "sm_90":
        return found
    if exchanged and not reading.ring_loads:
        found.append("no way round the loop reads what others stored and orders nothing")
    if reading.serial_waits > reading.planned_waits:
        found.append(
            f"loads of the ring wait for one another {reading.serial_waits} times a step, "
            f"{reading.planned_waits} planned"
        )
    if exchanged and reading.early:
        found.append(f"fetched ahead, and waited for before the poll: {reading.early[0]}")
    if reading.fences:
        found.append(f"{reading.fences} fences, acquires or atomics in every step")
    if reading.spin_barriers:
        found.append(f"{reading.spin_barriers} block barriers in a spin")
    return found


# The command.

COLUMNS = {
    "regs": "registers", "spill": "spill", "smem": "shared", "programs": "programs",
    "launches": "launches", "SASS": "instructions", "mma": "products", "MUFU": "special",
    "BAR": "barriers", "fence": "fences", "polled": "ring_loads",
    "waves": "wavefronts", "ideal": "ideal_wavefronts", "serial": "serial_waits",
}  # fmt: skip


def table(rows: list[tuple[str, Reading]]) -> str:
    lines = [["kernel", *COLUMNS, "early", "us a step [low..high]", *PARTS]]
    for name, r in rows:
        numbers = [str(getattr(r, field)) for field in COLUMNS.values()]
        time = f"{r.predicted_us:.2f} [{r.low_us:.2f}..{r.high_us:.2f}]"
        lines.append([name, *numbers, str(len(r.early)), time, *(f"{t:.2f}" for t in r.parts_us)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    import triton

    from bench import aot

    parser = argparse.ArgumentParser(
        prog="python -m bench.step_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cell", choices=REGISTRY, default="lstm")
    parser.add_argument("--dtype", choices=aot.DTYPES, default="bf16")
    parser.add_argument("--precision", choices=aot.PRECISIONS, default="tf32", help="of fp32")
    parser.add_argument("--hidden", type=int, default=768, metavar="H")
    parser.add_argument("--batch", type=int, default=16, metavar="B")
    parser.add_argument("--pass", dest="passes", choices=PASSES, help="both by default")
    parser.add_argument("--target", choices=aot.TARGETS, default="sm_90")
    parser.add_argument("--every-plan", action="store_true", help="all that the plan chooses from")
    options = parser.parse_args(arguments)
    for name in ("hidden", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    jobs, H, B = [], options.hidden, options.batch
    try:
        for pass_ in [options.passes] if options.passes else PASSES:
            job = aot.planned(
                options.target, options.cell, pass_, options.dtype, options.precision, H, B
            )
            plans = [job.plan]
            if options.every_plan:
                device = aot.TARGETS[options.target]
                every = candidates(
                    REGISTRY[job.cell], pass_, aot.DTYPES[job.dtype], H, device, job.precision
                )
                plans = [fit[0] for plan in every if (fit := placed(plan, H, 1, B, device))]
            jobs += [replace(job, plan=plan) for plan in plans]
        aot.require_compiler()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    assumed, rows, faults = load_parameters(capability=options.target), [], []
    for job in jobs:
        p, dtype = job.plan, job.precision if job.dtype == "fp32" else job.dtype
        name = f"{job.cell}_{dtype}_{H}_{B}-{job.pass_}-" + (
            f"{p.block_b}x{p.block_h}k{p.block_k}s{p.split_k}r{p.resident}a{p.prefetch}w{p.num_warps}"
        )
        _, reading = aot.compile_and_read(job, B, assumed)
        rows.append((name, reading))
        faults += [f"{name}: {fault}" for fault in gate(reading, job.target)]
    print(
        f"Triton {triton.__version__}, {options.target}; times are predicted, for the whole batch"
    )
    print("\n".join([table(rows), *faults]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
