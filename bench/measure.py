"""One point: gate everyone against float64, then time whoever passed, taking turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import backends
from bench.backends import Runner
from bench.device import Device, is_sticky
from bench.problem import Problem, set_precision
from bench.shapes import Point

# The norm of the error over the norm of the answer, per tensor. torch.nn, which sets the scale
# for the others, must stay within ABSOLUTE; whoever else within twice torch.nn's own error, or
# within FLOOR (a few roundings of the stored states) where torch.nn happens to be closer. tf32
# keeps ten bits; a product of two operands that a kernel cut off instead of rounding is off by up
# to two units of 2^-10, and torch.nn's kernels may round.
ABSOLUTE = {"fp32-exact": 1e-4, "fp32-tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
FLOOR = {"fp32-exact": 1e-5, "fp32-tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2}


# Calls that take longer are not called a dozen times more to see how long the host is busy.
SLOW_MS = 20.0


@dataclass(frozen=True)
class Effort:
    """How long to measure a backend in one pass."""

    seconds: float = 0.2  # of calls, per backend and pass
    fewest: int = 3
    most: int = 200
    rounds: int = 5
    sets: int = 3  # input sets in rotation
    memory: bool = True


def deviation(runner: Runner, results, answer: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error over the tensors, and which one has it; inf where NaN."""
    worst, where = -1.0, ""
    for name, result in zip(runner.names, results, strict=False):
        exact = answer[name]
        if result.shape != exact.shape:
            return math.inf, f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}"
        norm = exact.norm().item()
        error = (result.double() - exact).norm().item() / (norm or 1.0)
        if math.isnan(error):
            error = math.inf
        if error > worst:
            worst, where = error, name
    return worst, where


def limit(dtype: str, torch_nn: float | None) -> float:
    """The error that a backend may have, given torch.nn's (None: for torch.nn itself)."""
    if torch_nn is None:
        return ABSOLUTE[dtype]
    return max(2 * torch_nn, FLOOR[dtype])


class BrokenDevice(RuntimeError):
    """Nothing more can be measured in this process (an illegal access, say)."""


def measure(
    point: Point,
    which: str,
    device: Device,
    effort: Effort,
    floor_seconds: float | None = None,
    problems: dict[str, Problem] | None = None,
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
    left_out, rows, runners = {}, [], {}
    with_nn = ("torch_nn", *(n for n in point.backends if n != "torch_nn"))
    set_precision(shape.dtype)
    problems = {} if problems is None else problems
    torch_nn_error = None
    for name in with_nn:
        why = backends.refuses(name, shape, device)
        if why is None and name == "triton" and "auto" in runners:
            auto = runners["auto"].ran_on
            why = "auto takes it already" if auto == "triton" else None
        if name == "reference_compile" and which == "forward":
            why = "its forward pass is timed in training and in inference; compiling takes long"
        if why is not None:
            left_out[name] = why
            continue
        row = {**shape.fields(), "tier": point.tier, "pass": which, "backend": name}
        row |= dict.fromkeys(FIELDS)
        rows.append(row)
        try:
            if shape.key not in problems:
                problems[shape.key] = Problem(
                    shape, device.torch, effort.sets, gradients="training" in point.passes
                )
            problem = problems[shape.key]
            start = time.perf_counter()
            runner = backends.build(name, problem, which, device)
            results = runner.run(0)
            device.synchronize()
            row["first_call_s"] = round(time.perf_counter() - start, 4)
            row["ran_on"] = runner.ran_on or name
            if runner.ran_on == "triton":
                _raise_time_outs(device)  # else the next launch would raise this one's
            error, where = deviation(runner, results, problem.answer())
            del results
        except Exception as failure:
            row["error"] = describe(failure)
            _stop_if_broken(failure, rows)
            continue
        allowed = limit(shape.dtype, torch_nn_error)
        row["deviation"], row["deviation_limit"] = round_to(error, 3), round_to(allowed, 3)
        if name == "torch_nn":
            torch_nn_error = min(error, ABSOLUTE[shape.dtype])
        if error > allowed:
            row["error"] = f"wrong: {where} is off by {error:.2e}, allowed {allowed:.2e}"
            continue
        runners[name] = runner
    by_name = {row["backend"]: row for row in rows}

    def failed(name: str, failure: Exception) -> None:
        by_name[name] |= {"error": describe(failure), "ms": None}
        _stop_if_broken(failure, rows)

    samples = take_turns(runners, device, effort, failed)
    for name, times in samples.items():
        row, runner = by_name[name], runners[name]
        row |= statistics_of([time for turn in times.values() for time in turn])
        row["ratio_p25"], row["ratio_p75"] = quartiles(samples.get("torch_nn", {}), times)
        row["floor_ms"] = None if floor_seconds is None else round_to(floor_seconds * 1e3, 4)
        row["cache"] = device.cache
        sets = [lambda r=runner, i=i: r.run(i) for i in range(effort.sets)]
        try:
            host = device.host_seconds(sets * (4 if row["ms"] < SLOW_MS else 1))
            row["host_us"] = None if host is None else round(host * 1e6, 1)
            if effort.memory and runner.memory_counts:
                row["peak_bytes"] = device.peak_bytes(sets[0])
        except Exception as failure:
            failed(name, failure)
    add_ratios(rows)
    return rows, left_out


# Of every row, besides the shape, the pass and the backend.
FIELDS = (
    "ran_on", "ms", "ms_p10", "ms_p90", "calls", "ms_torch_nn", "ratio", "ratio_p25", "ratio_p75",
    "floor_ms", "floor_ratio", "host_us", "first_call_s", "peak_bytes", "cache", "deviation",
    "deviation_limit", "error",
)  # fmt: skip


def take_turns(
    runners: dict[str, Runner],
    device: Device,
    effort: Effort,
    failed: Callable[[str, Exception], None],
) -> dict[str, dict[int, list[float]]]:
    """Seconds of calls, by backend and turn.

    The backends alternate, so that a drift of the machine meets them all. One that raises is told
    to `failed` and drops out; the others go on.
    """
    share = {}
    for name, runner in runners.items():  # warm-up, and an estimate
        calls = [lambda r=runner, i=i: r.run(i) for i in range(effort.sets)]
        try:
            estimate = statistics.median(device.time_calls(calls))
        except Exception as failure:
            failed(name, failure)
            continue
        wanted = effort.seconds / max(estimate, 1e-7)
        count = min(max(wanted, effort.fewest), effort.most)
        share[name] = math.ceil(count / effort.rounds)
    turns: dict[str, dict[int, list[float]]] = {name: {} for name in share}
    done, spent = dict.fromkeys(share, 0), dict.fromkeys(share, 0.0)
    names = list(share)
    for turn in range(effort.rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name not in turns:
                continue
            # A slow backend is not called again once it has its fewest and its time is spent.
            if done[name] >= effort.fewest and spent[name] > effort.seconds:
                continue
            run = runners[name].run
            sets = [(done[name] + k) % effort.sets for k in range(share[name])]
            try:
                times = device.time_calls([lambda run=run, i=i: run(i) for i in sets])
            except Exception as failure:
                failed(name, failure)
                del turns[name]
                continue
            turns[name][turn] = times
            done[name] += len(times)
            spent[name] += sum(times)
    return turns


def _raise_time_outs(device: Device) -> None:
    from fusedrnn import kernels

    kernels.check(device.torch)


def quartiles(
    torch_nn: dict[int, list[float]], own: dict[int, list[float]]
) -> tuple[float | None, float | None]:
    """Of torch.nn's time over ours, turn by turn: what the ratio owes to noise.

    None where there are fewer than four turns that both took.
    """
    both = torch_nn.keys() & own.keys()
    ratios = [statistics.median(torch_nn[t]) / statistics.median(own[t]) for t in both]
    if len(ratios) < 4:
        return None, None
    low, _, high = statistics.quantiles(ratios, n=4)
    return round_to(low, 4), round_to(high, 4)


def statistics_of(times: list[float]) -> dict:
    """Median and quantiles, in milliseconds."""
    ordered = sorted(times)
    at = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]  # noqa: E731
    return {
        "ms": round_to(statistics.median(ordered) * 1e3, 5),
        "ms_p10": round_to(at(0.1) * 1e3, 5),
        "ms_p90": round_to(at(0.9) * 1e3, 5),
        "calls": len(ordered),
    }


def add_ratios(rows: list[dict]) -> None:
    """`ratio` = ms_torch_nn / ms of rows measured together, `floor_ratio` = ms / floor_ms."""
    torch_nn = next((r["ms"] for r in rows if r["backend"] == "torch_nn"), None)
    for row in rows:
        if row["ms"] is None:
            continue
        row["ms_torch_nn"] = torch_nn
        row["ratio"] = None if torch_nn is None else round_to(torch_nn / row["ms"], 4)
        if row["floor_ms"]:
            row["floor_ratio"] = round_to(row["ms"] / row["floor_ms"], 4)


def describe(failure: Exception) -> str:
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''}"


def _stop_if_broken(failure: Exception, rows: list[dict]) -> None:
    if is_sticky(failure):
        for row in rows:
            if row["ms"] is None:
                row["error"] = row["error"] or describe(failure)
        add_ratios(rows)
        broken = BrokenDevice(describe(failure))
        broken.rows = rows  # pyright: ignore[reportAttributeAccessIssue]
        raise broken from failure


def round_to(value: float, digits: int) -> float | None:
    """`value` with that many significant digits; None where it is no finite number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
