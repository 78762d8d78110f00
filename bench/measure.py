"""One point: gate everyone against float64, then time whoever passed, taking turns."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import backends
from bench.backends import Runner
from bench.device import Device, is_sticky
from bench.noise import STRETCHES, Samples, against, round_to, statistics_of
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
# Seconds between two readings of the clock, at least: shorter calls are timed a few at a time. A
# hundred times what reading the slowest clock costs (a thread's CPU time, a microsecond) and what
# CUDA events resolve (half a microsecond).
LEAST = 1e-4


@dataclass(frozen=True)
class Effort:
    """How long to measure a backend in one pass."""

    seconds: float = 0.2  # of calls, per backend and pass
    most: int = 200  # timings; at least one in each stretch
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
        by_name[name] |= {**dict.fromkeys(TIMES), "error": describe(failure)}
        _stop_if_broken(failure, rows)

    samples, calls = take_turns(runners, device, effort, failed)
    torch_nn = samples.get("torch_nn")
    for name, times in samples.items():
        row = by_name[name]
        row |= {**statistics_of(times), "calls": calls[name], "cache": device.cache}
        if torch_nn is not None:
            row["ms_torch_nn"] = statistics_of(torch_nn)["ms"]
            row |= against(torch_nn, times)
        if floor_seconds is not None:
            row["floor_ms"] = round_to(floor_seconds * 1e3, 4)
            row["floor_ratio"] = round_to(row["ms"] / row["floor_ms"], 4)
    for name in samples:
        row, runner = by_name[name], runners[name]
        sets = [lambda r=runner, i=i: r.run(i) for i in range(effort.sets)]
        try:
            host = device.host_seconds(sets * (4 if row["ms"] < SLOW_MS else 1))
            row["host_us"] = None if host is None else round(host * 1e6, 1)
            if effort.memory and runner.memory_counts:
                row["peak_bytes"] = device.peak_bytes(sets[0])
        except Exception as failure:
            failed(name, failure)
    return rows, left_out


# Of every row, besides the shape, the pass and the backend.
TIMES = (
    "ms", "ms_p50", "ms_p90", "calls", "ms_torch_nn", "ratio", "ratio_low", "ratio_high",
    "overhead_us", "overhead_us_low", "overhead_us_high", "floor_ms", "floor_ratio", "host_us",
)  # fmt: skip
FIELDS = (
    "ran_on", *TIMES, "first_call_s", "peak_bytes", "cache", "deviation", "deviation_limit",
    "error",
)  # fmt: skip


def take_turns(
    runners: dict[str, Runner],
    device: Device,
    effort: Effort,
    failed: Callable[[str, Exception], None],
) -> tuple[dict[str, Samples], dict[str, int]]:
    """Seconds of a call, by backend, stretch and turn; and how many calls each backend had.

    In a turn every backend computes the same set of inputs, in an order drawn anew: once, or a
    few times where the fastest takes less than LEAST. A slow backend takes only the first turns
    of a stretch. One that raises is told to `failed` and drops out; the others go on.
    """
    estimates = {}
    for name, runner in runners.items():  # warm-up, too
        calls = [lambda r=runner, i=i: r.run(i) for i in range(effort.sets)]
        try:
            estimates[name] = max(min(device.time_calls(calls)), 1e-6)
        except Exception as failure:
            failed(name, failure)
    together = math.ceil(LEAST / min(estimates.values(), default=1.0))
    turns = {
        name: max(1, round(min(effort.seconds / (together * seconds), effort.most) / STRETCHES))
        for name, seconds in estimates.items()
    }
    most = max(turns.values(), default=0)
    samples: dict[str, Samples] = {name: [] for name in turns}
    order, running = random.Random(0), ""

    def timing(name: str, number: int) -> Callable[[], None]:
        def call() -> None:
            nonlocal running
            running = name
            for _ in range(together):
                runners[name].run(number % effort.sets)

        return call

    for stretch in range(STRETCHES):
        done = False
        while turns and not done:
            names = []
            for turn in range(most):
                taking = [name for name in turns if turn < turns[name]]
                order.shuffle(taking)
                names += [(name, stretch * most + turn) for name in taking]
            running = names[0][0]
            try:  # in one go: a GPU's queue is not emptied in between
                times = device.time_calls([timing(*name) for name in names])
            except Exception as failure:
                failed(running, failure)
                del turns[running], samples[running]
                continue
            for name in turns:
                samples[name].append(
                    [t / together for t, (n, _) in zip(times, names, strict=True) if n == name]
                )
            done = True
    return samples, {name: STRETCHES * turns[name] * together for name in turns}


def _raise_time_outs(device: Device) -> None:
    from fusedrnn import kernels

    kernels.check(device.torch)


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
        broken = BrokenDevice(describe(failure))
        broken.rows = rows  # pyright: ignore[reportAttributeAccessIssue]
        raise broken from failure
