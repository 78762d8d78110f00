"""The kernels that a plan will launch, compiled in many processes before anything is timed.

One process compiles a kernel in one to two seconds, and a plan needs hundreds of them: most of a
time box would go into it. T is no part of a kernel, nor the width of the input or the number of
layers, so a call of two steps of a single layer leaves in Triton's cache what longer ones need.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from bench import backends
from bench.device import pick_device
from bench.problem import TORCH_DTYPES, Problem, set_precision
from bench.shapes import Point, Shape
from fusedrnn import cells

FUSED = {"auto": "triton", "triton": "triton", "triton_states": "triton_states"}


class Job(NamedTuple):
    """A layer to call: `backend` is triton or triton_states, `passes` those of the points."""

    shape: Shape
    backend: str
    passes: tuple[str, ...]


def jobs(points: list[Point], device, most: int) -> list[Job]:
    """The different layers of `points`, in their order, `most` of them.

    Args:
        device: a `fusedrnn.kernels.plan.Device`.
    """
    from fusedrnn.kernels.plan import PASSES, plan_scan

    found: dict[tuple, Job] = {}
    for point in points:
        full = point.shape
        shape = replace(full, T=2, I=min(full.I, 16), layers=1, name="")
        precision = "tf32" if shape.dtype == "fp32-tf32" else "ieee"
        try:
            plans = [
                plan_scan(
                    cells.get(shape.cell), which, TORCH_DTYPES[shape.dtype], B=shape.B, H=shape.H,
                    D=shape.directions, device=device, input_precision=precision,
                )
                for which in PASSES
            ]  # fmt: skip
        except ValueError:  # no plan for such a layer: the run says so where it comes
            continue
        # How a batch is cut into launches is no part of a kernel either.
        same = tuple(
            replace(plan, batch_per_launch=None, directions_per_launch=None) for plan in plans
        )
        for backend in dict.fromkeys(FUSED[b] for b in point.backends if b in FUSED):
            kind = replace(shape, B=0, I=0, lengths="packed" if shape.lengths else "")
            earlier = found.setdefault((kind, same, backend), Job(shape, backend, point.passes))
            passes = (*earlier.passes, *(p for p in point.passes if p not in earlier.passes))
            found[kind, same, backend] = earlier._replace(passes=passes)
            if len(found) == most:
                return list(found.values())
    return list(found.values())


def compile_job(job: Job, device_type: str = "cuda") -> tuple[float, str]:
    """Seconds that the first calls of a layer take in all its passes, and what went wrong."""
    try:
        device = pick_device(device_type, compiles="")
        refusal = backends.refuses(job.backend, job.shape, device)
        if refusal:
            return 0.0, f"{job.shape.key}: {refusal}"
        set_precision(job.shape.dtype)
        problem = Problem(job.shape, device.torch, sets=1, gradients=False)
        start = time.perf_counter()
        for which in job.passes:
            backends.build(job.backend, problem, which, device).run(0)
        device.synchronize()
    except Exception as failure:  # reported; the run will meet it again, and record it in its row
        return 0.0, f"{job.shape.key}: {type(failure).__name__}: {failure}"
    return time.perf_counter() - start, ""


def precompile(
    points: list[Point],
    device,
    seconds: float,
    *,
    most: int = 400,
    workers: int | None = None,
    show: Callable[[str], None] = print,
) -> dict:
    """Fills Triton's cache (TRITON_CACHE_DIR) for up to `seconds`.

    Returns:
        for the conditions of the results: layers compiled of those planned, seconds of all, and
        the slowest first call of one layer, all its kernels, in one of the processes.
    """
    start = time.monotonic()
    planned = jobs(points, device, most)
    # Each has a CUDA context of half a gigabyte or so; one core is left for the rest.
    workers = min(workers or max((os.cpu_count() or 2) - 1, 1), 16, max(len(planned), 1))
    done, slowest = 0, 0.0
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        results = pool.imap_unordered(compile_job, planned)
        for _ in planned:
            try:
                taken, failure = results.next(max(start + seconds - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                show(f"compiling ahead was stopped after {seconds:.0f} s")
                break
            done, slowest = done + (not failure), max(slowest, taken)
            if failure:
                show(f"compiling ahead: {failure}")
    return {
        "layers": done, "planned": len(planned), "processes": workers,
        "seconds": round(time.monotonic() - start, 1), "slowest_first_call_s": round(slowest, 2),
    }  # fmt: skip
