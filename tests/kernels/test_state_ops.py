"""Resets, recurrent dropout, zoneout and clipping inside the fused loop, against the reference."""

import pytest
import torch
from scheduler import cooperative
from state_ops_checks import CASES, OPTIONS, assert_as_the_reference, run
from tolerances import GRADIENTS32

from fusedrnn import kernels
from fusedrnn.kernels import launch
from fusedrnn.kernels.plan import Plan


@pytest.mark.parametrize(
    ("module", "option", "batch_first", "rows"),
    # Where the rows lie is nothing to the cell: the LSTM has all layouts, the GRU one.
    [(m, *c) for m in ("LSTM", "GRU") for c in CASES if m == "LSTM" or c[2] == "lengths"],
)
def test_as_the_reference(module, option, batch_first, rows):
    assert_as_the_reference(module, option, batch_first, rows)


STAGED = {
    "projected": (17, "all but zoneout"),
    "reset before": (17, "all"),
    "heads": (18, "all"),
    "means": (18, "all"),
    "indrnn_tanh": (40, "all"),
    "slstm": (9, "all"),
    "alternating": (5, "all"),
    "narrowing": (11, "all"),
}


@pytest.mark.parametrize("module", STAGED)
def test_stages_as_the_reference(module):
    H, option = STAGED[module]
    assert_as_the_reference(module, option, True, "lengths", H=H)


@pytest.mark.parametrize("module", ["alternating", "narrowing"])
def test_packed_stacks_as_the_reference(module):
    assert_as_the_reference(module, "recurrent_dropout", False, "packed", H=11)


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if o not in ("expected_zoneout", "all but zoneout")]
)
def test_the_option_matters(option):
    """What the comparison above would miss if neither backend did anything."""
    with_it = run("GRU", option, "triton", torch.float32, False, "all")
    OPTIONS["nothing"] = {}
    without = run("GRU", "nothing", "triton", torch.float32, False, "all")
    del OPTIONS["nothing"]
    pairs = zip(with_it[: len(without)], without, strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("module", ["LSTM", "GRU", "reset before"])
def test_spread_over_programs(module, monkeypatch):
    """What a program hands on is what the next step reads: already reset, already masked."""
    plan = Plan("multi_block", 16, 8, 16, chunks=2, resident=2, split_k=1, num_warps=1)
    expected = run(module, "all", "triton", torch.float32, True, "lengths")
    for module_of_plans in (kernels, launch):
        monkeypatch.setattr(module_of_plans, "plan_for", lambda *_, **__: plan)
    with cooperative(3):
        spread = run(module, "all", "triton", torch.float32, True, "lengths")
    for ours, other in zip(spread, expected, strict=True):
        torch.testing.assert_close(ours, other, **GRADIENTS32)
