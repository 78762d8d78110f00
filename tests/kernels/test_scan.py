"""The two time loops against a float64 loop and against torch.nn, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from scan_cases import Case, assert_close, kernels, loop, problem

from fusedrnn.cells import REGISTRY

# One of each kind: a stage, two, a diagonal, means, two states.
CELLS = ["gru", "gru_reset_before", "indrnn_relu", "layer_norm_gru", "lstm"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty and its kin hand out NaN, so that whatever is not written shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poison(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poison)


def check(case: Case) -> None:
    p = problem(case)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    assert_close(case, kernels(case, p), exact, plain)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("cell", [name for name, cell in REGISTRY.items() if not cell.dense])
def test_every_cell(cell, save):
    """(Those with matrices of their own: tests/kernels/test_every_cell.py.)"""
    check(Case(REGISTRY[cell], T=3, B=3, save=save))


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "packed"])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths(cell, save, layout):
    lengths = (4, 4, 3, 1, 1) if layout == "packed" else (2, 4, 1, 3, 4)
    check(Case(REGISTRY[cell], lengths=lengths, layout=layout, save=save))


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "packed"])
@pytest.mark.parametrize(("cell", "save"), [("gru", "gates"), ("lstm", "states")])
def test_one_direction_backwards(cell, save, layout):
    lengths = (4, 4, 3, 1, 1) if layout == "packed" else (2, 4, 1, 3, 4)
    check(Case(REGISTRY[cell], D=1, reverse=True, lengths=lengths, layout=layout, save=save))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(cell, dtype):
    check(Case(REGISTRY[cell], dtype=dtype, T=6))


@pytest.mark.parametrize("H", [1, 300])
@pytest.mark.parametrize("cell", CELLS)
def test_odd_hidden_sizes(cell, H):
    check(Case(REGISTRY[cell], T=2, B=2, H=H, D=1))


@pytest.mark.parametrize(("T", "B", "D"), [(1, 1, 1), (1, 5, 2), (3, 1, 2), (2, 35, 1)])
@pytest.mark.parametrize("cell", CELLS)
def test_odd_time_and_batch(cell, T, B, D):
    check(Case(REGISTRY[cell], T=T, B=B, D=D, H=5))


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "packed"])
def test_no_bias(layout):
    check(Case(REGISTRY["gru"], bias=False, layout=layout, lengths=(4, 3, 3, 2, 1)))


@pytest.mark.parametrize("cell", CELLS)
def test_saturated(cell):
    """Gates far beyond where sigmoid and tanh are 0 and 1."""
    check(Case(REGISTRY[cell], scale=50.0, T=2))


@pytest.mark.parametrize("save", ["gates", "states"])
def test_parameters_have_gradients(save):
    check(Case(REGISTRY["peephole_lstm"], T=3, B=20, lengths=(1, 2, 3, 3) * 5, save=save))


STAGED = {
    "projection": Case(REGISTRY["lstm"], P=5),
    "projection, one unit": Case(REGISTRY["lstm"], H=2, P=1, D=1),
    "projection, fp16": Case(REGISTRY["lstm"], P=12, D=1, dtype=torch.float16),
    "reset before, one unit": Case(REGISTRY["gru_reset_before"], H=1, D=1),
    "lstm, 2 heads": Case(REGISTRY["lstm"], H=18, heads=2),
    "gru, 3 heads of 1": Case(REGISTRY["gru"], H=3, heads=3, D=1),
    "gru, bf16": Case(REGISTRY["gru"], H=16, heads=4, D=1, dtype=torch.bfloat16),
    "means": Case(REGISTRY["layer_norm_gru"], H=11),
    "means, bf16": Case(REGISTRY["layer_norm_gru"], H=16, D=1, dtype=torch.bfloat16),
    "three stages, 2 heads": Case(REGISTRY["layer_norm_lstm"], H=12, heads=2, D=1),
    "reset before, 2 heads": Case(REGISTRY["gru_reset_before"], H=10, heads=2, D=1),
}


@pytest.mark.parametrize(
    ("save", "layout"), [("gates", "time_first"), ("states", "batch_first"), ("gates", "packed")]
)
@pytest.mark.parametrize("name", STAGED)
def test_stages_and_heads(name, save, layout):
    lengths = (4, 4, 3, 1, 1) if layout == "packed" else (2, 4, 1, 3, 4)
    check(replace(STAGED[name], lengths=lengths, save=save, layout=layout))
