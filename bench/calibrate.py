"""The step-cost meter against a GPU: predicted and measured time of a step, parameters refitted.

    python -m bench.calibrate --out FILE            measures, predicts, refits
    python -m bench.calibrate --out FILE --again    keeps the times in FILE; needs no GPU

FILE is a results file; what it holds already (`python -m bench.limits --out FILE`) stays, and its
measured `limits.clocks` are what the predictions start from. Under "calibration" it gets

    rows        a shape's fields and its pass; measured_us, predicted_us, low_us, high_us, all of
                a step of the time loop; error, why one of them is missing, or null
    off_by      root mean square of the logarithm of predicted over measured, as a factor
    rank_correlation    Spearman's, of predicted and measured; null where there is none
    refit       parameters, by their names in bench.step_cost.parameters, and off_by and
                rank_correlation that the predictions would have with them

A refit is fitted to the same times that it is judged by. The parameters of it lie on one path, from
a store to the load that sees it, so the times fix their sum better than each of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report, results
from bench.device import Device, is_sticky, pick_device
from bench.limits import best_seconds
from bench.measure import describe
from bench.precompile import precompile
from bench.problem import TORCH_DTYPES
from bench.shapes import Point, Shape, of_row
from fusedrnn import cells
from fusedrnn.packing import Rows

PASSES = ("forward", "backward")
STEPS = 400
REFITTED = ("store_visible", "poll_phase", "l2_load")
SLOPE = 0.1  # the change of a parameter's logarithm that slopes are taken over
ENOUGH = 0.01  # the part of the squares that a step must take away, or it is the last
ROUNDING = 1e-12  # squares that are nothing else

# Every schedule in both passes, every dtype, each in one launch on a GPU of 132 multiprocessors.
SHAPES = tuple(
    Shape(cell, dtype, STEPS, B, H, H)
    for cell, dtype, B, H in (
        ("lstm", "fp16", 16, 768), ("gru", "bf16", 64, 512), ("lstm", "bf16", 32, 128),
        ("lstm", "fp32-tf32", 32, 512), ("lstm", "bf16", 16, 1024), ("gru", "fp16", 16, 768),
        ("lstm", "bf16", 32, 1024), ("rnn_tanh", "bf16", 32, 256), ("lstm", "fp16", 96, 384),
        ("gru", "fp32-tf32", 64, 384), ("lstm", "fp32-exact", 32, 256), ("gru", "bf16", 64, 16),
        ("lstm", "fp32-tf32", 16, 1024), ("lstm", "bf16", 1, 512), ("gru", "fp16", 32, 1024),
        ("rnn_tanh", "fp32-tf32", 32, 64), ("lstm", "fp16", 16, 2048), ("lstm", "bf16", 64, 256),
        ("gru", "fp32-exact", 16, 512), ("rnn_tanh", "fp16", 32, 1024),
    )
)  # fmt: skip


# Measuring.


def time_loop(shape: Shape, which: str, device: torch.device, steps: int) -> Callable[[], object]:
    """One pass of the time loop of one layer, `steps` steps, without the products around it."""
    from fusedrnn.call import Weights
    from fusedrnn.kernels.launch import check, scan_backward, scan_forward

    cell, B, H = cells.get(shape.cell), shape.B, shape.H
    G = len(cell.gates)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[shape.dtype]
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    w_hh = draw(G * H, H) / H**0.5
    directions = [Weights(w_hh, w_hh, None, draw(G * H), None, ())]
    state = tuple(draw(1, B, H) for _ in cell.states)
    x_gates = draw(steps * B, 1, G, H)
    rows = Rows(steps, B, B, 1)
    layer: dict[str, Any] = {
        "rows": rows, "save": "gates", "input_precision": shape.precision[1]
    }  # fmt: skip

    def forward():
        return scan_forward(cell, x_gates, directions, state, **layer)

    output, _, saved, states = forward()
    check(device)  # a launch that timed out would be timed
    if which == "forward":
        return forward
    return lambda: scan_backward(
        cell, output, state, directions, state, output, states, saved, **layer
    )


def measured_us(shape: Shape, which: str, device: Device, loop=time_loop) -> float:
    """Microseconds of a step: a long run less a short one, the best of several each.

    Raises:
        ValueError: noise was larger than the difference.
    """

    def seconds(steps: int) -> float:
        call = loop(shape, which, device.torch, steps)
        call()  # compiles, which is not to be taken for the length of a call
        return best_seconds(device, call)

    short, long = seconds(STEPS), seconds(2 * STEPS)
    if long <= short:
        raise ValueError(f"{2 * STEPS} steps took {long:.3g} s, {STEPS} steps {short:.3g} s")
    return (long - short) / STEPS * 1e6


def measure(
    shapes: Iterable[Shape], device: Device, in_time: Callable[[], bool], loop=time_loop
) -> list[dict]:
    """Rows with the measured times, for as long as there is time and the device goes on."""
    rows, over = [], ""
    for shape in shapes:
        for which in PASSES:
            row = {**shape.fields(), "pass": which, "measured_us": None, "error": None}
            over = over or ("" if in_time() else "the budget was spent")
            why = over
            if not over:
                try:
                    row["measured_us"] = measured_us(shape, which, device, loop)
                except Exception as failure:
                    why = describe(failure)
                    over = f"the device failed before: {why}" if is_sticky(failure) else ""
            row["error"] = f"not measured: {why}" if why else None
            rows.append(row)
    return rows


# Predicting.


def with_values(parameters, values: dict[str, float], source: str):
    """The meter's parameters with some of them known: low, middle and high alike."""
    changes = {
        name: replace(getattr(parameters, name), low=v, middle=v, high=v, source=source)
        for name, v in values.items()
    }
    return replace(parameters, **changes)


def read_row(row: dict, parameters, target: str) -> tuple[float, float, float] | str:
    """Predicted microseconds of a step, middle, low and high; or why there are none."""
    from bench.step_cost.read import predict

    shape = of_row(row)
    dtype, precision = shape.precision
    try:
        reading = predict(
            shape.cell, dtype, shape.H, shape.B, row["pass"], precision=precision, target=target,
            parameters=parameters,
        )  # fmt: skip
    except Exception as failure:  # in a process of its own; the row says so
        return f"not predicted: {describe(failure)}"
    return reading.predicted_us, reading.low_us, reading.high_us


Predict = Callable[[list[dict], Any], list[tuple[float, float, float] | str]]


def predictions(rows: list[dict], predict: Predict, parameters) -> list[dict]:
    """`rows` with what the meter says."""
    found = []
    for row, answer in zip(rows, predict(rows, parameters), strict=True):
        if isinstance(answer, str):
            times, error = (None, None, None), row["error"] or answer
        else:
            times, error = answer, row["error"]
        names = ("predicted_us", "low_us", "high_us")
        found.append({**row, **dict(zip(names, times, strict=True)), "error": error})
    return found


def ranks(values) -> np.ndarray:
    """From 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def rank_correlation(x, y) -> float | None:
    """Spearman's; None where one of them is constant."""
    rx, ry = ranks(x), ranks(y)
    if len(set(rx)) < 2 or len(set(ry)) < 2:
        return None
    return float(np.corrcoef(rx, ry)[0, 1])


def judge(rows: list[dict]) -> dict:
    """How well the predictions of the rows that have both times agree with the measurements."""
    both = [r for r in rows if r["measured_us"] and r["predicted_us"]]
    predicted = np.array([r["predicted_us"] for r in both])
    measured = np.array([r["measured_us"] for r in both])
    if not both:
        return {"off_by": None, "rank_correlation": None}
    off_by = math.exp(float(np.sqrt(np.mean(np.log(predicted / measured) ** 2))))
    return {"off_by": off_by, "rank_correlation": rank_correlation(predicted, measured)}


def refit(
    rows: list[dict], predict: Predict, parameters, in_time: Callable[[], bool]
) -> dict | None:
    """The values of REFITTED with the least squares of the logarithm of predicted over measured, at
    most twice beyond their ranges: Gauss-Newton steps in the logarithms of the values, from the
    middle of each range, with slopes from differences. Where the times do not tell two parameters
    apart, a step is the shortest that will do, which changes both alike.

    Returns:
        parameters and what `judge` says with them; None where no row has both times, or where
        nothing was better.
    """
    rows = [r for r in rows if r["measured_us"] and r["predicted_us"]]
    if not rows:
        return None
    ranges = [getattr(parameters, name) for name in REFITTED]
    least = np.log([min(r.low, r.high) / 2 for r in ranges])
    most = np.log([max(r.low, r.high) * 2 for r in ranges])
    measured = np.log([r["measured_us"] for r in rows])

    def named(x: np.ndarray) -> dict[str, float]:
        return dict(zip(REFITTED, map(float, np.exp(x)), strict=True))

    def residuals(x: np.ndarray) -> np.ndarray:
        answers = predict(rows, with_values(parameters, named(x), "refitted"))
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            raise ValueError(f"the meter fails with {named(x)}: {failed[0]}")
        return np.log([answer[0] for answer in answers]) - measured

    x = np.log([r.middle for r in ranges])
    off = residuals(x)
    first = off @ off
    while in_time() and off @ off > ROUNDING:
        slopes = np.stack([(residuals(x + d) - off) / SLOPE for d in SLOPE * np.eye(len(x))], 1)
        step = np.linalg.lstsq(slopes, -off, rcond=SLOPE)[0]
        for share in (1.0, 0.5, 0.25):
            tried = np.clip(x + share * step, least, most)
            found = residuals(tried)
            if found @ found < (1 - ENOUGH) * (off @ off):
                x, off = tried, found
                break
        else:
            break
    if off @ off >= first:
        return None
    after = predictions(rows, predict, with_values(parameters, named(x), "refitted"))
    return {"parameters": named(x), **judge(after)}


def calibrate(
    before: dict,
    measured: list[dict],
    predict: Predict,
    parameters,
    in_time: Callable[[], bool],
    save: Callable[[dict], None] = lambda content: None,
) -> dict:
    """The results `before` with a calibration; `save` is called whenever there is more of it."""
    clocks = (before.get("limits") or {}).get("clocks") or {}
    if clocks:
        parameters = with_values(parameters, clocks, "measured")
    nothing = {"predicted_us": None, "low_us": None, "high_us": None}
    rows = [{**row, **nothing} for row in measured]
    content = {**before, "calibration": {"rows": rows, **judge(rows), "refit": None}}
    save(content)
    rows = predictions(measured, predict, parameters)
    content["calibration"] = {"rows": rows, **judge(rows), "refit": None}
    save(content)
    content["calibration"]["refit"] = refit(rows, predict, parameters, in_time)
    save(content)
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibrate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="results file, made or extended")
    parser.add_argument("--again", action="store_true", help="keep the times that FILE has")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds (default: any)")
    options = parser.parse_args(arguments)
    from bench.step_cost import parameters

    start = time.monotonic()

    def in_time() -> bool:
        return time.monotonic() - start < options.budget

    try:
        content = results.load(options.out) if options.out.exists() else None
        if options.again:
            if content is None or not content.get("calibration"):
                raise ValueError(f"--again: {options.out} has no calibration")
            measured = [
                {**row, "error": row["error"] if row["measured_us"] is None else None}
                for row in content["calibration"]["rows"]
            ]
        else:
            device = pick_device("cuda", compiles="")
            content = results.begin(device, content)
            from fusedrnn.kernels.launch import device_of

            points = [Point(shape, "calibrate", ("triton",), ("training",)) for shape in SHAPES]
            compiled = precompile(points, device_of(device.torch), min(options.budget / 3, 600))
            print(f"compiled ahead: {compiled}", flush=True)
            measured = measure(progress(SHAPES), device, in_time)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    target = content["environment"]["capability"]
    workers = max((os.cpu_count() or 2) - 1, 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:

        def predict(rows: list[dict], known) -> list[tuple[float, float, float] | str]:
            n = len(rows)
            return list(pool.map(read_row, rows, [known] * n, [target] * n))

        content = calibrate(
            content, measured, predict, parameters.load(capability=target), in_time,
            lambda content: results.save(content, options.out),
        )  # fmt: skip
    print("\n".join(report.calibration_lines(content["calibration"])))
    return 0


def progress(items: Iterable[Shape]) -> Iterable[Shape]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="shape", disable=None)


if __name__ == "__main__":
    sys.exit(main())
