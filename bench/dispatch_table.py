"""fusedrnn/dispatch_table.json from the committed results of GPUs: where cuDNN was faster.

    python -m bench.dispatch_table            write it
    python -m bench.dispatch_table --check    exit status 1 where it is not what the results say

The format and the look-up are `fusedrnn.measured`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.device import ROOT
from bench.noise import verdict
from bench.results import FOLDER, load_folder, newest_rows
from bench.shapes import of_row
from fusedrnn import measured

OUT = ROOT / "fusedrnn" / "dispatch_table.json"


def triton_rows(rows: list[dict]) -> list[dict]:
    """The rows that our kernels ran and that torch.nn was timed beside."""
    return [
        r for r in rows if r["backend"] in ("auto", "triton") and r["ran_on"] == "triton"
        and r["ratio"] and not r["resets"]
    ]  # fmt: skip


def table(found: dict[str, list[dict]]) -> dict:
    """The table of all GPUs among the results."""
    devices, sources = {}, []
    for device, runs in sorted(found.items()):
        if runs[0]["environment"]["kind"] != "cuda":
            continue
        sources += [run["path"] for run in runs]
        kinds: dict[str, dict[tuple[int, int, int], float]] = {}
        for row in triton_rows(newest_rows(runs)):
            s = of_row(row)
            # "forward" is a part of training, which decides.
            if row["pass"] == "forward":
                continue
            name = measured.kind(
                s.cell, s.dtype, training=row["pass"] == "training", layers=s.layers,
                directions=s.directions, packed=bool(s.lengths),
            )  # fmt: skip
            points = kinds.setdefault(name, {})
            at = (s.T, s.B, s.H)
            # Kinds leave out I and the exact number of layers: of two such points, the worse.
            ratio = 1.0 if verdict(row) == "cannot be told apart" else row["ratio"]
            points[at] = min(ratio, points.get(at, ratio))
        lossy = {
            name: [[*at, ratio] for at, ratio in sorted(points.items())]
            for name, points in sorted(kinds.items())
            if min(points.values()) < 1
        }
        if lossy:
            devices[device] = lossy
    return {"schema": 1, "sources": sources, "devices": devices}


def dumps(content: dict) -> str:
    """JSON with one line per kind of call."""
    text = json.dumps({**content, "devices": {}}, indent=1)
    blocks = []
    for device, kinds in content["devices"].items():
        lines = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in kinds.items())
        blocks.append(f"  {json.dumps(device)}: {{\n{lines}\n  }}")
    if not blocks:
        return text + "\n"
    return text.replace('"devices": {}', '"devices": {\n' + ",\n".join(blocks) + "\n }") + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch_table")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    options = parser.parse_args(arguments)
    text = dumps(table(load_folder(options.results)))
    current = options.out.exists() and options.out.read_text() == text
    if options.check:
        print(f"{options.out} is {'current' if current else 'not what the results say'}")
        return int(not current)
    if not current:
        options.out.write_text(text)
    kinds = sum(len(k) for k in json.loads(text)["devices"].values())
    print(f"{options.out}: {kinds} kinds of call with a point where torch's kernels were faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
