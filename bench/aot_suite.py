"""The ahead-of-time suite: which kernels are compiled, and the page that says how they came out.

    python -m bench.aot_suite               what a page in bench/results/aot/ needs; resumes
    python -m bench.aot_suite --target sm_90 --cell lstm --hidden 768 --output out/some.json
    python -m bench.aot_suite --check       whether the pages are of today's kernels

`make aot` does the first for three versions of Triton, each installed into a folder of its own that
comes before the environment's: PYTHONPATH=out/triton-3.6.0 python -m bench.aot_suite.

Results of single kernels stay in out/aot/, which is not in git, and are not compiled again unless a
kernel has changed. In git is a page for each version.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import triton

from bench import aot
from bench.step_cost.gate import MOST_WAVEFRONTS
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import PASSES, Plan, plan_scan

PAGES = aot.ROOT / "bench" / "results" / "aot"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")

MADE_FOR = "sm_90"
HIDDEN = (8, 64, 256, 300, 768, 1536, 2048)
BATCHES = (1, 256)
# One program, spread with an empty rest of a chunk, and as large as streaming.
FEW = (8, 300, 1536)
SOME = (512, 1024)


class Named(NamedTuple):
    """A layer whose time a page predicts."""

    cell: str
    dtype: str
    H: int
    B: int

    @property
    def name(self) -> str:
        dtype = "tf32" if self.dtype == "fp32" else self.dtype
        return f"{self.cell} {dtype} H={self.H} B={self.B}"


NAMED = (
    Named("lstm", "fp16", 768, 16),
    Named("gru", "bf16", 512, 64),
    Named("lstm", "bf16", 1024, 64),
    Named("lstm", "fp32", 512, 64),
    Named("lstm", "bf16", 128, 32),
    Named("lstm", "bf16", 512, 256),
    Named("lstm", "bf16", 300, 20),
    Named("lstm", "bf16", 200, 1),
    Named("lstm", "bf16", 1500, 48),
)


def _plan(target, cell, which, dtype, precision, H, B) -> Plan | None:
    try:
        return plan_scan(
            REGISTRY[cell], which, aot.DTYPES[dtype], B=B, H=H, D=1,
            device=aot.TARGETS[target], input_precision=precision,
        )  # fmt: skip
    except ValueError:  # test_plan.py says where that may happen
        return None


def _of(
    target,
    cells,
    dtypes,
    hidden,
    *,
    precision="tf32",
    batches=BATCHES,
    plain=True,
    save="gates",
) -> Iterator[aot.Job]:
    """A job for every plan of these."""
    for cell, which, dtype, H, B in itertools.product(cells, PASSES, dtypes, hidden, batches):
        plan = _plan(target, cell, which, dtype, precision, H, B)
        if plan is not None:
            saves = save if which == "backward" else "gates"
            yield aot.Job(target, cell, which, saves, dtype, precision, H, plan, plain=plain)


def jobs() -> list[tuple[aot.Job, int | None]]:
    """What is compiled, each kernel once, and the batch of those whose time is predicted.

    For sm_90, over BATCHES: every plan of LSTM with bfloat16 at all of HIDDEN, and with TF32, and
    of GRU with bfloat16, at SOME; at FEW also GRU and the plain cell (with TF32 at one of them),
    exact float32, and everything switched on (packed rows, two directions, states instead of
    gates). float16 is bfloat16 with another name of the element type, of which the first of NAMED
    has one example, and the two plain cells differ in one instruction. For the others: LSTM, one of
    each schedule.
    """
    found: dict[object, tuple[aot.Job, int | None]] = {}

    def add(job: aot.Job, B: int | None = None, kind: object = None) -> None:
        # How a batch is cut into launches is no part of a kernel.
        bare = replace(
            job, plan=replace(job.plan, batch_per_launch=None, directions_per_launch=None)
        )
        key = (kind or bare, B)
        if B is not None or all((kind or bare, b) not in found for b in (None, *batches)):
            found.setdefault(key, (job, B))

    batches = {named.B for named in NAMED}
    for named in NAMED:
        for job in _of(MADE_FOR, [named.cell], [named.dtype], [named.H], batches=[named.B]):
            add(job, named.B)
    for cell, dtype, hidden in (
        ("lstm", "bf16", HIDDEN), ("lstm", "fp32", SOME), ("gru", "bf16", SOME)
    ):  # fmt: skip
        for job in _of(MADE_FOR, [cell], [dtype], hidden):
            add(job)
    for job in _of(MADE_FOR, ["gru", "rnn_tanh"], ["bf16"], FEW):
        add(job)
    for job in _of(MADE_FOR, ["gru", "rnn_tanh"], ["fp32"], FEW[1:2]):
        add(job)
    for job in _of(MADE_FOR, ["lstm"], ["fp32"], FEW, precision="ieee"):
        add(job)
    for job in _of(MADE_FOR, ["lstm"], ["bf16", "fp32"], FEW, plain=False, save="states"):
        add(job)
    for target in aot.TARGETS:
        if target != MADE_FOR:
            dtypes = ["bf16", "fp32"] if target in MOST_WAVEFRONTS else ["bf16"]
            for job in _of(target, ["lstm"], dtypes, (300, 1536)):
                add(job, kind=(target, job.which, job.dtype, job.plan.schedule))
    return list(found.values())


def save(path: Path, results: dict[str, dict]) -> None:
    """Writes beside the file and renames: a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=0) + "\n")
    partial.replace(path)


def compile_all(wanted: dict[str, tuple[aot.Job, int | None]], path: Path, workers: int) -> dict:
    """Compiles what `path` has not, and keeps it there; shows the progress.

    Returns:
        the results that were wanted, by key; without those that failed to compile.
    """
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {k: r for k, r in results.items() if k in wanted}
    todo = [key for key in wanted if key not in results]
    print(f"{len(wanted)} kernels, {len(todo)} of them to compile", flush=True)
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(aot.run_job, *wanted[key]): key for key in todo}
        for done, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            name = wanted[key][0].key()
            try:
                results[key] = result = future.result()
            except Exception as error:
                told = f"{type(error).__name__}: {str(error)[-300:]}"
                print(f"FAILED {name}: {told}", flush=True)
                continue
            told = "; ".join(result["faults"]) or "ok"
            print(
                f"{done}/{len(todo)} {name}: {result['registers']} registers, "
                f"{result['spill']} spilled, {result['shared'] / 1024:.0f} KiB, {told}",
                flush=True,
            )
            if done % 10 == 0:
                save(path, results)
    save(path, results)
    return results


def page(results: list[dict], version: str) -> str:
    """What a reader should know of one version of Triton."""
    lines = [
        f"# Compiled ahead of time with Triton {version}",
        "",
        "Made by `make aot`; nothing here was measured on a GPU. For each target: how many",
        "kernels were compiled, the most registers of a thread and bytes it spills, and the most",
        "wavefronts of shared memory over those without bank conflicts. Faults are what no kernel",
        "may show (`bench/step_cost/gate.py`, `bench/aot.py`) where the target is held to them.",
        f"Kernels: {aot.fingerprint()}",
        "",
        "| target | kernels | registers | spilled | wavefronts / ideal | held to | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in aot.TARGETS:
        rows = [r for r in results if target == r["target"]]
        if rows:
            worst = max(r["wavefronts"] / max(1, r["ideal_wavefronts"]) for r in rows)
            lines.append(
                f"| {target} | {len(rows)} | {max(r['registers'] for r in rows)} "
                f"| {max(r['spill'] for r in rows)} | {worst:.2f} "
                f"| {MOST_WAVEFRONTS.get(target, 'reported')} "
                f"| {sum(bool(r['faults']) for r in rows)} |"
            )
    lines += [
        "",
        f"A step on {MADE_FOR}, as `python -m bench.step_cost` predicts it: microseconds for the",
        "whole batch, with all that is assumed of the hardware at its middle, low and high values.",
        "",
        "| layer | pass | schedule | tile | programs | launches | us | low | high |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for named in NAMED:
        for which in PASSES:
            for r in results:
                same = (r["cell"], r["dtype"], r["H"], r["which"], r["B"])
                if same == (named.cell, named.dtype, named.H, which, named.B):
                    p = r["plan"]
                    lines.append(
                        f"| {named.name} | {which} | {p['schedule']} "
                        f"| {p['block_b']} x {p['block_h']} "
                        f"| {r['programs']} | {r['launches']} | {r['predicted_us']:.2f} "
                        f"| {r['low_us']:.2f} | {r['high_us']:.2f} |"
                    )
    told: dict[str, int] = {}
    for r in results:
        for fault in r["faults"]:
            kind = f"{r['target']}: {fault.split(':')[0] if ':' in fault else fault}"
            told[kind] = told.get(kind, 0) + 1
    if told:
        lines += ["", "Faults, and how many kernels have them:", ""]
        most = sorted(told.items(), key=lambda item: -item[1])[:12]
        lines += [f"- {kind}: {count}" for kind, count in most]
    return "\n".join(lines) + "\n"


def stale() -> list[str]:
    """Pages that are missing, or not of today's kernels."""
    found, today = [], aot.fingerprint()
    for version in VERSIONS:
        path = PAGES / f"triton-{version}.md"
        if not path.exists():
            found.append(f"{path.name} is missing: run `make aot`")
        elif f"\nKernels: {today}\n" not in path.read_text():
            found.append(f"{path.name} is not of today's kernels ({today}): run `make aot`")
    return found


def main() -> int:
    aot.require_compiler()
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot_suite", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="compile nothing, check the pages")
    parser.add_argument("--target", nargs="+", choices=aot.TARGETS, default=list(aot.TARGETS))
    parser.add_argument("--cell", nargs="+", choices=REGISTRY, default=list(REGISTRY))
    parser.add_argument("--hidden", nargs="+", type=int)
    parser.add_argument("--dtype", nargs="+", choices=aot.DTYPES, default=list(aot.DTYPES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="keep results here, and write no page")
    options = parser.parse_args()
    if options.check:
        old = stale()
        print("\n".join(old) or "the pages are of today's kernels")
        return 1 if old else 0
    every = jobs()
    wanted = {
        f"{job.key()} B={B} {aot.fingerprint()} {aot.tool_fingerprint()}": (job, B)
        for job, B in every
        if job.target in options.target
        and job.cell in options.cell
        and job.dtype in options.dtype
        and (options.hidden is None or job.H in options.hidden)
    }
    complete = len(wanted) == len(every)
    path = options.output or aot.ROOT / "out" / "aot" / f"triton-{triton.__version__}.json"
    results = compile_all(wanted, path, options.workers)
    failed = len(wanted) - len(results)
    faulty = sum(bool(r["faults"]) for r in results.values())
    print(f"{len(results)} results in {path}, {failed} failed to compile, {faulty} with faults")
    if options.output is None and complete and not failed:
        file = PAGES / f"triton-{triton.__version__}.md"
        PAGES.mkdir(parents=True, exist_ok=True)
        file.write_text(page(list(results.values()), triton.__version__))
        print(f"wrote {file}")
    return 1 if failed or faulty else 0


if __name__ == "__main__":
    sys.exit(main())
