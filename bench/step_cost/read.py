"""What one compiled kernel costs: everything that its PTX and machine code tell, in one record."""

from __future__ import annotations

import functools
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.step_cost import ptx, sass
from bench.step_cost.parameters import LEVELS, Parameters
from bench.step_cost.simulate import simulate
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import Plan, plan_scan

PARTS = ("exchange", "product", "reduction", "cell", "stores")
SHARED = ("LDS", "STS", "LDSM", "STSM", "HGMMA")


@dataclass(frozen=True)
class Reading:
    """Attributes:
    registers, spill, shared: registers of a thread, bytes it spills, bytes of a program.
    programs: that exchange with each other.
    launches: in sequence, for the whole batch.
    together: programs on one multiprocessor.
    instructions: of a step, of one warp; without spin loops and what most steps do not run.
    products, special: of these, tensor-core and MUFU instructions.
    barriers, fences: of these, block barriers, and what orders accesses of the GPU.
    spin_barriers: block barriers inside of loops that wait for other programs.
    wavefronts, ideal_wavefronts: clocks of shared memory a step, all warps, and those without
        bank conflicts.
    unknown: accesses whose address could not be computed, and of which nothing is counted.
    ring_loads, serial_waits: loads of what others stored, and how often one is issued only
        when another's value is there.
    planned_waits: how often the plan itself asks for that.
    early: loads that are waited for before the step has waited for other programs.
    predicted_us, low_us, high_us: of a step of the whole batch, in the clock model.
    parts_us: of predicted_us, where it goes; see `attribute`.
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


def disassemble(cubin: bytes) -> str:
    """The machine code as text, with its scheduling bits."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-hex", "-c", file], capture_output=True, text=True, check=True
        )
    return done.stdout


def read(
    ptx_text: str,
    sass_text: str,
    plan: Plan,
    H: int,
    used: dict[str, int],
    *,
    B: int = 1,
    multiprocessors: int = 132,
    parameters: Parameters | None = None,
) -> Reading:
    """Reads one compiled kernel.

    Args:
        used: its registers, spill and shared, as the compiler says.
        B: the batch; decides how many launches there are, and how many programs run at once on
            the multiprocessors.
        parameters: without them, no time is predicted.
    """
    accesses = ptx.accesses(ptx_text, 32 * plan.num_warps)
    loop = sass.time_loop(sass_text)
    counts = loop.counts()
    known = [a for a in accesses if a.wavefronts is not None]
    programs = -(-H // plan.block_h)
    launches = 1 if plan.batch_per_launch is None else -(-B // plan.batch_per_launch)
    running = programs * -(-min(B, plan.batch_per_launch or B) // plan.block_b)
    together = 1 if running <= multiprocessors else plan.programs_per_sm
    busy = min(running, multiprocessors)
    times: list[float | None] = [None] * len(LEVELS)
    parts = None
    if parameters is not None:
        wavefronts = by_address(accesses, loop.step)
        for n, level in enumerate(LEVELS):
            assumed = parameters.at(level)
            share = assumed.l2_bytes_of_all / busy
            assumed.l2_bytes_per_clock = min(assumed.l2_bytes_per_clock, share)
            # Programs on one multiprocessor need more steps until they share it evenly.
            result = simulate(
                loop, wavefronts, assumed,
                warps=plan.num_warps, together=together, steps=4 * together,
            )  # fmt: skip
            scale = launches / (assumed.clock_ghz * 1e3)
            times[n] = result.clocks * scale
            if level == "middle":
                spent = attribute(loop.step, result.issued, result.clocks)
                parts = tuple(clocks * scale for clocks in spent)
    low, middle, high = times
    return Reading(
        registers=used["registers"],
        spill=used["spill"],
        shared=used["shared"],
        programs=programs,
        launches=launches,
        together=together,
        warps=plan.num_warps,
        instructions=len(loop.step),
        products=sum(counts[name] for name in sass.PRODUCTS),
        special=counts["MUFU"],
        barriers=counts["BAR"],
        fences=sum(i.orders for i in loop.step),
        spin_barriers=loop.spin_barriers,
        wavefronts=round(plan.num_warps * sum(a.wavefronts or 0 for a in known)),
        ideal_wavefronts=round(plan.num_warps * sum(a.ideal for a in known)),
        unknown=tuple(a.text for a in accesses if a.wavefronts is None),
        ring_loads=sum(i.is_ring_load for i in loop.step),
        serial_waits=sass.serial_waits(loop.step),
        planned_waits=-(-plan.chunks // plan.prefetch) - 1,
        early=tuple(f"{i.address:#x} {i.text}" for i in sass.early_consumers(loop.step)),
        predicted_us=middle,
        low_us=low,
        high_us=high,
        parts_us=parts,
    )


@functools.lru_cache(maxsize=64)
def _compiled(cell: str, dtype: str, H: int, B: int, which: str, precision: str, target: str):
    """What the plan chooses, compiled: the plan, PTX, SASS, and what a program uses."""
    from bench import aot

    plan = plan_scan(
        REGISTRY[cell], which, aot.DTYPES[dtype], B=B, H=H, D=1,
        device=aot.TARGETS[target], input_precision=precision,
    )  # fmt: skip
    job = aot.Job(target, cell, which, "gates", dtype, precision, H, plan, plain=True)
    compiled = aot.compile_job(job)
    sass_text = disassemble(compiled.asm["cubin"])
    return plan, compiled.asm["ptx"], sass_text, aot.resources(compiled)


def predict(
    cell: str,
    dtype: str,
    H: int,
    B: int,
    which: str,
    *,
    precision: str = "tf32",
    target: str = "sm_90",
    parameters: Parameters | None = None,
) -> Reading:
    """Reads what the plan chooses for a layer, and predicts the time of a step.

    Args:
        dtype: "fp16", "bf16" or "fp32". which: "forward" or "backward".
        precision: of products of fp32, "tf32" or "ieee".
        parameters: by default the table's.
    Raises:
        ValueError: there is no plan for it.
    """
    from bench import aot

    plan, ptx_text, sass_text, used = _compiled(cell, dtype, H, B, which, precision, target)
    return read(
        ptx_text, sass_text, plan, H, used, B=B,
        multiprocessors=aot.TARGETS[target].multiprocessors,
        parameters=parameters or Parameters(),
    )  # fmt: skip


def by_address(
    accesses: Iterable[ptx.Access], step: tuple[sass.Instruction, ...]
) -> dict[int, float]:
    """Wavefronts of each machine instruction that uses shared memory.

    Accesses of one kind and width keep their order from PTX to machine code, where an inner loop
    may be unrolled: the same accesses over again. Where there are fewer or more than that, all get
    the mean. An unknown address counts as without conflicts, and is reported elsewhere.
    """
    of_kind: dict[tuple[str, int], list[float]] = defaultdict(list)
    for a in accesses:
        of_kind[a.kind, a.width].append(a.ideal if a.wavefronts is None else a.wavefronts)
    placed: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i in step:
        if i.name in SHARED:
            placed[i.name, i.shared_width].append(i.address)
    found = {}
    for key, addresses in placed.items():
        waves = of_kind.get(key)
        if not waves:
            waves = [float(max(1, key[1] // (16 if key[0].endswith("M") else 4)))]
        if len(addresses) % len(waves):
            waves = [sum(waves) / len(waves)]
        found.update({a: waves[n % len(waves)] for n, a in enumerate(addresses)})
    return found


def attribute(
    step: tuple[sass.Instruction, ...], issued: tuple[float, ...], clocks: float
) -> tuple[float, ...]:
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
    ring = [k for k, i in enumerate(step) if i.is_ring_load]
    matrix = [k for k, i in enumerate(step) if i.name in sass.PRODUCTS or i.name == "FFMA"]
    tensor = [k for k in matrix if step[k].name != "FFMA"] or matrix
    if not tensor or not ring:
        missing = "load of what others stored" if tensor else "product"
        raise ValueError(f"expected a {missing} in the time loop, found none")
    turn = [(ring[0] + k) % n for k in range(n)]
    outstanding = waited = 0
    for p, k in enumerate(turn):
        if outstanding & step[k].wait:
            waited, outstanding = p, outstanding & ~step[k].wait
        if k in tensor:
            break
        if step[k].is_ring_load and step[k].write != sass.NO_BARRIER:
            outstanding |= 1 << step[k].write
    label = {k: "exchange" for k in turn[: waited + 1]}
    last = max(turn.index(k) for k in tensor)
    published = [p for p, k in enumerate(turn) if step[k].is_publication and p > last]
    if not published:
        raise ValueError("expected a store for others behind the product, found none")
    begin, end = published[0], published[-1] + 1
    special = [p for p in range(last, begin) if step[turn[p]].name == "MUFU"]
    mixing = ("LDS", "SHFL", "LDSM")
    behind = special[0] if special else begin
    mixed = [p for p in range(last, behind) if step[turn[p]].name in mixing]
    reduced = mixed[-1] + 1 if mixed else last + 1
    for p, k in enumerate(turn):
        if k in label:
            continue
        if p <= last:
            label[k] = "product"
        elif p < reduced:
            label[k] = "reduction"
        elif p < begin:
            label[k] = "cell"
        elif p < end:
            label[k] = "exchange"
        else:
            label[k] = "stores"
    spent = dict.fromkeys(PARTS, 0.0)
    for k in range(n):
        # From the instruction before, so that a wait counts for the one that waits.
        spent[label[k]] += issued[k] - issued[k - 1] if k else clocks - issued[-1]
    return tuple(spent[part] for part in PARTS)
