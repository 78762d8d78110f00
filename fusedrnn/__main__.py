"""`python -m fusedrnn`: versions, devices, and a check of every backend that works here.

With --cells: a table of the cells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from fusedrnn import BACKENDS, cells, selfcheck


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns 1 where a backend is wrong or fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object for a script")
    parser.add_argument("--cells", action="store_true", help="print a table of the cells")
    options = parser.parse_args(arguments)
    if options.cells:
        print(table_of_cells())
        return 0
    as_json = options.json

    versions = selfcheck.versions()
    devices = {device: selfcheck.describe(device) for device in selfcheck.devices()}
    if not as_json:
        for name, value in versions.items():
            print(f"{name:10}{value}")
        for name, value in devices.items():
            print(f"{name:10}{value}")
        print("\nEach backend against the reference in float64:")
    checks = []
    for device in devices:
        for backend in BACKENDS:
            result = selfcheck.check(device, backend)
            checks.append(result)
            if not as_json:
                print(_line(result), flush=True)
    bad = [c for c in checks if c.status in ("wrong", "failed")]
    if as_json:
        rows = [c._asdict() for c in checks]
        print(json.dumps({"versions": versions, "devices": devices, "checks": rows}, indent=2))
    elif bad:
        print(f"\n{len(bad)} backend(s) do not compute what they should: do not use them.")
    return 1 if bad else 0


def table_of_cells() -> str:
    """What the registry holds, in Markdown: gates in the order of the rows of weight_ih, and the
    parameters besides weight_ih, weight_hh, bias_ih, bias_hh and weight_hr."""
    lines = [
        "| module | cell | gates | states | own parameters | source |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells.REGISTRY.values():
        own = [f"`{o.name}`" + (f" [{o.vectors} H]" if o.vectors > 1 else "") for o in cell.own]
        own += ["`weight_hh` [H]"] * cell.diagonal
        matrices = [f"`{name}`" for name in cell.sums[len(cell.gates) :]]
        own += ["matrices " + ", ".join(matrices)] * bool(matrices)
        row = (
            f"`{cell.module}`", f"`{cell.name}`", " ".join(cell.gates), " ".join(cell.states),
            ", ".join(own), cell.source,
        )  # fmt: skip
        lines.append(f"| {' | '.join(row)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _line(result: selfcheck.Check) -> str:
    head = f"  {result.device:8}{result.backend:11}{result.status:12}"
    if result.error is None:
        return head + result.reason
    return head + f"error {result.error:.1e}, {result.reason} ({result.seconds:.1f} s)"


if __name__ == "__main__":
    try:
        status: int = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head -1`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 1
    sys.exit(status)
