"""Two results files of one machine: what got slower from A to B?

    python -m bench.compare A.json B.json
    python -m bench.compare A.json B.json --by ratio --threshold 1.1

Exit status 1 where something did: its time grew by more than the threshold, and beyond noise. Its
fast calls in B (p10) are slower than the slow ones in A (p90); by ratio, the intervals in A and B
have nothing in common.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from bench.report import describe, geometric_mean
from bench.results import load, row_key
from bench.shapes import of_row


class Change(NamedTuple):
    """A row in both files. `factor` above 1 is slower in B."""

    what: str
    backend: str
    factor: float
    before: float
    after: float
    beyond_noise: bool


def changes(a: dict, b: dict, by: str = "ms") -> list[Change]:
    """Rows that have a time in both, slowest change first.

    Args:
        by: "ms", or "ratio": the ratio to torch.nn in the same run, which a machine's load or
            clocks change less. Rows of torch.nn itself are then left out.
    Raises:
        ValueError: another name.
    """
    if by not in ("ms", "ratio"):
        raise ValueError(f"by must be 'ms' or 'ratio', got {by!r}")
    before = {row_key(r): r for r in a["rows"] if r["ms"]}
    found = []
    for new in b["rows"]:
        old = before.get(row_key(new))
        if old is None or not new["ms"]:
            continue
        if by == "ms":
            factor, values = new["ms"] / old["ms"], (old["ms"], new["ms"])
            beyond = new["ms"] > old["ms_p90"]
        else:
            if new["backend"] == "torch_nn" or not (old["ratio"] and new["ratio"]):
                continue
            factor, values = old["ratio"] / new["ratio"], (old["ratio"], new["ratio"])
            beyond = new["ratio_high"] < old["ratio_low"]
        what = f"{describe(of_row(new))}, {new['pass']}"
        found.append(Change(what, new["backend"], factor, *values, beyond))
    return sorted(found, key=lambda c: -c.factor)


def lost(a: dict, b: dict) -> list[str]:
    """Rows that had a time in A and have an error in B: worse than slow."""
    timed = {row_key(r) for r in a["rows"] if r["ms"]}
    return [
        f"{describe(of_row(r))}, {r['pass']}, {r['backend']}: {r['error']}"
        for r in b["rows"]
        if r["error"] and row_key(r) in timed
    ]


def report(a: dict, b: dict, by: str, threshold: float) -> tuple[list[str], bool]:
    """Lines for people, and whether anything regressed."""
    found, broken = changes(a, b, by), lost(a, b)
    if not found and not broken:
        return ["no row has a time in both files"], False
    lines = []
    for backend in sorted({c.backend for c in found}):
        factors = [c.factor for c in found if c.backend == backend]
        mean = geometric_mean(factors)
        lines.append(f"{backend:20} {len(factors):5} rows, geometric mean {_percent(mean)}")
    slower = [c for c in found if c.factor > threshold and c.beyond_noise]
    for title, picked in (
        (f"slower by more than {_percent(threshold)}", slower),
        ("faster", [c for c in reversed(found) if c.factor < 1 / threshold][:10]),
    ):
        if picked:
            lines += ["", f"{title}:"]
            lines += [
                f"  {_percent(c.factor):>8}  {c.before:.4g} -> {c.after:.4g} {by}  {c.backend}  "
                f"{c.what}"
                for c in picked
            ]
    if broken:
        lines += ["", "no time any more:", *(f"  {line}" for line in broken)]
    return lines, bool(slower or broken)


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f}%" if math.isfinite(factor) else "inf"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", type=Path, help="before")
    parser.add_argument("b", type=Path, help="after")
    parser.add_argument("--by", choices=("ms", "ratio"), default="ms")
    parser.add_argument("--threshold", type=float, default=1.05, help="factor; default 1.05")
    options = parser.parse_args(arguments)
    try:
        a, b = load(options.a), load(options.b)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    devices = [r["environment"]["device"] for r in (a, b)]
    if devices[0] != devices[1]:
        parser.error(f"the files are of different machines: {devices[0]} and {devices[1]}")
    lines, regressed = report(a, b, options.by, options.threshold)
    print("\n".join(lines))
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
