"""Measures, within a time budget, into one results file.

    python -m bench.run --budget 540                 what this machine's plan begins with
    python -m bench.run --quick                      a CPU's two minutes, as its one thread's time
    python -m bench.run --resume FILE --budget 540   goes on where FILE stopped
    python -m bench.run --only 'planes gru bf16' --backends torch_nn,auto

The file is rewritten (atomically) every few seconds and at the end, also on Ctrl-C and SIGTERM:
a run that is cut off leaves what it has. Points come in the order of `bench.shapes`.

bench/README.md says what is in a results file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import backends, shapes, timing
from bench.backends import Problem, Runner, set_precision
from bench.shapes import Point, of_row
from bench.timing import (
    CPU_SETTINGS,
    ROOT,
    Device,
    Effort,
    is_sticky,
    pick_device,
    round_to,
    statistics_of,
)

SCHEMA = 2
FOLDER = ROOT / "bench" / "results"
SAVE_EVERY = 5.0  # seconds

# The norm of the error over the norm of the answer, per tensor. torch.nn, which sets the scale
# for the others, must stay within ABSOLUTE; whoever else within twice torch.nn's own error, or
# within FLOOR (a few roundings of the stored states) where torch.nn happens to be closer. tf32
# keeps ten bits; a product of two operands that a kernel cut off instead of rounding is off by up
# to two units of 2^-10, and torch.nn's kernels may round.
ABSOLUTE = {"fp32-exact": 1e-4, "fp32-tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
FLOOR = {"fp32-exact": 1e-5, "fp32-tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2}
# Calls that take longer are not called a dozen times more to see how long the host is busy.
SLOW_MS = 20.0

# Of every row, besides the shape, the pass and the backend.
TIMES = (
    "ms", "ms_p50", "ms_p90", "calls", "ms_torch_nn", "ratio", "ratio_low", "ratio_high",
    "overhead_us", "overhead_us_low", "overhead_us_high", "host_us",
)  # fmt: skip
FIELDS = ("ran_on", *TIMES, "first_call_s", "peak_bytes", "deviation", "deviation_limit", "error")


# Results files.


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(environment: dict) -> Path:
    date = re.sub(r"[^0-9]", "", environment["date"][:16])
    return FOLDER / slug(environment["device"]) / f"{date}-{environment['commit']}.json"


def begin(device: Device, before: dict | None = None) -> dict:
    """A file of this machine without rows yet, or `before`, to be extended.

    Raises:
        ValueError: `before` was measured elsewhere, or on other code.
    """
    environment = device.environment()
    if before is None:
        return {
            "schema": SCHEMA, "environment": environment, "conditions": {"clock": device.clock},
            "limits": None, "left_out": {}, "stopped": "",
            "points": {"planned": 0, "measured": 0}, "rows": [],
        }  # fmt: skip
    for name in ("device", "commit", "torch", "triton", *CPU_SETTINGS):
        ours, theirs = environment.get(name), before["environment"].get(name)
        if ours != theirs:
            raise ValueError(f"the file is of another {name}: {theirs}, here {ours}")
    return before


def row_key(row: dict) -> tuple[str, str, str]:
    """What a row measured: shape, pass, backend."""
    return of_row(row).key, row["pass"], row["backend"]


def save(results: dict, path: Path) -> None:
    """JSON with one line per row. Writes beside the file and renames: a reader, or a kill, never
    meets half a file."""
    tables = [name for name in ("cpu", "rows") if name in results]
    others = {name: value for name, value in results.items() if name not in tables}
    text = json.dumps(others, indent=1, allow_nan=False)[:-2]
    for name in tables:
        rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in results[name])
        text += f',\n "{name}": [\n{rows}\n ]'
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text + "\n}\n")
    os.replace(beside, path)


def load(path: str | Path) -> dict:
    """Reads a results file.

    Raises:
        ValueError: it is none, or of another schema.
    """
    try:
        results = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file: {error}") from error
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {results.get('schema')!r}")
    for n, row in enumerate(results["rows"]):
        missing = {"cell", "pass", "backend", *FIELDS} - set(row)
        if missing or (row["ms"] is None) != bool(row["error"]):
            why = (
                f"lacks {sorted(missing)}" if missing else "needs a time or an error, and not both"
            )
            raise ValueError(f"{path}: row {n} {why}")
    return results


def load_folder(folder: Path = FOLDER) -> dict[str, list[dict]]:
    """All results files, by device, oldest first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        results = load(path)
        results["path"] = f"{path.parent.name}/{path.name}"
        found.setdefault(results["environment"]["device"], []).append(results)
    for runs in found.values():
        runs.sort(key=lambda r: (r["environment"]["date"], r["path"]))
    return found


def newest_rows(runs: list[dict]) -> list[dict]:
    """One row for every shape, pass and backend: the newest, so that reruns replace.

    A ratio compares rows of one run, so all backends of a shape and pass come from the same one.
    """
    merged: dict[tuple[str, str], dict[str, dict]] = {}
    for run in runs:
        fresh: dict[tuple[str, str], dict[str, dict]] = {}
        for row in run["rows"]:
            key, pass_, backend = row_key(row)
            fresh.setdefault((key, pass_), {})[backend] = row
        merged |= fresh
    return [row for rows in merged.values() for row in rows.values()]


# One point: gate everyone against float64, then time whoever passed, taking turns.


def deviation(runner: Runner, results, answer: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error over the tensors, and which one has it; inf where NaN."""
    worst, where = -1.0, ""
    for name, result in zip(runner.names, results, strict=False):
        exact = answer[name]
        if result.shape != exact.shape:
            return math.inf, f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}"
        error = (result.double() - exact).norm().item() / (exact.norm().item() or 1.0)
        error = math.inf if math.isnan(error) else error
        if error > worst:
            worst, where = error, name
    return worst, where


def limit(dtype: str, torch_nn: float | None) -> float:
    """The error that a backend may have, given torch.nn's (None: for torch.nn itself)."""
    return ABSOLUTE[dtype] if torch_nn is None else max(2 * torch_nn, FLOOR[dtype])


class BrokenDevice(RuntimeError):
    """Nothing more can be measured in this process (an illegal access, say): why, and the rows of
    the point at which it broke."""


def measure(
    point: Point, pass_: str, device: Device, effort: Effort, problems: dict[str, Problem]
) -> tuple[list[dict], dict[str, str]]:
    """The rows of a point in one pass, and why backends were left out.

    A row whose result is wrong, or that failed, has an `error` and no time.

    Args:
        problems: keeps the point's problem from pass to pass: inputs are drawn, and the answer in
            float64 computed, once.
    Raises:
        BrokenDevice: the device cannot go on.
    """
    shape = point.shape
    left_out, rows, runners = {}, {}, {}

    def failed(name: str, failure: Exception) -> None:
        why = describe(failure)
        rows[name] |= {**dict.fromkeys(TIMES), "error": why}
        if is_sticky(failure):
            for row in rows.values():
                row["error"] = row["error"] or (why if row["ms"] is None else None)
            raise BrokenDevice(why, list(rows.values())) from failure

    set_precision(shape.dtype)
    torch_nn_error = None
    for name in ("torch_nn", *(n for n in point.backends if n != "torch_nn")):
        why = backends.refuses(name, shape, device)
        if name == "triton" and "auto" in runners and runners["auto"].ran_on == "triton":
            why = why or "auto takes it already"
        if name == "reference_compile" and pass_ == "forward":
            why = "its forward pass is timed in training and in inference; compiling takes long"
        if why is not None:
            left_out[name] = why
            continue
        rows[name] = row = {
            **shape.fields(), "tier": point.tier, "pass": pass_, "backend": name,
            **dict.fromkeys(FIELDS),
        }  # fmt: skip
        try:
            if shape.key not in problems:
                problems[shape.key] = Problem(
                    shape, device.torch, effort.sets, gradients="training" in point.passes
                )
            problem = problems[shape.key]
            start = time.perf_counter()
            runner = backends.build(name, problem, pass_, device)
            results = runner.run(0)
            device.synchronize()
            row["first_call_s"] = round(time.perf_counter() - start, 4)
            row["ran_on"] = runner.ran_on or name
            if runner.ran_on == "triton":  # else the next launch would raise this one's time-out
                from fusedrnn import kernels

                kernels.check(device.torch)
            error, where = deviation(runner, results, problem.answer())
            del results
        except Exception as failure:
            failed(name, failure)
            continue
        allowed = limit(shape.dtype, torch_nn_error)
        row["deviation"], row["deviation_limit"] = round_to(error, 3), round_to(allowed, 3)
        if name == "torch_nn":
            torch_nn_error = min(error, ABSOLUTE[shape.dtype])
        if error > allowed:
            row["error"] = f"wrong: {where} is off by {error:.2e}, allowed {allowed:.2e}"
            continue
        runners[name] = runner
    runs = {name: runner.run for name, runner in runners.items()}
    samples, calls = timing.take_turns(runs, device, effort, failed)
    for name, times in samples.items():
        rows[name] |= {**statistics_of(times), "calls": calls[name]}
        if "torch_nn" in samples:
            rows[name]["ms_torch_nn"] = statistics_of(samples["torch_nn"])["ms"]
            rows[name] |= timing.against(samples["torch_nn"], times)
    for name in samples:
        row, runner = rows[name], runners[name]
        sets = [lambda r=runner, i=i: r.run(i) for i in range(effort.sets)]
        try:
            host = device.host_seconds(sets * (4 if row["ms"] < SLOW_MS else 1))
            row["host_us"] = None if host is None else round(host * 1e6, 1)
            if runner.memory_counts:
                row["peak_bytes"] = device.peak_bytes(sets[0])
        except Exception as failure:
            failed(name, failure)
    return list(rows.values()), left_out


def describe(failure: Exception) -> str:
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"


# The kernels that a plan will launch, compiled in many processes before anything is timed: one
# takes one to two seconds, and a plan needs hundreds. T is no part of a kernel, nor the width of
# the input or the number of layers, so a call of two steps of a single layer leaves in Triton's
# cache what longer ones need.


def first_calls(points: list[Point], most: int = 400) -> list[Point]:
    """The different layers of `points`, in their order, `most` of them."""
    found: dict[tuple, Point] = {}
    for point in points:
        names = ("triton", "triton_states")
        wanted = tuple(n for n in names if {n, n.replace("triton", "auto")} & {*point.backends})
        shape = replace(point.shape, T=2, I=16, layers=1, name="")
        if wanted:
            key = (replace(shape, lengths="text" if shape.lengths else ""), wanted, point.passes)
            found.setdefault(key, replace(point, shape=shape, backends=wanted))
    return list(found.values())[:most]


def first_call(point: Point, device_type: str = "cuda") -> str:
    """Calls a layer in all its passes; returns what went wrong."""
    try:
        device = pick_device(device_type)
        set_precision(point.shape.dtype)
        problem = Problem(point.shape, device.torch, sets=1, gradients=False)
        for name, pass_ in itertools.product(point.backends, point.passes):
            if not backends.refuses(name, point.shape, device):
                backends.build(name, problem, pass_, device).run(0)
        device.synchronize()
    except Exception as failure:  # the run will meet it again, and record it in its row
        return f"{point.shape.key}: {describe(failure)}"
    return ""


def ahead(function: Callable, items: list, seconds: float) -> dict:
    """Applies what fills Triton's cache, and returns what went wrong or "", in many processes for
    up to `seconds`. Returns items done of those planned, and seconds of all."""
    start, done = time.monotonic(), 0
    # Each has a CUDA context of half a gigabyte or so; one core is left for the rest.
    workers = min(max((os.cpu_count() or 2) - 1, 1), 16)
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        results = pool.imap_unordered(function, items)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in items:
                failure = results.next(max(start + seconds - time.monotonic(), 0.01))
                done += not failure
                if failure:
                    print(f"compiling ahead: {failure}", flush=True)
    return {"done": done, "planned": len(items), "seconds": round(time.monotonic() - start, 1)}


# A run.


def run(
    points: list[Point],
    device: Device,
    *,
    path: Path,
    budget: float,
    effort: Effort = Effort(),  # noqa: B008
    before: dict | None = None,
    precompiled: dict | None = None,
    now: Callable[[], float] = time.monotonic,
    show: Callable[[str], None] = print,
    progress: Callable[[Iterable], Iterable] = lambda points: points,
) -> dict:
    """Measures `points` in order until `budget` seconds have passed; returns what it wrote.

    Args:
        before: an earlier run to go on with; passes that it has are skipped.
        precompiled: what `ahead` returned; without it each first call compiles.
        now, show, progress: the clock of the budget, where lines go, a progress bar.
    """
    start = last_saved = now()
    results = begin(device, before)
    results |= {
        "conditions": {
            "effort": asdict(effort), "clock": device.clock, "budget_s": budget,
            "precompiled": precompiled,
        },
        "stopped": "not finished",
        "points": {"planned": len(points), "measured": 0},
    }  # fmt: skip
    done = {row_key(row)[:2] for row in results["rows"]}
    took = collections.deque(maxlen=10)  # seconds of the last points
    device.warm_up()
    try:
        for point in progress(points):
            began = now()
            # Not begun where the longest of late would not fit: a plan's points differ widely.
            if began - start + max(took, default=0.0) > budget:
                results["stopped"] = "the budget was spent"
                break
            problems = {}
            for pass_ in point.passes:
                if (point.shape.key, pass_) in done or now() - start > budget:
                    continue
                rows, left_out = measure(point, pass_, device, effort, problems)
                results["rows"] += rows
                for name, why in left_out.items():
                    line = f"{name}: {why}"
                    results["left_out"][line] = results["left_out"].get(line, 0) + 1
                show(line_of(rows))
            results["points"]["measured"] += 1
            took.append(now() - began)
            if now() - last_saved > SAVE_EVERY:
                save(results, path)
                last_saved = now()
        else:
            results["stopped"] = ""
    except BrokenDevice as failure:
        why, rows = failure.args
        results["rows"] += rows
        results["stopped"] = f"the device failed: {why}; --resume goes on after this point"
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    finally:
        save(results, path)
    return results


COLUMNS = "{:46} {:9} {:>11} {:>9}  {}"
HEAD = COLUMNS.format("", "pass", "torch.nn ms", "ms", "speed-up over torch.nn, or overhead")


def line_of(rows: list[dict]) -> str:
    """One point and pass, for people who watch: a line for each backend."""
    lines = []
    for row in rows:
        name = row["backend"]
        if name == "torch_nn" and not row["error"] and len(rows) > 1:
            continue
        what = (row["name"] or of_row(row).key) if not lines else ""
        what += "" if name == "auto" else f" ({name})"
        theirs, ms = ("-" if t is None else f"{t:.4g}" for t in (row["ms_torch_nn"], row["ms"]))
        said = f"FAILED: {row['error']}" if row["error"] else timing.figure(row)
        lines.append(COLUMNS.format(what, row["pass"], theirs, ms, said))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=0, help="seconds (default: 540, CPU 120)")
    parser.add_argument("--out", type=Path, help="results file; default bench/results/<device>/")
    parser.add_argument("--resume", type=Path, help="go on with this file's run")
    parser.add_argument("--device", default="", help="cpu or cuda")
    parser.add_argument("--plan", choices=("cpu", "gpu", "tiny"), help="default: the device's")
    parser.add_argument(
        "--quick", action="store_true",
        help="less time for each point; on a CPU, one thread's CPU time unless --threads is given",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="regular expression on 'TIER KEY NAME'")
    parser.add_argument("--backends", default="", help="comma-separated, instead of the plan's")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads, by wall time (default: torch's)"
    )
    options = parser.parse_args(arguments)

    # What was compiled before must not serve: first calls are measured.
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="fusedrnn-bench-")
    cuda = torch.cuda.is_available() if not options.device else options.device == "cuda"
    cpu_time = options.quick and not cuda and not options.threads
    if options.threads or cpu_time or options.plan == "tiny":
        torch.set_num_threads(options.threads or 1)
    plan = options.plan or ("gpu" if cuda else "cpu")
    points = {"cpu": shapes.cpu_plan, "gpu": shapes.gpu_plan, "tiny": shapes.tiny_plan}[plan]()
    only, names = re.compile(options.only), tuple(filter(None, options.backends.split(",")))
    points = [
        replace(p, backends=names or p.backends) for p in points
        if only.search(f"{p.tier} {p.shape.key} {p.shape.name}")
    ]  # fmt: skip
    try:
        compiles = "eager" if plan == "tiny" else "inductor"
        device = pick_device(options.device, compiles=compiles, cpu_time=cpu_time)
        before = load(options.resume) if options.resume else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    budget = options.budget or (540.0 if cuda else 120.0)
    started, precompiled = time.monotonic(), None
    if cuda:
        done = {row_key(row)[:2] for row in before["rows"]} if before else set()
        left = [p for p in points if any((p.shape.key, pass_) not in done for pass_ in p.passes)]
        precompiled = ahead(first_call, first_calls(left), budget / 4)
        print(f"compiled ahead: {precompiled}", flush=True)
    # What lives until the end is not looked through by every collection of garbage.
    gc.collect()
    gc.freeze()
    if plan == "tiny":
        effort = Effort(seconds=0.0, sets=1)
    elif cuda:
        effort = Effort(seconds=0.12 if options.quick else 0.2)
    else:  # a CPU's clock drifts more, so more calls
        effort = Effort(seconds=0.6 if options.quick else 2.0, most=5000)
    path = options.out or options.resume or default_path(device.environment())

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    print(HEAD, flush=True)
    results = run(
        points, device, path=path, budget=budget - (time.monotonic() - started), effort=effort,
        before=before, show=lambda line: print(line, flush=True), precompiled=precompiled,
    )  # fmt: skip
    measured, stopped = results["points"]["measured"], results["stopped"] or "at the end"
    print(f"\n{measured} of {len(points)} points, {len(results['rows'])} rows, in {path}")
    print(f"stopped: {stopped}")
    return 3 if results["stopped"].startswith("the device failed") else 0


if __name__ == "__main__":
    sys.exit(main())
