import math
from dataclasses import replace

import pytest
import torch

from bench import backends, measure
from bench.backends import Runner
from bench.measure import BrokenDevice, Effort, deviation
from bench.noise import STRETCHES
from bench.shapes import Point, Shape

SHAPE = Shape("lstm", "fp32-exact", 4, 2, 3, 5)
POINT = Point(SHAPE, "headline", ("torch_nn", "auto", "reference"))


@pytest.fixture
def spoil(monkeypatch):
    """spoil(name, change): that backend's results go through `change`."""
    build = backends.build

    def install(name, change):
        def spoiled(wanted, *args):
            runner = build(wanted, *args)
            if wanted != name:
                return runner
            return Runner(lambda i: change(runner.run(i)), runner.names, runner.ran_on)

        monkeypatch.setattr(backends, "build", spoiled)

    return install


def by_backend(rows):
    return {row["backend"]: row for row in rows}


@pytest.mark.parametrize("which", ["forward", "training", "inference"])
def test_a_good_point(gpu, which):
    rows, left_out = measure.measure(POINT, which, gpu, Effort(), floor_seconds=0.001)
    assert not left_out
    rows = by_backend(rows)
    assert list(rows) == ["torch_nn", "auto", "reference"]
    for row in rows.values():
        assert row["error"] is None
        assert row["ms"] <= row["ms_p50"] <= row["ms_p90"]
        assert row["ms_torch_nn"] == rows["torch_nn"]["ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["overhead_us_low"] <= row["overhead_us"] <= row["overhead_us_high"]
        assert row["floor_ms"] == 1.0
        assert row["floor_ratio"] == pytest.approx(row["ms"], rel=1e-3)
        assert row["peak_bytes"] == 1 << 20
        assert row["host_us"] == 50
        assert row["first_call_s"] > 0
        assert row["calls"] == STRETCHES  # the fewest: a call takes 10 ms, the effort is 0.2 s
        assert row["cache"] == "warm"
        assert row["deviation"] <= row["deviation_limit"]
    assert rows["auto"]["ran_on"] == "aten"


@pytest.mark.parametrize("tensor", [0, 2, 3, -1])
def test_a_wrong_result_gets_no_time(gpu, spoil, tensor):
    def change(results):
        wrong = list(results)
        wrong[tensor] = wrong[tensor] * 1.001
        return tuple(wrong)

    spoil("reference", change)
    rows = by_backend(measure.measure(POINT, "training", gpu, Effort())[0])
    assert rows["reference"]["ms"] is None
    assert rows["reference"]["ratio"] is None
    assert rows["reference"]["error"].startswith("wrong: ")
    assert rows["auto"]["ms"] is not None


def test_nan_is_wrong(gpu, spoil):
    spoil("auto", lambda results: (results[0] * math.nan, *results[1:]))
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert "output is off by inf" in rows["auto"]["error"]


def test_another_shape_is_wrong(gpu, spoil):
    spoil("auto", lambda results: (results[0][1:], *results[1:]))
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert "has shape" in rows["auto"]["error"]


def test_without_torch_nn_there_is_a_time_but_no_ratio(gpu, spoil):
    spoil("torch_nn", lambda results: (results[0] + 1, *results[1:]))
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert rows["torch_nn"]["error"]
    assert rows["auto"]["ms"] is not None
    assert rows["auto"]["ratio"] is None


def test_a_failure_becomes_a_row(gpu, spoil):
    def fail(results):
        raise RuntimeError("no such kernel\nand a long story")

    spoil("auto", fail)
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert rows["auto"]["error"] == "RuntimeError: no such kernel"
    assert rows["reference"]["ms"] is not None


def test_out_of_memory_is_not_the_end(gpu):
    gpu.broken = torch.cuda.OutOfMemoryError("tried to allocate")
    rows, _ = measure.measure(POINT, "inference", gpu, Effort())
    assert {row["error"] for row in rows} == {"out of memory"}


def test_a_broken_device_ends_the_run_and_keeps_the_rows(gpu):
    gpu.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(BrokenDevice) as caught:
        measure.measure(POINT, "inference", gpu, Effort())
    assert len(caught.value.rows) == 3
    assert all(row["error"] for row in caught.value.rows)


def test_what_was_timed_before_the_device_broke_has_its_ratio(gpu, monkeypatch):
    asked = []

    def breaks(self, calls):
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 5e-5

    monkeypatch.setattr(type(gpu), "host_seconds", breaks)
    with pytest.raises(BrokenDevice) as caught:
        measure.measure(POINT, "inference", gpu, Effort())
    rows = by_backend(caught.value.rows)
    assert rows["torch_nn"]["ratio"] == 1
    assert rows["auto"]["error"]
    assert rows["auto"]["ratio"] is None
    assert rows["reference"]["ratio"] > 0


def test_what_is_left_out_is_said(gpu):
    point = Point(SHAPE, "headline", ("torch_nn", "haste", "flashrnn", "triton"))
    rows, left_out = measure.measure(point, "inference", gpu, Effort())
    assert [row["backend"] for row in rows] == ["torch_nn"]
    assert set(left_out) == {"haste", "flashrnn", "triton"}


def test_torch_nn_is_always_measured(gpu):
    rows, _ = measure.measure(Point(SHAPE, "grid", ("auto",)), "inference", gpu, Effort())
    assert by_backend(rows)["auto"]["ratio"] is not None


def no_failure(name, failure):
    raise failure


@pytest.mark.parametrize("call", [2, 5, 30])  # while it warms up, is timed, is asked for its host
def test_who_fails_late_does_not_take_the_others_along(gpu, spoil, call, monkeypatch):
    calls = []

    def fail_at_last(results):
        calls.append(1)
        if len(calls) >= call:
            raise RuntimeError("tired")
        return results

    monkeypatch.setattr(
        type(gpu), "host_seconds", lambda self, calls: [c() for c in calls] and 5e-5
    )
    gpu.time_calls = lambda calls: [(c(), gpu.seconds)[1] for c in calls]
    spoil("auto", fail_at_last)
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert rows["auto"]["error"] == "RuntimeError: tired"
    assert rows["auto"]["ms"] is rows["auto"]["ratio"] is None
    for name in ("torch_nn", "reference"):
        assert rows[name]["error"] is None
        assert rows[name]["ratio"] > 0


def test_a_point_is_drawn_and_answered_once(gpu, monkeypatch):
    drawn = []
    problem = measure.Problem
    monkeypatch.setattr(
        measure, "Problem", lambda *a, **k: drawn.append(problem(*a, **k)) or drawn[-1]
    )
    problems = {}
    for which in ("forward", "training", "inference"):
        rows, _ = measure.measure(POINT, which, gpu, Effort(), problems=problems)
        assert not [row["error"] for row in rows if row["error"]]
    assert len(drawn) == 1
    assert "d_input" in drawn[0].answer()
    measure.measure(replace(POINT, passes=("inference",)), "inference", gpu, Effort())
    assert "d_input" not in drawn[1].answer()  # nobody asks for gradients


def test_a_problem_that_does_not_fit_is_an_error_of_its_rows(gpu, monkeypatch):
    def too_large(*_, **__):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(measure, "Problem", too_large)
    rows, _ = measure.measure(POINT, "inference", gpu, Effort())
    assert {row["error"] for row in rows} == {"out of memory"}


def test_a_time_out_is_the_row_s_that_caused_it(gpu, monkeypatch):
    def timed_out(device):
        raise RuntimeError("a wait between the programs timed out")

    from fusedrnn import kernels

    monkeypatch.setattr(kernels, "check", timed_out)
    monkeypatch.setattr(backends, "modules_explain", lambda module, given: "triton")
    rows = by_backend(measure.measure(POINT, "inference", gpu, Effort())[0])
    assert "timed out" in rows["auto"]["error"]
    assert rows["reference"]["ms"] is not None


class Clock:
    """A device whose calls are run, and take what `seconds` says of their name."""

    def __init__(self, **seconds):
        self.seconds, self.order, self.asked = seconds, [], 0

    def runner(self, name):
        return Runner(lambda i: self.order.append((name, i)), ())

    def time_calls(self, calls):
        self.asked += 1
        times = []
        for call in calls:
            before = len(self.order)
            call()
            times.append(sum(self.seconds[name] for name, _ in self.order[before:]))
        return times


def turns(effort, **seconds):
    clock = Clock(**seconds)
    runners = {name: clock.runner(name) for name in seconds}
    samples, calls = measure.take_turns(runners, clock, effort, no_failure)
    return clock, samples, calls


def test_backends_take_turns_call_by_call_in_an_order_drawn_anew():
    clock, samples, calls = turns(Effort(seconds=0.6, sets=3), a=0.01, b=0.01)
    assert {len(s) for s in samples["a"]} == {len(s) for s in samples["b"]} == {3}
    assert len(samples["a"]) == len(samples["b"]) == STRETCHES
    assert calls == {"a": 60, "b": 60}
    timed = clock.order[6:]  # after the warm-up
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert all({first[0], second[0]} == {"a", "b"} for first, second in pairs)
    first = [pair[0][0] for pair in pairs].count("a")
    assert 15 < first < 45  # 4 standard deviations about 30; by turns it would be all or half
    assert len({pair[0][0] for pair in pairs[::2]}) == 2
    assert clock.asked == 2 + STRETCHES  # a stretch goes into a GPU's queue as one


def test_both_sides_of_a_turn_have_the_same_inputs_and_these_rotate():
    clock, _, _ = turns(Effort(seconds=0.6, sets=3), a=0.01, b=0.01)
    timed = clock.order[6:]
    assert [i for _, i in timed[::2]] == [i for _, i in timed[1::2]] == [0, 1, 2] * 20


def test_short_calls_are_timed_together_as_many_of_either_side():
    clock, samples, calls = turns(Effort(seconds=0.01, sets=1), short=3e-5, longer=9e-5)
    assert calls["short"] % 4 == calls["longer"] % 4 == 0  # 4 of 30 us are over 100 us
    assert all(t == pytest.approx(3e-5) for stretch in samples["short"] for t in stretch)
    assert all(t == pytest.approx(9e-5) for stretch in samples["longer"] for t in stretch)
    assert clock.order[2:6] in ([("short", 0)] * 4, [("longer", 0)] * 4)


def test_a_slow_backend_is_called_no_more_than_needed():
    _, samples, calls = turns(Effort(seconds=0.2), slow=10.0, fast=0.001)
    assert calls == {"slow": STRETCHES, "fast": 200}
    assert {len(s) for s in samples["slow"]} == {1}
    assert {len(s) for s in samples["fast"]} == {10}


def test_deviation_is_relative_and_names_the_worst():
    runner = Runner(lambda i: (), ("a", "b"))
    answer = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    results = (torch.tensor([3.0, 4.5]), torch.tensor([101.0]))
    error, where = deviation(runner, results, {k: v.double() for k, v in answer.items()})
    assert where == "a"
    assert error == pytest.approx(0.1)


def test_limits_of_the_gate():
    assert measure.limit("bf16", None) == measure.ABSOLUTE["bf16"]
    assert measure.limit("bf16", 0.02) == 0.04
    assert measure.limit("bf16", 0.0) == measure.FLOOR["bf16"]
