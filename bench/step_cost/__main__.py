"""Prints what a step of one layer costs, for the Triton that is installed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from bench import aot, results, shapes
from bench.step_cost import parameters
from bench.step_cost.gate import gate
from bench.step_cost.read import PARTS, Reading, disassemble, predict, read
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import PASSES, Plan, candidates, placed, plan_scan

COLUMNS = (
    ("regs", "registers"), ("spill", "spill"), ("smem", "shared"), ("programs", "programs"),
    ("launches", "launches"), ("SASS", "instructions"), ("mma", "products"), ("MUFU", "special"),
    ("BAR", "barriers"), ("fence", "fences"), ("polled", "ring_loads"),
    ("waves", "wavefronts"), ("ideal", "ideal_wavefronts"), ("serial", "serial_waits"),
)  # fmt: skip


def plans(options, which: str) -> list[Plan]:
    """What to compile for one pass: the planner's choice, or all it chooses from.

    Raises:
        ValueError: there is no such plan.
    """
    cell, device = REGISTRY[options.cell], aot.TARGETS[options.target]
    dtype, H, B = aot.DTYPES[options.dtype], options.hidden, options.batch
    precision = options.precision
    if not options.every_plan:
        return [
            plan_scan(cell, which, dtype, B=B, H=H, D=1, device=device, input_precision=precision)
        ]
    every = candidates(cell, which, dtype, H, device, precision)
    found = [fitting[0] for p in every if (fitting := placed(p, H, 1, B, device)) is not None]
    if not found:
        raise ValueError(f"no plan at all for {which} of {cell.name!r} with H = {H}")
    return found


def label(job: aot.Job, batch: int) -> str:
    p = job.plan
    dtype = job.precision if job.dtype == "fp32" else job.dtype
    return (
        f"{job.cell}_{dtype}_{job.H}_{batch}-{job.which}-"
        f"{p.block_b}x{p.block_h}k{p.block_k}s{p.split_k}r{p.resident}a{p.prefetch}w{p.num_warps}"
    )


def measure(job: aot.Job, batch: int, assumed, keep: Path | None) -> tuple[Reading, dict]:
    """Compiles and reads one kernel; returns what is printed and what is written."""
    compiled = aot.compile_job(job)
    used = aot.resources(compiled)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    sass = disassemble(cubin)
    reading = read(
        ptx, sass, job.plan, job.H, used, B=batch,
        multiprocessors=aot.TARGETS[job.target].multiprocessors, parameters=assumed,
    )  # fmt: skip
    info = {
        "cell": job.cell, "dtype": job.dtype, "precision": job.precision, "H": job.H, "B": batch,
        "pass": job.which, "target": job.target,
        "triton": triton.__version__, "plan": asdict(job.plan), **asdict(reading),
        "parts_us": dict(zip(PARTS, reading.parts_us or (), strict=True)),
        "faults": gate(reading, job.target),
    }  # fmt: skip
    if keep is not None:
        folder = keep / label(job, batch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.ptx").write_text(ptx)
        (folder / "kernel.sass").write_text(sass)
        (folder / "kernel.cubin").write_bytes(cubin)
        (folder / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    return reading, info


def table(rows: list[tuple[str, Reading, dict]]) -> str:
    head = ["kernel", *(name for name, _ in COLUMNS), "early", "us a step [low..high]", *PARTS]
    lines = [head]
    for name, reading, info in rows:
        numbers = [str(getattr(reading, field)) for _, field in COLUMNS]
        time = f"{reading.predicted_us:.2f} [{reading.low_us:.2f}..{reading.high_us:.2f}]"
        parts = [f"{us:.2f}" for us in info["parts_us"].values()]
        lines.append([name, *numbers, str(len(reading.early)), time, *parts])
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in columns)
        for columns in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def workloads(target: str, assumed) -> str:
    """Predicted times of one layer and direction of every named workload."""
    lines = [
        f"{'one layer, one direction':28} {'us a step, forward':>20} {'loop ms':>8} "
        f"{'backward':>20} {'loop ms':>8}"
    ]
    for shape in shapes.workloads():
        dtype, precision = shape.precision
        told = f"{shape.name:28}"
        for which in PASSES:
            r = predict(
                shape.cell, dtype, shape.H, shape.B, which,
                precision=precision, target=target, parameters=assumed,
            )  # fmt: skip
            time = f"{r.predicted_us:.2f} [{r.low_us:.2f}..{r.high_us:.2f}]"
            told += f" {time:>20} {shape.T * r.predicted_us / 1e3:8.3f}"
        lines.append(told)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step_cost", description=__doc__)
    parser.add_argument(
        "--workloads", action="store_true", help="the layers of real projects (bench/shapes.py)"
    )
    parser.add_argument("--cell", choices=REGISTRY, default="lstm")
    parser.add_argument("--dtype", choices=aot.DTYPES, default="bf16")
    parser.add_argument("--precision", choices=aot.PRECISIONS, default="tf32", help="of fp32")
    parser.add_argument("--hidden", type=int, default=768, metavar="H")
    parser.add_argument("--batch", type=int, default=16, metavar="B")
    parser.add_argument("--pass", dest="passes", choices=PASSES, help="both by default")
    parser.add_argument("--target", choices=aot.TARGETS, default="sm_90")
    parser.add_argument("--every-plan", action="store_true", help="all that the plan chooses from")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave PTX, SASS, cubin there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    options = parser.parse_args(arguments)
    for name in ("hidden", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    wanted = []
    try:
        for which in [options.passes] if options.passes else PASSES:
            wanted += [(which, plan) for plan in plans(options, which)]
        aot.require_compiler()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    assumed = parameters.load(results.FOLDER, options.target)
    if options.workloads:
        print(f"Triton {triton.__version__}, {options.target}; times are predicted")
        print(workloads(options.target, assumed))
        return 0
    rows = []
    for n, (which, plan) in enumerate(wanted, 1):
        job = aot.Job(
            options.target, options.cell, which, "gates", options.dtype, options.precision,
            options.hidden, plan, plain=True,
        )  # fmt: skip
        name = label(job, options.batch)
        if sys.stderr.isatty():
            print(f"\r{n}/{len(wanted)} {name}\033[K", end="", file=sys.stderr, flush=True)
        rows.append((name, *measure(job, options.batch, assumed, options.keep)))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(
        f"Triton {triton.__version__}, {options.target}; times are predicted, for the whole batch"
    )
    print(table(rows))
    for name, _, info in rows:
        for fault in info["faults"]:
            print(f"{name}: {fault}")
    if options.json is not None:
        options.json.write_text(json.dumps([info for _, _, info in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
