"""On a CPU: fusedrnn's modules against torch.nn's plain call of the same sizes, and their goals.

    python -m bench.cpu --out FILE                     into a results file, made or extended
    python -m bench.cpu --out FILE --rows '^gru .*T50' only these; others in the file stay

Both sides take turns in one process, and a figure is the ratio of their low quantiles, ours over
torch.nn's, so below 1 is faster. Here torch.nn computes the plain call even where ours has lengths
or a zoneout: what such an extra costs is the question. Before anything is timed its results are
compared with someone else's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import fusedrnn
from bench.backends import Stepwise, as_hx, flatten
from bench.run import begin, describe, load, save
from bench.timing import Device, quantile, round_to

LOW = 0.2
LEAST_TURNS, MOST_TURNS = 5, 500
# Seconds of a turn, at least. A call of microseconds is repeated in its turn: the other side leaves
# the processor's caches and branch predictors to it cold.
LEAST = 1e-3


class Size(NamedTuple):
    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return " ".join(f"{name}{value}" for name, value in self._asdict().items())


class Row(NamedTuple):
    """What is measured at several sizes. `how`: training (forward and backward); compiled, which is
    training, too, but torch.nn is not compiled; in evaluation mode inference, one step (a call with
    T = 1) and step() (the method, whose figure is microseconds above torch's operator)."""

    cell: str
    extra: str = ""
    how: str = "training"

    @property
    def name(self) -> str:
        how = "" if self.how == "training" else self.how
        return " ".join(filter(None, (self.cell, how, self.extra)))


SIZES = (Size(50, 8, 32, 64), Size(64, 16, 128, 128), Size(100, 32, 128, 256),
         Size(128, 256, 128, 128))  # fmt: skip
STEP_SIZES = (Size(1, 1, 64, 64), Size(1, 8, 64, 64))
TINY = Size(4, 3, 2, 5)
REGULARIZERS = {
    "zoneout": {"zoneout": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "clipping": {"clip_gradient": 1.0},
}
EXTRAS = ("lengths", "resets", *REGULARIZERS)
CELLS = ("lstm", "gru", "rnn")
ROWS = (
    *(Row(cell) for cell in CELLS),
    *(Row(cell, extra) for cell in CELLS for extra in EXTRAS),
    Row("lstm", "resets to a state"), Row("lstm", "packed"),
    *(Row(cell, how="compiled") for cell in ("lstm", "gru")),
    *(Row(cell, extra, "inference") for extra in ("", "lengths", "resets") for cell in CELLS),
    Row("lstm", how="one step"),
    *(Row(cell, how="step()") for cell in ("lstm", "gru")),
)  # fmt: skip
# What a figure should not exceed, by size.
GOALS = {
    "lstm": (1.03, 1.03, 1.03, 1.03),
    "gru": (0.5, 0.65, 0.85, 1.03),
    "rnn": (0.7, 0.75, 0.9, 1.03),
    **{f"{cell} {extra}": (0.6, 0.75, 0.95, 1.3) for cell in ("gru", "rnn") for extra in EXTRAS},
    "lstm lengths": (1.7, 1.25, 1.2, 1.35),
    "lstm resets": (1.7, 1.25, 1.2, 1.35),
    "lstm packed": (0.35, 0.4, 0.55, 0.15),
    "lstm zoneout": (4, 3.5, 2.2, 1.9),
    "lstm recurrent dropout": (4, 3.5, 2.2, 1.9),
    "lstm compiled": (1.9, 1.3, 1.05, 1.0),
    "gru compiled": (0.7, 0.8, 0.95, 1.15),
    "lstm one step": (0.5, 0.6, 0.9, 1.0),
    "lstm step()": (6, 6),
    "gru step()": (6, 6),
}


def goal(row: Row, size: Size) -> float | None:
    """The most that the figure of a row should be at a size, where there is a goal."""
    sizes = STEP_SIZES if row.how == "step()" else SIZES
    known = row.name in GOALS and size in sizes
    return float(GOALS[row.name][sizes.index(size)]) if known else None


@dataclass
class Call:
    """A call of a module; with a `gradient` of its output it is a training step."""

    module: nn.Module
    function: Callable[..., Any]  # the module, or what stands for it
    input: Tensor | PackedSequence
    hx: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None

    def __call__(self) -> Any:
        if self.gradient is None:
            return self.function(self.input, self.hx, **self.options)
        self.module.zero_grad()
        result = self.function(self.input, self.hx, **self.options)
        output = result[0]
        output = output.data if isinstance(output, PackedSequence) else output
        output.backward(self.gradient)
        return result

    def values(self) -> list[Tensor]:
        """Output, final state and gradients. All noise is drawn from one seed."""
        torch.manual_seed(0)
        results = [result.detach() for result in flatten(self())]
        return results + [p.grad for p in self.module.parameters() if p.grad is not None]


class Case(NamedTuple):
    """torch.nn's call and ours, to be timed; one whose results ours should have; our backend."""

    torch_nn: Call
    own: Call
    trusted: Call
    ran_on: str


def by_packing(module: nn.Module) -> Callable[..., Any]:
    """torch.nn's way to rows of several lengths, with padding before and after."""

    def call(input: Tensor, hx: Any, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, final = module(packed, hx)
        return pad_packed_sequence(output, total_length=len(input))[0], final

    return call


def case(row: Row, size: Size) -> Case:
    """A row at a size, for the grad mode in force."""
    T, B, I, H = size if row.how != "one step" else size._replace(T=1)
    torch.manual_seed(0)
    torch_nn = getattr(nn, row.cell.upper())(I, H)
    own = getattr(fusedrnn, row.cell.upper())(I, H, **REGULARIZERS.get(row.extra, {}))
    own.load_state_dict(torch_nn.state_dict())
    for module in (torch_nn, own):
        module.train(torch.is_grad_enabled())
    x, gradient = torch.randn(T, B, I), torch.randn(T, B, H)
    states = tuple(torch.randn(1, B, H) for _ in range(2 if row.cell == "lstm" else 1))
    lengths, mask = torch.randint(max(T // 4, 1), T + 1, (B,)), torch.rand(T, B) < 0.05

    input: Tensor | PackedSequence = x
    if row.extra == "packed":
        input = pack_padded_sequence(x, lengths, enforce_sorted=False)
        gradient = pack_padded_sequence(gradient, lengths, enforce_sorted=False).data
    hx = as_hx(states) if T == 1 else None
    options: dict[str, Any] = {
        "lengths": {"lengths": lengths}, "resets": {"reset": mask},
        "resets to a state": {"reset": (mask, as_hx(states))},
    }.get(row.extra, {})  # fmt: skip
    ran_on = fusedrnn.explain(own, input, hx, **options).backend

    if row.how == "step()":
        operator = {"lstm": torch.lstm_cell, "gru": torch.gru_cell}[row.cell]
        weights, hx_of_cell = list(torch_nn.parameters()), as_hx(tuple(s[0] for s in states))

        def last(input: Tensor, hx: Any) -> Any:
            output, final = torch_nn(input[None], hx)
            return output[0], final

        theirs = Call(torch_nn, lambda x, hx: operator(x, hx, *weights), x[0], hx_of_cell)
        trusted = Call(torch_nn, last, x[0], hx)
        return Case(theirs, Call(own, own.step, x[0], hx), trusted, ran_on)

    def call(module: nn.Module, function: Callable[..., Any], options: dict[str, Any]) -> Call:
        learned = gradient if torch.is_grad_enabled() else None
        return Call(module, function, input, hx, options, learned)

    function: Callable[..., Any] = own
    if row.how == "compiled":
        torch.compiler.reset()
        function = torch.compile(own, fullgraph=True)
    known = {"": torch_nn, "packed": torch_nn, "lengths": by_packing(torch_nn),
             "resets": Stepwise(torch_nn)}  # fmt: skip
    if row.extra in known:
        trusted = call(torch_nn, known[row.extra], options)
    else:  # torch.nn cannot: the plain loop of operators, which draws the same noise
        loop = copy.deepcopy(own)
        loop.backend = "reference"
        trusted = call(loop, loop, options)
    return Case(call(torch_nn, torch_nn, {}), call(own, function, options), trusted, ran_on)


def deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a tensor; inf where there is a NaN or another shape."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return math.inf
    errors = [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def tolerance(size: Size) -> float:
    """What two right results may differ by. The longest sums have the I + H terms of a gate or the
    T * B of a weight's gradient. Roundings are a random walk, so n of them are off by sqrt(n) units
    in float32's last place. Twice that, because both sides err."""
    T, B, I, H = size
    return 2 * torch.finfo(torch.float32).eps * math.sqrt(I + H + T * B)


def take_turns(calls: tuple[Call, Call], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each of two calls, in turns for so long, whoever begins drawn anew each time."""

    def timed(call: Call, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    # By torch.nn, which is quick; a slow call of ours should not be made only to see that it is.
    together = 1
    for _ in range(2):
        together = math.ceil(LEAST / timed(calls[0], together))
    taken: tuple[list[float], list[float]] = ([], [])
    order, end = random.Random(0), time.perf_counter() + seconds
    while len(taken[0]) < LEAST_TURNS or (len(taken[0]) < MOST_TURNS and time.perf_counter() < end):
        for side in order.sample((0, 1), 2):
            taken[side].append(timed(calls[side], together))
    return taken


def figures(theirs: list[float], own: list[float]) -> dict[str, float | int | None]:
    """What a results file says of seconds in turns. The ratio of medians shows the noise."""
    a, b = quantile(theirs, LOW), quantile(own, LOW)
    return {
        "ratio": round_to(b / a, 4), "above_us": round_to(1e6 * (b - a), 4),
        "ratio_p50": round_to(quantile(own, 0.5) / quantile(theirs, 0.5), 4),
        "ms": round_to(1e3 * b, 4), "ms_torch_nn": round_to(1e3 * a, 4), "turns": len(own),
    }  # fmt: skip


def measure(row: Row, size: Size, seconds: float) -> dict[str, Any]:
    """A row of the results file: with an `error` and no figures where something is wrong."""
    found = {
        "row": row.name, "size": list(size), "goal": goal(row, size), "ran_on": None,
        "figure": "above_us" if row.how == "step()" else "ratio", "deviation": None,
        "tolerance": round_to(tolerance(size), 3), **dict.fromkeys(figures([1.0], [1.0])),
        "error": None,
    }  # fmt: skip
    try:
        with torch.set_grad_enabled(row.how in ("training", "compiled")):
            torch_nn, own, trusted, found["ran_on"] = case(row, size)
            error = deviation(own.values(), trusted.values())
            found["deviation"] = round_to(error, 3)
            if error > tolerance(size):
                raise ArithmeticError(f"off by {error:.2e}, allowed {tolerance(size):.2e}")
            found |= figures(*take_turns((torch_nn, own), seconds))
    except Exception as failure:
        found["error"] = describe(failure)
    return found


TITLES = {"ratio": "ours / torch.nn (goal)", "above_us": "us above torch's operator (goal)"}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each row, a column for each size; what misses its goal is bold."""
    lines = []
    for figure, title in TITLES.items():
        at = {(r["row"], Size(*r["size"])): r for r in rows if r["figure"] == figure}
        sizes = sorted({size for _, size in at})
        if at:
            lines += [f"| {' | '.join([title, *map(str, sizes), 'ran on'])} |"]
            lines += ["|---" * (len(sizes) + 2) + "|"]
        for name in dict.fromkeys(name for name, _ in at):
            found = [at.get((name, size)) for size in sizes]
            ran_on = ", ".join(dict.fromkeys(r["ran_on"] for r in found if r and r["ran_on"]))
            lines += [f"| {' | '.join([name, *map(said, found), ran_on])} |"]
        lines += [""] * bool(at)
    failed = [f"- {r['row']}, {Size(*r['size'])}: {r['error']}" for r in rows if r["error"]]
    return lines + failed


def said(row: dict[str, Any] | None) -> str:
    """A figure and its goal."""
    if row is None or row["error"]:
        return "error" if row else "-"
    value, goal = row[row["figure"]], row["goal"]
    shown = f"{value:.2f}" if row["figure"] == "ratio" else f"{value:.1f}"
    if goal is None:
        return shown
    return f"{shown} ({goal:g})" if value <= goal else f"**{shown}** ({goal:g}, missed)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="results file, made or extended")
    parser.add_argument("--rows", default="", help="regular expression on 'ROW SIZE'")
    parser.add_argument("--budget", type=float, default=600, help="seconds, about (default: 600)")
    parser.add_argument("--tiny", action="store_true", help="one small size, to see that it runs")
    options = parser.parse_args(arguments)
    try:
        results = begin(Device(), load(options.out) if options.out.exists() else None)
        threads = results["environment"]["threads"]
        if threads != torch.get_num_threads():
            raise ValueError(f"the file is of {threads} threads, here {torch.get_num_threads()}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Small sizes first: what they leave of their share of the budget goes to the larger ones.
    sizes = (TINY,) if options.tiny else SIZES
    points = [(row, size) for size in sizes for row in ROWS if row.how != "step()"]
    points += [(row, size) for size in STEP_SIZES for row in ROWS if row.how == "step()"]
    points = [p for p in points if re.search(options.rows, f"{p[0].name} {p[1]}")]
    if not shutil.which(os.environ.get("CXX", "g++")):
        compiled = [p for p in points if p[0].how == "compiled"]
        points = [p for p in points if p not in compiled]
        print(f"{len(compiled)} compiled rows left out: there is no C++ compiler")
    gc.collect()
    gc.freeze()  # what lives until the end is not looked through by every collection
    end = time.monotonic() + options.budget
    kept = {(r["row"], *r["size"]): r for r in results.get("cpu", [])}
    for done, (row, size) in enumerate(tqdm(points, unit="row", disable=None, leave=False)):
        share = (end - time.monotonic()) / (len(points) - done)
        kept[(row.name, *size)] = measure(row, size, share)
        results["cpu"] = list(kept.values())
        save(results, options.out)
    print("\n".join(table(results["cpu"])))
    return int(any(r["error"] for r in results["cpu"]))


if __name__ == "__main__":
    sys.exit(main())
