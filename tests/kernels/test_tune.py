"""Tuning: measured once, kept in a file, and obeyed by the plan."""

import logging
import math

import pytest
import torch

from fusedrnn.cells import REGISTRY, get
from fusedrnn.kernels import launch, tune
from fusedrnn.kernels.plan import INTERPRETER, Device, Plan, candidates, plan_scan

H100 = Device((9, 0), 132, 232_448, 233_472)
LSTM = REGISTRY["lstm"]
PASSES = (launch.scan_forward, launch.scan_backward)
SHAPE = {
    "passes": PASSES,
    "H": 512,
    "D": 1,
    "device": torch.device("cpu"),
    "input_precision": "tf32",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned.json"


def times(measure, **changed):
    shape = {**SHAPE, "properties": H100, **changed}
    return tune.step_times(LSTM, "forward", torch.bfloat16, **shape, measure=measure)


def test_every_candidate_is_measured_once():
    seen = []

    def measure(plan: Plan) -> float:
        seen.append(plan)
        return float(len(seen))

    first = times(measure)
    assert seen == candidates(LSTM, "forward", torch.bfloat16, 512, H100, "tf32")
    assert len(seen) > 1
    assert times(measure) == first
    assert len(seen) == len(first)
    times(measure, H=256)
    assert len(seen) > len(first)


@pytest.mark.parametrize("winner", [0, -1])
def test_the_plan_obeys_the_measurement(winner):
    plans = candidates(LSTM, "forward", torch.bfloat16, 512, H100, "tf32")
    measured = dict.fromkeys(plans, 2.0) | {plans[winner]: 0.001}
    chosen = plan_scan(
        LSTM, "forward", torch.bfloat16, B=16, H=512, D=1, device=H100, step_times=measured
    )
    for field in ("schedule", "block_b", "block_h", "block_k", "resident"):
        assert getattr(chosen, field) == getattr(plans[winner], field)


def test_without_times_there_is_no_plan():
    with pytest.raises(ValueError, match="no plan"):
        plan_scan(LSTM, "forward", torch.bfloat16, B=1, H=512, D=1, device=H100, step_times={})


def test_a_broken_file_is_reported_and_replaced(cache, caplog):
    cache.write_text("{ not json")
    with caplog.at_level(logging.WARNING, logger="fusedrnn"):
        first = times(lambda plan: 1.0)
    assert "cannot be read" in caplog.text
    assert times(lambda plan: pytest.fail("measured again")) == first


def test_what_does_not_fit_is_left_out(caplog):
    plans = candidates(LSTM, "forward", torch.bfloat16, 512, H100, "tf32")

    def measure(plan: Plan) -> float:
        if plan == plans[0]:
            raise tune.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    with caplog.at_level(logging.WARNING, logger="fusedrnn"):
        assert set(times(measure)) == set(plans[1:])
    assert "does not fit" in caplog.text


@pytest.mark.parametrize("H", [1500, 2048, 2500])
def test_only_grids_that_fit_are_measured(H):
    """Both directions of one batch tile may be more programs than run at once."""
    seen = []
    times(lambda plan: float(not seen.append(plan)), H=H, D=2)
    found = candidates(LSTM, "forward", torch.bfloat16, H, H100, "tf32")
    at_once = {plan: tune._lanes_at_once(plan, H, 2, H100) for plan in found}
    assert seen == [plan for plan in found if at_once[plan]]
    for plan in seen:
        grid = (plan.programs(H), 1, at_once[plan])
        assert math.prod(grid) <= H100.multiprocessors * plan.programs_per_sm
    assert 1 in at_once.values()  # which two directions at once would have refused


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(
    ("cell", "P", "lanes"),
    [*((cell, 0, 2) for cell in sorted(REGISTRY)), ("lstm", 5, 1), ("gru", 0, 4)],
)
def test_the_measurement_itself_runs(cell, P, lanes, pass_, monkeypatch):
    monkeypatch.setattr(tune, "REPEATS", 1)
    whole, cpu = get(cell, projected=P > 0), torch.device("cpu")
    H, P = whole.units(16), 16 if whole.widest else P
    (plan,) = candidates(whole, pass_, torch.float32, H, INTERPRETER, "ieee", P)
    microseconds = tune._measure(
        PASSES, whole, pass_, torch.float32, H, P, lanes, cpu, INTERPRETER, "ieee", plan, steps=2
    )
    assert microseconds > 0


def test_calls_ask_for_it_by_environment(monkeypatch):
    import fusedrnn

    monkeypatch.setenv("FUSEDRNN_TUNE", "1")
    asked = []
    monkeypatch.setattr(tune, "step_times", lambda cell, pass_, *_, **__: asked.append(pass_))
    rnn = fusedrnn.GRU(3, 4, backend="triton")
    rnn(torch.randn(2, 1, 3))[0].sum().backward()
    assert asked == ["forward", "backward"]
