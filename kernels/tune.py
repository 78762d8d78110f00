"""Plans by measurement instead of by estimate: FUSEDRNN_TUNE=1.

Off by default. When it is on, the first call of a cell, pass, dtype, hidden size and number of
directions times every candidate of `plan.candidates` for some steps of one batch tile, and the
times of a step replace the estimate in `plan.plan_scan`. They are kept in a file, so that each
machine measures once. Batch and time are not part of the key: the plan for any batch follows from
the time of a step and the number of launches.

    FUSEDRNN_TUNE=1            switches it on
    FUSEDRNN_CACHE_DIR=path    where tuned.json lies; default ~/.cache/fusedrnn
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from fusedrnn.call import Weights
from fusedrnn.cells import Cell
from fusedrnn.kernels.plan import Device, Plan, candidates
from fusedrnn.packing import Rows

logger: logging.Logger = logging.getLogger("fusedrnn")

STEPS = 256
REPEATS = 5

Measure = Callable[[Plan], float]

_remembered: dict[str, dict[str, dict[Plan, float]]] = {}  # file -> key -> times, in this process


def enabled() -> bool:
    """Whether FUSEDRNN_TUNE asks for it."""
    return os.environ.get("FUSEDRNN_TUNE", "0") == "1"


def cache_file() -> Path:
    """Where the times are kept."""
    folder = os.environ.get("FUSEDRNN_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "fusedrnn") / "tuned.json"


def step_times(
    cell: Cell, pass_: str, dtype: torch.dtype, *, H: int, D: int, P: int = 0,
    device: torch.device, properties: Device, input_precision: str,
    passes: tuple[Callable[..., Any], Callable[..., Any]], measure: Measure | None = None,
) -> dict[Plan, float] | None:  # fmt: skip
    """Microseconds of a step for every candidate plan, from the file or measured now.

    H, P and D (lanes) are those of `plan_scan`. `passes` are `launch.scan_forward` and
    `launch.scan_backward`, which call this. None while a CUDA graph is captured and nothing is
    known yet: nothing can be timed then.
    """
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    key = "|".join(
        map(str, (name, triton.__version__, cell.name, pass_, dtype, H, P, D, input_precision))
    )
    remembered = _remembered.setdefault(str(cache_file()), {})
    if key in remembered:
        return remembered[key]
    known = _read()
    if key not in known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        if measure is None:
            measure = functools.partial(
                _measure, passes, cell, pass_, dtype, H, P, D, device, properties, input_precision
            )
        times = []
        for plan in candidates(cell, pass_, dtype, H, properties, input_precision, P):
            if _lanes_at_once(plan, H, D, properties) == 0:
                continue
            try:
                times.append([asdict(plan), measure(plan)])
            except OutOfResources as error:
                logger.warning("tuning %s: %s does not fit: %s", key, plan, error)
        logger.info("tuned %s: %d candidates", key, len(times))
        known = {**_read(), key: times}
        _write(known)
    remembered[key] = {Plan(**fields): microseconds for fields, microseconds in known[key]}
    return remembered[key]


def _read() -> dict:
    try:
        return json.loads(cache_file().read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        logger.warning("%s cannot be read, tuning starts anew: %s", cache_file(), error)
        return {}


def _write(known: dict) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1))
    os.replace(partial, path)  # whole or not at all, whoever else writes


def _lanes_at_once(plan: Plan, H: int, D: int, properties: Device) -> int:
    """How many of D lanes of one batch tile run in one launch, all programs together."""
    if not plan.exchanged:
        return D
    room = properties.multiprocessors * plan.programs_per_sm
    return min(D, room // plan.programs(H))


def _measure(
    passes, cell, pass_, dtype, H, P, D, device, properties, input_precision, plan, *, steps=STEPS
) -> float:
    """Microseconds of a step: the best of some runs of one batch tile, in one launch."""
    scan_forward, scan_backward = passes
    B, G = plan.block_b, len(cell.gates)
    lanes = _lanes_at_once(plan, H, D, properties)
    D, heads = (lanes, 1) if lanes <= 2 else (1, lanes)
    projected, P, H = P > 0 and not cell.widest, P or H, H * heads
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    rows = Rows(steps, B, B, 1)
    gate_rows = G * cell.gate_units(H)
    w_hh = draw(gate_rows, P) / P**0.5 if heads == 1 else draw(heads, G * P, P) / P**0.5
    w_hh = draw(G * H) if cell.diagonal else w_hh
    w_hr = draw(P, H) / H**0.5 if projected else None
    params = tuple(draw(H) for _ in cell.params)
    dense = []
    for stage, (units, k) in zip(cell.dense, cell.dense_sizes(P), strict=True):  # of one head
        rows_of = len(stage.sums) * units
        matrix = draw(rows_of, k) if heads == 1 else draw(heads, rows_of, k)
        dense.append((matrix / k**0.5, None))
    weights = Weights(w_hh, w_hh, None, draw(gate_rows), w_hr, params, dense=tuple(dense))
    widths = (P if heads == 1 else H, *(H for _ in cell.states[1:]))
    state = tuple(draw(D, B, width) for width in widths)
    x_gates = draw(steps * B, D, G, H)
    layer = {"rows": rows, "save": "gates", "input_precision": input_precision, "heads": heads}

    def forward(plan):
        return scan_forward(cell, x_gates, [weights] * D, state, **layer, plan=plan)

    run = functools.partial(forward, plan)
    if pass_ == "backward":
        output, _final, saved, _published, states = forward(None)
        run = functools.partial(
            scan_backward, cell, output, state, [weights] * D, state, output, states, saved,
            **layer, plan=plan,
        )  # fmt: skip
    run()
    best = float("inf")
    for _ in range(REPEATS):
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            best = min(best, 1e3 * start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            best = min(best, 1e6 * (time.perf_counter() - begin))
    return best / steps
