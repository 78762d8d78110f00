"""README.md says only what is so: its table is what dispatch does, and its code runs.

The code of CONTRIBUTING.md runs too.
"""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from bodies import assert_backward_is_the_derivative_of_forward
from calls import call_of

import fusedrnn
from bench import report
from fusedrnn import cells, dispatch
from fusedrnn.__main__ import table_of_cells
from fusedrnn.call import LOOP_FEATURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGES, re.MULTILINE | re.DOTALL)

# Row of the table -> how it differs from a plain call.
ROWS = {
    "tensors on a CUDA device": [{}],
    "tensors on the CPU": [{"device": "cpu"}],
    "`LSTM`, `GRU`, `RNN`": [{"cell": name} for name, cell in cells.REGISTRY.items() if cell.aten],
    "their relatives, and your own cells": [
        {"cell": name} for name, cell in cells.REGISTRY.items() if not cell.aten
    ],
    "float32, bfloat16, float16": [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    "float64": [{"dtype": torch.float64}],
    "several layers, both directions": [{"num_layers": 2, "bidirectional": True}],
    "`direction=`, `residual=`, layers of several sizes": [
        {"reversed_layers": 1},
        {"residual": True},
        {"num_layers": 2, "hidden_sizes": (4, 3)},
    ],
    "`proj_size`": [{"proj_size": 4}],
    "`num_heads`": [{"num_heads": 2}],
    "`PackedSequence`": [{"packed": True}],
    "`lengths=` of padded input, on any device": [{"lengths": True}],
    "`torch.func` transforms, forward-mode AD": [{"transformed": True}],
    **{what: [{"loop_features": (name,)}] for name, what in LOOP_FEATURES.items()},
}


def table() -> dict[str, list[str]]:
    section = README.split("## What works where")[1].split("## ")[0]
    lines = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line] for line in lines]
    head, body = rows[0], rows[1:]
    assert head == [f"`{name}`" for name in dispatch.BACKENDS]
    return {label: cells for label, *cells in body}


def test_table_has_a_row_for_everything():
    assert sorted(table()) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_table_is_what_dispatch_does(row, monkeypatch, imaginary_gpu):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, said in zip(dispatch.BACKENDS, table()[row], strict=True):
        elsewhere = backend == "loop" and row != "tensors on a CUDA device"
        plain = {"device": "cpu" if elsewhere else "cuda", "needs_grad": True}
        refusals = [
            dispatch.REFUSES[backend](call_of(**{**plain, **changed})) for changed in ROWS[row]
        ]
        if said.split()[0] == "yes":
            assert refusals == [None] * len(refusals)
        else:
            assert said.split()[0] == "no"
            assert all(refusals)


def test_the_table_of_cells():
    begin, end = "<!-- cells: generated -->", "<!-- cells: end -->"
    assert README.split(begin)[1].split(end)[0].strip() == table_of_cells()


@pytest.mark.parametrize("cell", cells.REGISTRY.values(), ids=lambda cell: cell.name)
def test_every_cell_has_a_module(cell):
    name, _, argument = cell.module.rstrip(")").partition("(")
    option = dict([argument.split("=")]) if argument else {}
    module = getattr(fusedrnn, name)(4, 6, 2, **{k: eval(v) for k, v in option.items()})
    assert module.mode == cell.name.upper()
    assert cell.source in table_of_cells()
    assert all(part in type(module).__doc__ for part in ("Source:", "weight_ih_l[k]", ">>> rnn ="))
    output, _ = module(torch.randn(3, 2, 4))
    assert output.shape == (3, 2, 6)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, monkeypatch, tmp_path):
    if 'backend="triton"' in SNIPPETS[number]:  # interpreted, whatever imported Triton before
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-c", SNIPPETS[number]], env=environment, check=True)
        return
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    module = types.ModuleType(f"snippet_{number}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = dict(cells.REGISTRY)
    try:
        exec(compile(SNIPPETS[number], module.__name__, "exec"), vars(module))
        for cell in cells.REGISTRY.values():
            if cell.name not in before:
                assert_backward_is_the_derivative_of_forward(cell, 1.0)
    finally:
        cells.REGISTRY.clear()
        cells.REGISTRY.update(before)


def test_every_path_exists():
    names = re.findall(r"`((?:fusedrnn|kernels|tests|bench|examples)/[\w./]*)`", README)
    assert names
    # git keeps no empty folder, so a results folder without results need not be there.
    missing = [name for name in names if not (ROOT / name).exists()]
    assert missing in ([], ["bench/results/"])


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+) ", README)) | set(
        re.findall(r"`make ([a-z-]+)[ `]", README)
    )
    assert {"demo", "test", "gpu-test"} <= named <= set(targets)


def test_no_gpu_figure_without_a_measurement():
    """Between the marks stands what the committed results give, and nowhere else is a speed."""
    begin, rest = README.split(report.BEGIN)
    generated, end = rest.split(report.END)
    assert generated.strip() == report.readme_figures(ROOT / "bench" / "results").strip()
    assert not re.search(r"\d ?(x|times|-fold) (as )?(fast|slow|less|more)", begin + end)
