import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import backends, overhead, run, shapes
from bench.backends import Runner
from bench.run import BrokenDevice, deviation, measure
from bench.shapes import Point, Shape
from bench.timing import ROOT, STRETCHES, Effort

POINTS = [
    Point(Shape("lstm", "fp32-exact", 3, 2, 4, 4 + n), "grid", ("torch_nn", "auto"), ("inference",))
    for n in range(6)
]
QUICK = Effort(seconds=0.02)


def quiet(line):
    pass


def go(points, gpu, path, budget=1e9, **options):
    return run.run(points, gpu, path=path, budget=budget, now=gpu.now, show=quiet, **options)


def test_the_whole_plan_end_to_end(gpu, tmp_path):
    """Every kind of point, every backend that a CPU can run, the report on what came out."""
    from bench import report

    plan = shapes.tiny_plan()
    path = tmp_path / "fake-gpu" / "20260102-0123456789.json"
    done = go(plan, gpu, path, effort=QUICK)
    assert done["stopped"] == ""
    assert done["points"] == {"planned": len(plan), "measured": len(plan)}
    loaded = run.load(path)
    assert not [row["error"] for row in loaded["rows"] if row["error"]]
    ran = {row["backend"] for row in loaded["rows"]}
    assert {"torch_nn", "torch_nn_graph", "auto", "reference", "reference_graph",
            "reference_compile"} <= ran  # fmt: skip
    text, _ = report.build(tmp_path)
    assert "## Fake GPU" in text
    assert "not measured yet" not in text
    assert "Fake GPU" in report.readme_figures(tmp_path)


def test_the_budget_ends_a_run_and_leaves_a_good_file(gpu, tmp_path):
    gpu.seconds = 0.1
    done = go(POINTS, gpu, tmp_path / "r.json", budget=20, effort=QUICK)
    assert done["stopped"] == "the budget was spent"
    assert 0 < done["points"]["measured"] < len(POINTS)
    assert run.load(tmp_path / "r.json") == json.loads(json.dumps(done))
    assert gpu.now() <= 20


def test_one_long_point_does_not_end_the_run_early(gpu, tmp_path):
    def first_is_long(points):
        for n, point in enumerate(points):
            gpu.seconds = 2.0 if n == 0 else 0.06
            yield point

    many = [replace(POINTS[0], shape=replace(POINTS[0].shape, H=4 + n)) for n in range(60)]
    done = go(many, gpu, tmp_path / "r.json", budget=450, effort=QUICK, progress=first_is_long)
    assert done["points"]["measured"] == len(many)
    assert gpu.now() < 450


def test_resume_goes_on_where_it_stopped(gpu, tmp_path):
    gpu.seconds = 0.1
    first = go(POINTS, gpu, tmp_path / "r.json", budget=20, effort=QUICK)
    before = run.load(tmp_path / "r.json")
    second = go(POINTS, gpu, tmp_path / "r.json", effort=QUICK, before=before)
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert len(second["rows"]) == 2 * len(POINTS)
    assert len({run.row_key(row) for row in second["rows"]}) == 2 * len(POINTS)


def test_resume_refuses_another_commit(gpu, tmp_path):
    before = go(POINTS[:1], gpu, tmp_path / "r.json", effort=QUICK)
    before["environment"]["commit"] = "fedcba9876"
    with pytest.raises(ValueError, match="another commit"):
        go(POINTS, gpu, tmp_path / "r.json", before=before)


def test_an_interruption_keeps_what_there_is(gpu, tmp_path):
    def interrupted(points):
        yield from points[:2]
        raise KeyboardInterrupt

    done = go(POINTS, gpu, tmp_path / "r.json", effort=QUICK, progress=interrupted)
    assert done["stopped"] == "interrupted"
    assert len(run.load(tmp_path / "r.json")["rows"]) == 4


def test_a_broken_device_keeps_what_there_is(gpu, tmp_path):
    def breaking(points):
        yield points[0]
        gpu.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
        yield points[1]

    done = go(POINTS, gpu, tmp_path / "r.json", effort=QUICK, progress=breaking)
    assert done["stopped"].startswith("the device failed")
    rows = run.load(tmp_path / "r.json")["rows"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]


def test_the_file_is_good_while_it_is_written(gpu, tmp_path):
    """Saved every few seconds of the run's clock, so a kill loses little."""
    gpu.seconds = 3.0
    path = tmp_path / "r.json"
    seen = []

    def watching(points):
        for point in points:
            if path.exists():
                seen.append(run.load(path))
            yield point

    go(POINTS, gpu, path, effort=QUICK, progress=watching)
    assert len(seen) == len(POINTS) - 1
    assert seen[0]["stopped"] == "not finished"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_is_checked(gpu, tmp_path):
    path = tmp_path / "r.json"
    good = go(POINTS[:1], gpu, path, effort=QUICK)
    row = good["rows"][0]
    for bad, told in (
        ({**good, "schema": 1}, "schema 2, got 1"), ({**good, "rows": [{"cell": "lstm"}]}, "lacks"),
        ({**good, "rows": [{**row, "ms": None}]}, "needs a time or an error"),
        ({**good, "rows": [{**row, "error": "x"}]}, "needs a time or an error"),
    ):  # fmt: skip
        run.save(bad, path)
        with pytest.raises(ValueError, match=told):
            run.load(path)
    path.write_text('{"schema": 1, "rows": [')
    with pytest.raises(ValueError, match="not a results file"):
        run.load(path)


def test_newer_rows_replace_older_ones_as_a_whole(gpu, tmp_path):
    old = go(POINTS[:2], gpu, tmp_path / "a.json", effort=QUICK)
    new = go(POINTS[:1], gpu, tmp_path / "b.json", effort=QUICK)
    merged = run.newest_rows([old, new])
    assert merged[:2] == new["rows"]
    assert merged[2:] == old["rows"][2:]


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


@pytest.mark.parametrize("pass_", ["forward", "training", "inference"])
def test_a_good_point(gpu, pass_):
    rows, left_out = measure(POINT, pass_, gpu, Effort(), {})
    assert not left_out
    rows = by_backend(rows)
    assert list(rows) == ["torch_nn", "auto", "reference"]
    for row in rows.values():
        assert row["error"] is None
        assert row["ms"] <= row["ms_p50"] <= row["ms_p90"]
        assert row["ms_torch_nn"] == rows["torch_nn"]["ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["overhead_us_low"] <= row["overhead_us"] <= row["overhead_us_high"]
        assert row["peak_bytes"] == 1 << 20
        assert row["host_us"] == 50
        assert row["first_call_s"] > 0
        assert row["calls"] == STRETCHES  # the fewest: a call takes 10 ms, the effort is 0.2 s
        assert row["deviation"] <= row["deviation_limit"]
    assert rows["auto"]["ran_on"] == "aten"


@pytest.mark.parametrize("tensor", [0, 2, 3, -1])
def test_a_wrong_result_gets_no_time(gpu, spoil, tensor):
    def change(results):
        wrong = list(results)
        wrong[tensor] = wrong[tensor] * 1.001
        return tuple(wrong)

    spoil("reference", change)
    rows = by_backend(measure(POINT, "training", gpu, Effort(), {})[0])
    assert rows["reference"]["ms"] is None
    assert rows["reference"]["ratio"] is None
    assert rows["reference"]["error"].startswith("wrong: ")
    assert rows["auto"]["ms"] is not None


def test_nan_is_wrong(gpu, spoil):
    spoil("auto", lambda results: (results[0] * math.nan, *results[1:]))
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert "output is off by inf" in rows["auto"]["error"]


def test_another_shape_is_wrong(gpu, spoil):
    spoil("auto", lambda results: (results[0][1:], *results[1:]))
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert "has shape" in rows["auto"]["error"]


def test_without_torch_nn_there_is_a_time_but_no_ratio(gpu, spoil):
    spoil("torch_nn", lambda results: (results[0] + 1, *results[1:]))
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert rows["torch_nn"]["error"]
    assert rows["auto"]["ms"] is not None
    assert rows["auto"]["ratio"] is None


def test_a_failure_becomes_a_row(gpu, spoil):
    def fail(results):
        raise RuntimeError("no such kernel\nand a long story")

    spoil("auto", fail)
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert rows["auto"]["error"] == "RuntimeError: no such kernel"
    assert rows["reference"]["ms"] is not None


def test_out_of_memory_is_not_the_end(gpu):
    gpu.broken = torch.cuda.OutOfMemoryError("tried to allocate")
    rows, _ = measure(POINT, "inference", gpu, Effort(), {})
    assert {row["error"] for row in rows} == {"out of memory"}


def test_a_broken_device_ends_the_run_and_keeps_the_rows(gpu):
    gpu.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(BrokenDevice) as caught:
        measure(POINT, "inference", gpu, Effort(), {})
    assert len(caught.value.args[1]) == 3
    assert all(row["error"] for row in caught.value.args[1])


def test_what_is_left_out_is_said(gpu):
    point = Point(SHAPE, "headline", ("torch_nn", "haste", "flashrnn", "triton"))
    rows, left_out = measure(point, "inference", gpu, Effort(), {})
    assert [row["backend"] for row in rows] == ["torch_nn"]
    assert set(left_out) == {"haste", "flashrnn", "triton"}


def test_torch_nn_is_always_measured(gpu):
    rows, _ = measure(Point(SHAPE, "grid", ("auto",)), "inference", gpu, Effort(), {})
    assert by_backend(rows)["auto"]["ratio"] is not None


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
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert rows["auto"]["error"] == "RuntimeError: tired"
    assert rows["auto"]["ms"] is rows["auto"]["ratio"] is None
    for name in ("torch_nn", "reference"):
        assert rows[name]["error"] is None
        assert rows[name]["ratio"] > 0


def test_a_point_is_drawn_and_answered_once(gpu, monkeypatch):
    drawn = []
    problem = run.Problem
    monkeypatch.setattr(run, "Problem", lambda *a, **k: drawn.append(problem(*a, **k)) or drawn[-1])
    problems = {}
    for pass_ in ("forward", "training", "inference"):
        rows, _ = measure(POINT, pass_, gpu, Effort(), problems)
        assert not [row["error"] for row in rows if row["error"]]
    assert len(drawn) == 1
    assert "d_input" in drawn[0].answer()
    measure(replace(POINT, passes=("inference",)), "inference", gpu, Effort(), {})
    assert "d_input" not in drawn[1].answer()  # nobody asks for gradients


def test_a_problem_that_does_not_fit_is_an_error_of_its_rows(gpu, monkeypatch):
    def too_large(*_, **__):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(run, "Problem", too_large)
    rows, _ = measure(POINT, "inference", gpu, Effort(), {})
    assert {row["error"] for row in rows} == {"out of memory"}


def test_a_time_out_is_the_row_s_that_caused_it(gpu, monkeypatch):
    def timed_out(device):
        raise RuntimeError("a wait between the programs timed out")

    from fusedrnn import kernels

    monkeypatch.setattr(kernels, "check", timed_out)
    monkeypatch.setattr(backends, "explain", lambda *a, **k: SimpleNamespace(backend="triton"))
    rows = by_backend(measure(POINT, "inference", gpu, Effort(), {})[0])
    assert "timed out" in rows["auto"]["error"]
    assert rows["reference"]["ms"] is not None


def test_deviation_is_relative_and_names_the_worst():
    runner = Runner(lambda i: (), ("a", "b"))
    answer = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    results = (torch.tensor([3.0, 4.5]), torch.tensor([101.0]))
    error, where = deviation(runner, results, {k: v.double() for k, v in answer.items()})
    assert where == "a"
    assert error == pytest.approx(0.1)


def test_limits_of_the_gate():
    assert run.limit("bf16", None) == run.ABSOLUTE["bf16"]
    assert run.limit("bf16", 0.02) == 0.04
    assert run.limit("bf16", 0.0) == run.FLOOR["bf16"]


BASE = Shape("lstm", "bf16", 256, 16, 512, 512)


def test_one_first_call_for_what_has_the_same_kernels():
    def of(*found, backends=shapes.TWO):
        return run.first_calls([Point(s, "grid", backends, ("training",)) for s in found])

    assert len(of(BASE, replace(BASE, T=64), replace(BASE, I=64), replace(BASE, layers=4))) == 1
    for change in ({"cell": "gru"}, {"dtype": "fp16"}, {"H": 256}, {"bidirectional": True},
                   {"lengths": "text"}, {"resets": True}, {"B": 256}):  # fmt: skip
        assert len(of(BASE, replace(BASE, **change))) == 2, change
    assert of(BASE, backends=shapes.CLOSE)[0].backends == ("triton", "triton_states")
    assert of(BASE, backends=("torch_nn",)) == []
    assert len(run.first_calls(shapes.gpu_plan(), 30)) == 30


def test_a_first_call_says_what_went_wrong():
    point = Point(Shape("gru", "fp32-exact", 2, 3, 4, 8), "grid", ("aten", "haste"))
    assert run.first_call(point, "cpu") == ""
    assert "device must be" in run.first_call(point, "tpu")


def failing(item: int) -> str:
    return "odd" if item % 2 else ""


def test_processes(capsys):
    found = run.ahead(failing, [1, 2, 3, 4], seconds=60)
    assert (found["done"], found["planned"]) == (2, 4)
    assert capsys.readouterr().out.count("compiling ahead: odd") == 2


def test_host_time_is_that_of_calls_without_kernels(tmp_path):
    """In a process of its own: the kernels are interpreted there, and stubs stand for them."""
    out = tmp_path / "cpu-x" / "r.json"
    command = [sys.executable, "-m", "bench.overhead", "--repeats", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = run.load(out)["host"]
    assert [(r["pass"], r["directions"]) for r in rows] == [
        (pass_, directions) for pass_ in overhead.PASSES for directions in (1, 2)
    ]
    for row in rows:
        for name in ("triton_us", "aten_us", "torch_nn_us"):
            assert len(row[name]) == len(overhead.LAYERS)
            assert min(row[name]) > 0


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "FUSEDRNN_BACKEND": "auto", **more}


def test_the_command_line_with_the_kernels_interpreted(tmp_path):
    """As on a GPU, but for the speed: our kernels, gated, through `python -m bench.run`."""
    out = tmp_path / "r.json"
    command = [
        sys.executable, "-m", "bench.run", "--plan", "tiny", "--device", "cpu",
        "--only", "gru fp32-exact T5 B3 I6 H8 ", "--backends", "auto,triton,triton_states",
        "--out", str(out), "--budget", "10",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = run.load(out)["rows"]
    assert rows, done.stdout
    assert {row["backend"] for row in rows} == {"torch_nn", "auto", "triton", "triton_states"}
    assert not [row["error"] for row in rows if row["error"]]


def test_sigterm_leaves_a_good_file(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "bench.run", "--quick", "--device", "cpu",
               "--only", "curves", "--out", str(out), "--budget", "60"]  # fmt: skip
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert "torch.nn ms" in child.stdout.readline()
    assert child.stdout.readline()  # one point is measured
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    loaded = run.load(out)
    assert loaded["stopped"] == "interrupted"
    assert loaded["rows"]
