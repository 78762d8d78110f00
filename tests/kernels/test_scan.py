"""The two time loops against a float64 loop and against torch.nn, in the interpreter."""

import pytest
import torch
from scan_cases import Case, assert_close, kernels, loop, problem

from fusedrnn.cells import REGISTRY

CELLS = sorted(REGISTRY)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty and its kin hand out NaN, so that whatever is not written shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poison(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poison)


def check(case: Case, plans=(None, None)) -> None:
    p = problem(case)
    exact, plain = loop(case, p, torch.float64), loop(case, p, case.dtype)
    assert_close(case, kernels(case, p, plans), exact, plain)


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("cell", CELLS)
def test_matches_float64(cell, save):
    check(Case(REGISTRY[cell], save=save))
