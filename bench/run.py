"""Measures, within a time budget, into one results file.

    python -m bench.run --budget 540                 what this machine's plan begins with
    python -m bench.run --quick                      a CPU's two minutes, as its one thread's time
    python -m bench.run --resume FILE --budget 540   goes on where FILE stopped
    python -m bench.run --only 'gru bf16' --tiers planes --backends torch_nn,auto

The file is rewritten (atomically) every few seconds and at the end, also on Ctrl-C and SIGTERM:
a run that is cut off leaves what it has. Points come in the order of `bench.shapes`.
"""

from __future__ import annotations

import argparse
import collections
import gc
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

from bench import limits as limits_module
from bench import noise, shapes
from bench import results as results_module
from bench.device import Device, pick_device
from bench.limits import Limits, call_floor
from bench.measure import BrokenDevice, Effort, measure
from bench.precompile import precompile
from bench.shapes import PASSES, Point

SAVE_EVERY = 5.0  # seconds


def run(
    points: list[Point],
    device: Device,
    *,
    path: Path,
    budget: float,
    effort: Effort = Effort(),  # noqa: B008
    limits: Limits | None = None,
    before: dict | None = None,
    now: Callable[[], float] = time.monotonic,
    show: Callable[[str], None] = print,
    progress: Callable[[Iterable], Iterable] = lambda points: points,
    precompiled: dict | None = None,
) -> dict:
    """Measures `points` in order until `budget` seconds have passed; returns what it wrote.

    Args:
        points: what to measure; passes that `before` has are skipped.
        path: the results file.
        limits: of the machine, for the floors.
        before: the results of an earlier run to go on with.
        now, show, progress: the clock of the budget, where lines go, a progress bar.
        precompiled: what `precompile` returned; without it each first call compiles.
    """
    start = last_saved = now()
    results = {
        "schema": results_module.SCHEMA,
        "environment": device.environment(),
        "conditions": {
            "effort": asdict(effort),
            "cache": device.cache,
            "clock": device.clock,
            "order": "backends alternate call by call, in random order",
            "stretches": noise.STRETCHES,
            "budget_s": budget,
            "precompiled": precompiled,
        },
        "limits": None if limits is None else limits.as_dict(),
        "left_out": {},
        "stopped": "not finished",
        "points": {"planned": len(points), "measured": 0},
        "rows": [],
    }
    done: set[tuple[str, str]] = set()
    if before is not None:
        _go_on(results, before)
        done = _measured(results["rows"])
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
            for which in point.passes:
                if (point.shape.key, which) in done:
                    continue
                floor = None if limits is None else call_floor(point.shape, which, limits)
                rows, left_out = measure(
                    point, which, device, effort, None if floor is None else floor.seconds, problems
                )
                results["rows"] += rows
                for name, why in left_out.items():
                    line = f"{name}: {why}"
                    results["left_out"][line] = results["left_out"].get(line, 0) + 1
                show(line_of(rows))
                if now() - start > budget:
                    break
            results["points"]["measured"] += 1
            took.append(now() - began)
            if now() - last_saved > SAVE_EVERY:
                results_module.save(results, path)
                last_saved = now()
        else:
            results["stopped"] = ""
    except BrokenDevice as failure:
        results["rows"] += failure.rows  # pyright: ignore[reportAttributeAccessIssue]
        results["stopped"] = f"the device failed: {failure}; --resume goes on after this point"
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    finally:
        results_module.save(results, path)
    return results


def _measured(rows: list[dict]) -> set[tuple[str, str]]:
    """Shape and pass of what has rows."""
    return {results_module.row_key(row)[:2] for row in rows}


def _not_done(points: list[Point], before: dict | None) -> list[Point]:
    """The points of which an earlier run has not all passes."""
    if before is None:
        return points
    done = _measured(before["rows"])
    return [p for p in points if any((p.shape.key, which) not in done for which in p.passes)]


def _go_on(results: dict, before: dict) -> None:
    """Takes over the rows of `before`.

    Raises:
        ValueError: it was measured elsewhere, or on other code.
    """
    for name in ("device", "commit", "torch", "triton"):
        ours, theirs = results["environment"].get(name), before["environment"].get(name)
        if ours != theirs:
            raise ValueError(f"cannot go on with a run of another {name}: {theirs}, here {ours}")
    results["environment"]["date"] = before["environment"]["date"]
    results["rows"] = list(before["rows"])
    results["left_out"] = dict(before["left_out"])


COLUMNS = "{:46} {:9} {:>11} {:>9}  {}"
HEAD = COLUMNS.format("", "pass", "torch.nn ms", "ms", "speed-up over torch.nn, or overhead")


def line_of(rows: list[dict]) -> str:
    """One point and pass, for people who watch: a line for each backend."""
    lines = []
    for row in rows:
        name = row["backend"]
        if name == "torch_nn" and not row["error"] and len(rows) > 1:
            continue
        what = (row["name"] or shapes.of_row(row).key) if not lines else ""
        what += "" if name == "auto" else f" ({name})"
        if row["error"]:
            lines.append(COLUMNS.format(what, row["pass"], "-", "-", f"FAILED: {row['error']}"))
            continue
        theirs, ms = ("-" if t is None else f"{t:.4g}" for t in (row["ms_torch_nn"], row["ms"]))
        lines.append(COLUMNS.format(what, row["pass"], theirs, ms, noise.figure(row)))
    return "\n".join(lines)


def select(
    points: list[Point],
    *,
    only: str = "",
    tiers: str = "",
    backends: str = "",
    passes: str = "",
) -> list[Point]:
    """The points of a plan that a command line asks for.

    Raises:
        ValueError: a tier or pass that does not exist.
    """
    wanted_tiers, wanted_passes = _listed(tiers), _listed(passes)
    wanted_backends = _listed(backends)
    known = {p.tier for p in points}
    for name, values, allowed in (
        ("tiers", wanted_tiers, known),
        ("passes", wanted_passes, PASSES),
    ):
        unknown = set(values) - set(allowed)
        if unknown:
            raise ValueError(f"--{name}: {sorted(unknown)} not among {sorted(allowed)}")
    chosen = []
    for point in points:
        if wanted_tiers and point.tier not in wanted_tiers:
            continue
        if only and not re.search(only, f"{point.shape.key} {point.shape.name}"):
            continue
        kept = tuple(p for p in point.passes if not wanted_passes or p in wanted_passes)
        if kept:
            names = tuple(wanted_backends) or point.backends
            chosen.append(replace(point, passes=kept, backends=names))
    return chosen


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
    parser.add_argument("--only", default="", help="regular expression on a shape's key or name")
    parser.add_argument("--tiers", default="", help="headline,sample,workloads,loops,planes,...")
    parser.add_argument("--backends", default="", help="comma-separated, instead of the plan's")
    parser.add_argument("--passes", default="", help="forward,training,inference")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads, by wall time (default: torch's)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time one thread's CPU time (on a busy machine)"
    )
    parser.add_argument("--compile", default="inductor", help='backend of torch.compile, or "no"')
    parser.add_argument(
        "--no-precompile", action="store_true", help="compile each kernel at its first call"
    )
    parser.add_argument("--no-limits", action="store_true", help="no floors")
    parser.add_argument("--limits", type=Path, help="take the limits from this results file")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available() if not options.device else options.device == "cuda"
    options.cpu_time |= options.quick and not on_gpu and not options.threads
    if options.threads or options.cpu_time:
        torch.set_num_threads(options.threads or 1)
    # What was compiled before must not serve: first calls are measured.
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="fusedrnn-bench-")
    compiles = "" if options.compile == "no" else options.compile
    try:
        device = pick_device(
            options.device, compiles=compiles, cache=options.cache, cpu_time=options.cpu_time
        )
    except ValueError as error:
        parser.error(str(error))
    cuda = device.torch.type == "cuda"
    plans = {"cpu": shapes.cpu_plan, "gpu": shapes.gpu_plan, "tiny": shapes.tiny_plan}
    points = plans[options.plan or ("gpu" if cuda else "cpu")]()
    try:
        points = select(
            points, only=options.only, tiers=options.tiers, backends=options.backends,
            passes=options.passes,
        )  # fmt: skip
        if not points:
            raise ValueError("no point of the plan is asked for")
        before = results_module.load(options.resume) if options.resume else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    budget = options.budget or (540.0 if cuda else 120.0)
    started = time.monotonic()
    if options.no_limits:
        limits = None
    elif options.limits:
        limits = Limits.from_dict(results_module.load(options.limits)["limits"])
    elif before is not None and before.get("limits"):
        limits = Limits.from_dict(before["limits"])
    elif cuda:
        limits = limits_module.measure_apart(options.device)
    else:
        limits = limits_module.measure_limits(device, show=print)
    precompiled = None
    if cuda and not options.no_precompile:
        from fusedrnn.kernels.launch import device_of

        precompiled = precompile(
            _not_done(points, before), device_of(device.torch), seconds=budget / 4
        )
        print(f"compiled ahead: {precompiled}", flush=True)
    # What lives until the end is not looked through by every collection of garbage.
    gc.collect()
    gc.freeze()
    if cuda:
        effort = Effort(seconds=0.12 if options.quick else 0.2)
    else:  # a CPU's clock drifts more, so more calls
        effort = Effort(seconds=0.6 if options.quick else 2.0, most=5000)
    path = options.out or options.resume or results_module.default_path(device.environment())

    signal.signal(signal.SIGTERM, _interrupt)
    bar = _progress(len(points))
    bar[0](HEAD)
    results = run(
        points, device, path=path, budget=budget - (time.monotonic() - started), effort=effort,
        limits=limits, before=before, show=bar[0], progress=bar[1], precompiled=precompiled,
    )  # fmt: skip
    failed = [row for row in results["rows"] if row["error"]]
    measured = results["points"]["measured"]
    print(f"\n{measured} of {len(points)} points, {len(results['rows'])} rows, in {path}")
    if results["stopped"]:
        print(f"stopped: {results['stopped']}")
    for row in failed[:20]:
        print(f"no time for {' / '.join(results_module.row_key(row))}: {row['error']}")
    return 3 if results["stopped"].startswith("the device failed") else 0


def _interrupt(*_):
    raise KeyboardInterrupt


def _progress(total: int):
    """Where lines go, and the loop's wrapper: tqdm's on a terminal, plain lines elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        return lambda line: print(line, flush=True), lambda points: points
    return tqdm.write, lambda points: tqdm(points, total=total, unit="point")


if __name__ == "__main__":
    sys.exit(main())
