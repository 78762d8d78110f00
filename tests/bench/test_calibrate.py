"""The calibration without a GPU: a device whose clock is arithmetic, and a meter that is a sum."""

import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import calibrate, report, results
from bench import limits as limits_module
from bench.device import ROOT, Device
from bench.shapes import DTYPES, Shape
from fusedrnn import cells

H200 = ((9, 0), 132, 232_448, 233_472)


@dataclass(frozen=True)
class Range:
    low: float
    middle: float
    high: float
    source: str = "table"


@dataclass(frozen=True)
class Parameters:
    """As bench.step_cost.parameters has them, as far as they are needed here."""

    poll_phase: Range = Range(100, 120, 250)
    l2_load: Range = Range(250, 300, 400)
    store_visible: Range = Range(140, 180, 260)
    clock_ghz: Range = Range(1.7, 1.7, 1.7)


def meter(row, parameters, level="middle"):
    """Microseconds: the work, and the exchange where there is one, with many polls."""
    at = lambda name: getattr(getattr(parameters, name), level)  # noqa: E731
    clocks = row["H"] * 2.0
    if row["H"] > 128:
        polls = 10 if row["pass"] == "backward" else 5
        clocks += polls * at("poll_phase") + 3 * at("l2_load") + at("store_visible")
    return clocks / at("clock_ghz") / 1e3


def predict(rows, parameters):
    return [tuple(meter(row, parameters, n) for n in ("middle", "low", "high")) for row in rows]


def rows_with(parameters, noise=lambda n: 1.0):
    """Every shape, measured on a GPU that is the meter with these parameters."""
    rows = []
    for n, (s, which) in enumerate(itertools.product(calibrate.SHAPES, calibrate.PASSES)):
        row = {**s.fields(), "pass": which}
        row["measured_us"] = noise(n) * meter(row, parameters)
        rows.append({**row, "error": None})
    return rows


def always():
    return True


class Clock(Device):
    """Takes as long as the call says."""

    name = "Fake GPU"

    def time_calls(self, calls):
        return [call() for call in calls]


def loop(shape, which, device, steps):
    """20 us for a launch, and 2 us (3 backward) a step."""
    each = {"forward": 2e-6, "backward": 3e-6}[which]
    return lambda: 2e-5 + each * steps


def test_the_shapes_are_a_spread():
    """Every schedule in both passes, every dtype and cell; no shape is cut into launches."""
    from fusedrnn.kernels.plan import Device as Gpu
    from fusedrnn.kernels.plan import plan_scan

    assert len({s.key for s in calibrate.SHAPES}) == 20
    assert {s.dtype for s in calibrate.SHAPES} == set(DTYPES)
    assert {s.cell for s in calibrate.SHAPES} == {"lstm", "gru", "rnn_tanh"}
    schedules = set()
    for s in calibrate.SHAPES:
        for which in calibrate.PASSES:
            plan = plan_scan(
                cells.get(s.cell), which, calibrate.TORCH_DTYPES[s.dtype], B=s.B, H=s.H, D=1,
                device=Gpu(*H200), input_precision=s.precision[1],
            )  # fmt: skip
            schedules.add((which, plan.schedule))
            assert plan.batch_per_launch is None or plan.batch_per_launch >= s.B, s.key
    assert len(schedules) == 2 * 2


def test_launches_cancel():
    shape = calibrate.SHAPES[0]
    assert calibrate.measured_us(shape, "forward", Clock(), loop) == pytest.approx(2.0)
    assert calibrate.measured_us(shape, "backward", Clock(), loop) == pytest.approx(3.0)


def test_what_compiles_does_not_cost_repeats():
    calls = []

    def compiling(shape, which, device, steps):
        times = itertools.chain([10.0], itertools.repeat(1e-6 * steps))
        return lambda: calls.append(steps) or next(times)

    assert calibrate.measured_us(calibrate.SHAPES[0], "forward", Clock(), compiling) == (
        pytest.approx(1.0)
    )
    assert calls.count(calibrate.STEPS) > 20


def test_noise_is_no_measurement():
    with pytest.raises(ValueError, match=r"800 steps took 1 s, 400 steps 1 s"):
        calibrate.measured_us(calibrate.SHAPES[0], "forward", Clock(), lambda *_: lambda: 1.0)


def test_what_cannot_be_measured_is_named():
    def failing(shape, which, device, steps):
        if shape.H == 512 and which == "forward":
            raise RuntimeError("no plan\nfor it")
        return loop(shape, which, device, steps)

    few = [s for s in calibrate.SHAPES if s.cell == "gru"]
    found = calibrate.measure(few, Clock(), always, failing)
    assert [(r["H"], r["pass"]) for r in found] == [
        (s.H, which) for s in few for which in calibrate.PASSES
    ]
    for row in found:
        broken = row["H"] == 512 and row["pass"] == "forward"
        assert (row["measured_us"] is None) == broken
        assert row["error"] == ("not measured: RuntimeError: no plan" if broken else None)


def test_a_broken_device_keeps_what_there_is():
    def breaking(shape, which, device, steps):
        if which == "backward":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return loop(shape, which, device, steps)

    found = calibrate.measure(calibrate.SHAPES[:2], Clock(), always, breaking)
    assert [bool(r["measured_us"]) for r in found] == [True, False, False, False]
    assert "the device failed before: RuntimeError: CUDA error" in found[2]["error"]


def test_the_budget_ends_the_measuring():
    left = itertools.chain([True] * 3, itertools.repeat(False))
    found = calibrate.measure(calibrate.SHAPES[:3], Clock(), lambda: next(left), loop)
    assert [bool(r["measured_us"]) for r in found] == [True] * 3 + [False] * 3
    assert found[-1]["error"] == "not measured: the budget was spent"


@pytest.mark.parametrize("which", calibrate.PASSES)
def test_the_time_loop_runs_with_the_kernels_interpreted(which, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for cell in ("lstm", "gru", "rnn_tanh"):
        call = calibrate.time_loop(Shape(cell, "fp32-exact", 1, 3, 8, 8), which, "cpu", 5)
        first = call()[0]
        assert first.shape[0] == 5 * 3
        assert torch.isfinite(first).all()
        assert first.abs().max() > 0


def test_equal_values_share_their_rank():
    assert list(calibrate.ranks([3.0, 1.0, 3.0, 2.0])) == [3.5, 1.0, 3.5, 2.0]


def test_rank_correlation_by_hand():
    assert calibrate.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert calibrate.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: sums of products 4.5 of 4.5 and 5.
    tied = calibrate.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4])
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert calibrate.rank_correlation([1, 1], [1, 2]) is None


def test_the_error_is_a_factor():
    rows = [
        {"measured_us": 1.0, "predicted_us": 2.0}, {"measured_us": 8.0, "predicted_us": 4.0},
        {"measured_us": None, "predicted_us": 4.0},
    ]  # fmt: skip
    assert calibrate.judge(rows) == {
        "off_by": pytest.approx(2.0),
        "rank_correlation": pytest.approx(1.0),
    }
    assert calibrate.judge(rows[2:]) == {"off_by": None, "rank_correlation": None}


def test_a_refit_finds_other_parameters():
    true = calibrate.with_values(
        Parameters(), {"poll_phase": 220.0, "l2_load": 330.0, "store_visible": 150.0}, "true"
    )
    rows = calibrate.predictions(rows_with(true), predict, Parameters())
    before = calibrate.judge(rows)["off_by"]
    found = calibrate.refit(rows, predict, Parameters(), always)
    # Three parameters that times are sums of: all but what the last step was too small for.
    assert found["off_by"] < 1 + 0.01 * (before - 1)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["parameters"]["poll_phase"] == pytest.approx(220, rel=0.01)
    # Their sum is in every row alike, and is all that the times can tell of these two.
    both = 3 * found["parameters"]["l2_load"] + found["parameters"]["store_visible"]
    assert both == pytest.approx(3 * 330 + 150, rel=0.01)
    assert set(found["parameters"]) == set(calibrate.REFITTED)


def test_a_refit_stays_near_what_is_plausible():
    rows = calibrate.predictions(rows_with(Parameters(), lambda n: 50.0), predict, Parameters())
    found = calibrate.refit(rows, predict, Parameters(), always)
    assert found["parameters"] == pytest.approx(
        {"poll_phase": 500, "l2_load": 800, "store_visible": 520}
    )


def test_nothing_is_refitted_where_nothing_is_better():
    exact = calibrate.predictions(rows_with(Parameters()), predict, Parameters())
    assert calibrate.refit(exact, predict, Parameters(), always) is None
    assert calibrate.refit([], predict, Parameters(), always) is None
    off = calibrate.predictions(rows_with(Parameters(), lambda n: 2.0), predict, Parameters())
    assert calibrate.refit(off, predict, Parameters(), lambda: False) is None

    def narrow(rows, parameters):
        fine = parameters.poll_phase.middle == pytest.approx(120)
        return predict(rows, parameters) if fine else ["no way out"] * len(rows)

    with pytest.raises(ValueError, match=r"fails with \{.*'poll_phase': 13.*no way out"):
        calibrate.refit(off, narrow, Parameters(), always)


@pytest.fixture
def content():
    return results.begin(Clock())


def test_a_calibration_starts_from_the_measured_clocks(content, limits):
    true = calibrate.with_values(Parameters(), {"poll_phase": 180.0}, "true")
    measured = rows_with(true)
    without = calibrate.calibrate(content, measured, predict, Parameters(), always)
    assert without["calibration"]["off_by"] > 1.05
    content["limits"] = replace(limits, clocks={"poll_phase": 180.0}).as_dict()
    found = calibrate.calibrate(content, measured, predict, Parameters(), always)
    assert found["calibration"]["off_by"] == pytest.approx(1.0)
    assert found["calibration"]["refit"] is None
    assert all(r["low_us"] <= r["predicted_us"] for r in found["calibration"]["rows"])


def test_measured_times_are_saved_before_anything_is_predicted(content):
    saved = []

    def broken(rows, parameters):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(
            content, rows_with(Parameters()), broken, Parameters(), always, saved.append
        )
    assert len(saved[0]["calibration"]["rows"]) == 40
    assert all(r["measured_us"] and not r["predicted_us"] for r in saved[0]["calibration"]["rows"])


def test_a_failed_prediction_is_named(content):
    def some(rows, parameters):
        unknown = lambda row: row["H"] == 2048 and row["pass"] == "forward"  # noqa: E731
        return [
            "not predicted: ValueError: no plan" if unknown(row) else answer
            for row, answer in zip(rows, predict(rows, parameters), strict=True)
        ]

    found = calibrate.calibrate(content, rows_with(Parameters()), some, Parameters(), always)
    (row,) = [r for r in found["calibration"]["rows"] if r["error"]]
    assert (row["H"], row["error"]) == (2048, "not predicted: ValueError: no plan")
    assert row["measured_us"]
    assert row["predicted_us"] is None
    assert found["calibration"]["off_by"] == pytest.approx(1.0)


@pytest.fixture
def step_cost(monkeypatch):
    """Stands for the meter, with the arguments that it takes."""
    asked = []

    def read(cell, dtype, H, B, which, *, precision="tf32", target="sm_90", parameters=None):
        asked.append((cell, dtype, H, B, which, precision, target))
        row = {"H": H, "pass": which}
        middle, low, high = (meter(row, parameters, n) for n in ("middle", "low", "high"))
        return SimpleNamespace(predicted_us=middle, low_us=low, high_us=high)

    package = ModuleType("bench.step_cost")
    package.parameters = SimpleNamespace(load=lambda capability: Parameters())
    module = ModuleType("bench.step_cost.read")
    module.predict = read
    monkeypatch.setitem(sys.modules, "bench.step_cost", package)
    monkeypatch.setitem(sys.modules, "bench.step_cost.read", module)
    monkeypatch.setattr(calibrate, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    return asked


def test_again_from_a_file_without_a_gpu(step_cost, content, tmp_path, capsys):
    true = calibrate.with_values(Parameters(), {"poll_phase": 220.0}, "true")
    measured = rows_with(true)
    measured[3] |= {"measured_us": None, "error": "not measured: it was too late"}
    measured[4]["error"] = "not predicted: of the last time"
    content["calibration"] = {"rows": measured}
    content["environment"]["capability"] = "sm_90"
    path = tmp_path / "limits.json"
    results.save(content, path)
    assert calibrate.main(["--out", str(path), "--again"]) == 0
    found = results.load(path)["calibration"]
    assert [r["measured_us"] for r in found["rows"]] == [r["measured_us"] for r in measured]
    assert [r["error"] for r in found["rows"]] == [
        "not measured: it was too late" if n == 3 else None for n in range(40)
    ]
    assert found["refit"]["off_by"] < found["off_by"]
    assert ("lstm", "fp32", 256, 32, "forward", "ieee", "sm_90") in step_cost
    assert ("gru", "bf16", 512, 64, "backward", "tf32", "sm_90") in step_cost
    shown = capsys.readouterr().out
    assert "39 time loops, predicted over measured: off by a factor of" in shown
    assert "Refitted to these times: store_visible" in shown


def test_again_needs_a_calibration(step_cost, content, tmp_path, capsys):
    path = tmp_path / "limits.json"
    for _ in range(2):
        with pytest.raises(SystemExit):
            calibrate.main(["--out", str(path), "--again"])
        assert f"--again: {path} has no calibration" in capsys.readouterr().err
        results.save(content, path)


def test_a_file_of_another_machine_is_refused(content):
    assert results.begin(Clock(), content) is content
    other = {**content, "environment": {**content["environment"], "device": "Another"}}
    with pytest.raises(ValueError, match="another device: Another, here"):
        results.begin(Clock(), other)


def test_limits_go_into_a_file_that_a_calibration_extends(limits, tmp_path, monkeypatch):
    path = tmp_path / "limits.json"
    with_clocks = replace(limits, clocks={"poll_phase": 140.0})
    monkeypatch.setattr(limits_module, "pick_device", Clock)
    monkeypatch.setattr(limits_module, "measure_limits", lambda device, show: with_clocks)
    assert limits_module.main(["--out", str(path)]) == 0
    found = results.load(path)
    assert found["rows"] == []
    assert found["limits"]["clocks"] == {"poll_phase": 140.0}
    results.save({**found, "calibration": {"rows": []}}, path)
    assert limits_module.main(["--out", str(path)]) == 0
    assert results.load(path)["calibration"] == {"rows": []}


def gpu_file(folder, name, **parts):
    content = results.begin(Clock())
    content["environment"] |= {"kind": "cuda", "device": "Some GPU", "date": name}
    results.save({**content, **parts}, folder / "some-gpu" / f"{name}.json")


def test_the_report_has_the_table(content, limits, tmp_path):
    true = calibrate.with_values(Parameters(), {"poll_phase": 220.0}, "true")
    measured = rows_with(true, lambda n: 0.2 if n == 0 else 1.0)
    measured[1] |= {"measured_us": None, "error": "not measured: out of memory"}
    found = calibrate.calibrate(content, measured, predict, Parameters(), always)["calibration"]
    gpu_file(tmp_path, "2026-01-02", calibration=found,
             limits=replace(limits, clocks={"poll_phase": 140.0}).as_dict())  # fmt: skip
    gpu_file(tmp_path, "2026-01-03")
    text, _ = report.build(tmp_path)
    part = text.split("### Predicted and measured time of a step")[1]
    ratios = [float(line.split("|")[-2]) for line in part.splitlines() if line.startswith("| lstm")
              or line.startswith("| gru") or line.startswith("| rnn")]  # fmt: skip
    assert len(ratios) == 39
    first = found["rows"][0]
    assert ratios[0] == pytest.approx(first["predicted_us"] / first["measured_us"], abs=0.005)
    assert f"rank correlation {found['rank_correlation']:.2f}" in part
    assert f"factor of {found['off_by']:.2f}" in part
    assert "Refitted to these times: store_visible" in part
    assert "- lstm fp16 B=16 H=768, backward: not measured: out of memory" in part
    assert "poll_phase 140" in text
    # No time of a module is in these files.
    assert "not measured yet" in text
    assert "Against torch.nn" not in text
    assert report.readme_figures(tmp_path) == report.NOT_MEASURED


def test_the_report_shows_nothing_without_one(tmp_path):
    gpu_file(tmp_path, "2026-01-03")
    assert "Predicted" not in report.build(tmp_path)[0]


def test_the_first_run_keeps_to_ten_minutes_and_calibrates_what_it_measured():
    script = (ROOT / "bench" / "first_run.sh").read_text()
    verify = re.sub(r"(?s)if \[\[ \$what == measure.*?\nfi\n", "", script)
    steps = dict(re.findall(r"^ *step (\S+) (\d+) ", verify, re.M))
    assert {"install", "selfcheck", "layers", "launches", "limits", "calibrate"} <= set(steps)
    assert sum(map(int, steps.values())) < 600
    assert list(steps).index("limits") < list(steps).index("calibrate")
    files = re.findall(r'-m bench\.(?:limits|calibrate) .*--out "(\S+)"', verify)
    assert len(files) == 2
    assert len(set(files)) == 1
    (budget,) = re.findall(r"bench\.calibrate --budget (\d+)", verify)
    assert int(budget) < int(steps["calibrate"])
