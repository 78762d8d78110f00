"""Results files: what they hold, and how they are read and written.

    {
      "schema": 2,
      "environment": {"device", "kind", "commit", "dirty", "date", "torch", "triton", ...},
      "conditions": {"effort": {...}, "cache": "warm", "clock": ..., ...},
      "limits": {...},              # bench/limits.py: what the machine can do
      "calibration": {...},         # bench/calibrate.py, where it ran: the step-cost meter's error
      "left_out": {"backend: why": number of points},
      "stopped": "",                # why the run ended early
      "points": {"planned": n, "measured": n},
      "rows": [{...}, ...]          # one line each
    }

A row has the fields of a shape (`cell, dtype, T, B, I, H, layers, bidirectional, packed,
lengths, resets, name`), then `tier, pass, backend`, then

    ran_on           the backend that fusedrnn took
    ms, ms_p50, ms_p90, calls    the tenth part (a low quantile), the median and the ninth tenth
                     of that many calls
    ms_torch_nn      torch.nn's `ms` in the same turns
    ratio, ratio_low, ratio_high     torch.nn's time over ours, and the interval of it
    overhead_us, overhead_us_low, overhead_us_high     our time less torch.nn's, likewise; see
                     bench/noise.py for both
    floor_ms, floor_ratio        what the machine's limits allow; ms / floor_ms
    host_us          how long a call keeps the host busy (GPU only)
    first_call_s     building and running it for the first time in this process; what is compiled
                     then is what neither `conditions.precompiled` nor an earlier row compiled
    peak_bytes       the most memory a call held at once, beyond inputs and weights
    cache            "warm": input sets in rotation; "cold": caches flushed before each call
    deviation, deviation_limit   relative error against float64, and what was allowed
    error            why there is no time, or null
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from bench.device import ROOT, Device, slug
from bench.shapes import of_row

SCHEMA = 2
FOLDER = ROOT / "bench" / "results"
REQUIRED = (
    "cell", "dtype", "T", "B", "I", "H", "layers", "bidirectional", "packed", "pass", "backend",
    "ran_on", "ms", "ms_p50", "ms_p90", "ms_torch_nn", "ratio", "ratio_low", "ratio_high",
    "overhead_us", "overhead_us_low", "overhead_us_high", "floor_ms", "peak_bytes", "error",
)  # fmt: skip


def default_path(environment: dict, folder: Path = FOLDER) -> Path:
    date = re.sub(r"[^0-9]", "", environment["date"][:16])
    return folder / slug(environment["device"]) / f"{date}-{environment['commit']}.json"


def begin(device: Device, before: dict | None = None) -> dict:
    """A file of this machine without rows yet, or `before`, to be extended.

    Raises:
        ValueError: `before` was measured elsewhere, or on other code.
    """
    environment = device.environment()
    if before is None:
        return {
            "schema": SCHEMA, "environment": environment,
            "conditions": {"cache": device.cache, "clock": device.clock},
            "limits": None, "left_out": {}, "stopped": "",
            "points": {"planned": 0, "measured": 0}, "rows": [],
        }  # fmt: skip
    for name in ("device", "commit", "torch", "triton"):
        ours, theirs = environment.get(name), before["environment"].get(name)
        if ours != theirs:
            raise ValueError(f"the file is of another {name}: {theirs}, here {ours}")
    return before


def row_key(row: dict) -> tuple[str, str, str]:
    """What a row measured: shape, pass, backend."""
    return of_row(row).key, row["pass"], row["backend"]


def dumps(results: dict) -> str:
    """JSON with one line per row, so that two files can be read side by side."""
    head = {k: v for k, v in results.items() if k != "rows"}
    text = json.dumps(head, indent=1, allow_nan=False)
    rows = ",\n".join("  " + json.dumps(r, allow_nan=False) for r in results["rows"])
    return f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def save(results: dict, path: Path) -> None:
    """Writes beside the file and renames: a reader, or a kill, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(dumps(results))
    os.replace(beside, path)


def load(path: str | Path) -> dict:
    """Reads and checks a results file.

    Raises:
        ValueError: not a results file, or of another schema.
    """
    try:
        results = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file: {error}") from error
    problems = check(results)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:5])}")
    return results


def check(results: dict) -> list[str]:
    """What is wrong with it; empty for a good file."""
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        return [f"expected schema {SCHEMA}, got {found!r}"]
    problems = [f"no {name!r}" for name in ("environment", "rows") if name not in results]
    for n, row in enumerate(results.get("rows", ())):
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            problems.append(f"row {n} lacks {missing}")
        elif row["ms"] is None and not row["error"]:
            problems.append(f"row {n} has neither a time nor an error")
        elif row["ms"] is not None and row["error"]:
            problems.append(f"row {n} has a time and an error")
    return problems


def load_folder(folder: Path = FOLDER) -> dict[str, list[dict]]:
    """All results files, by device, oldest first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name == "aot":  # what the compiler says of the kernels; no times
            continue
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
            key, which, backend = row_key(row)
            fresh.setdefault((key, which), {})[backend] = row
        merged |= fresh
    return [row for rows in merged.values() for row in rows.values()]
