import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from bench import limits as limits_module
from bench import results, run, shapes
from bench.device import ROOT, slug
from bench.limits import Limits
from bench.measure import Effort
from bench.shapes import Point, Shape

POINTS = [
    Point(Shape("lstm", "fp32-exact", 3, 2, 4, 4 + n), "grid", ("torch_nn", "auto"), ("inference",))
    for n in range(6)
]
QUICK = Effort(seconds=0.02, memory=False)


def quiet(line):
    pass


def go(points, gpu, path, budget=1e9, **options):
    return run.run(points, gpu, path=path, budget=budget, now=gpu.now, show=quiet, **options)


def test_the_whole_gpu_plan_end_to_end(gpu, limits, tmp_path):
    """Every kind of point, every backend that a CPU can run, the report on what came out."""
    from bench import report

    plan = shapes.tiny_plan()
    path = tmp_path / "fake-gpu" / "20260102-0123456789.json"
    done = go(plan, gpu, path, effort=Effort(seconds=0.02), limits=limits)
    assert done["stopped"] == ""
    assert done["points"] == {"planned": len(plan), "measured": len(plan)}
    loaded = results.load(path)
    assert not [row["error"] for row in loaded["rows"] if row["error"]]
    ran = {row["backend"] for row in loaded["rows"]}
    assert {"torch_nn", "torch_nn_graph", "auto", "reference", "reference_graph",
            "reference_compile"} <= ran  # fmt: skip
    assert all(row["floor_ms"] > 0 for row in loaded["rows"])
    text, _ = report.build(tmp_path)
    assert "## Fake GPU" in text
    assert "not measured yet" not in text
    assert "Fake GPU" in report.readme_figures(tmp_path)


def test_the_budget_ends_a_run_and_leaves_a_good_file(gpu, tmp_path):
    gpu.seconds = 0.1
    done = go(POINTS, gpu, tmp_path / "r.json", budget=20, effort=QUICK)
    assert done["stopped"] == "the budget was spent"
    assert 0 < done["points"]["measured"] < len(POINTS)
    assert results.load(tmp_path / "r.json") == json.loads(json.dumps(done))
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
    before = results.load(tmp_path / "r.json")
    second = go(POINTS, gpu, tmp_path / "r.json", effort=QUICK, before=before)
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert len(second["rows"]) == 2 * len(POINTS)
    assert len({results.row_key(row) for row in second["rows"]}) == 2 * len(POINTS)


def test_resume_compiles_ahead_what_is_left(gpu, tmp_path):
    before = go(POINTS[:4], gpu, tmp_path / "r.json", effort=QUICK)
    assert run._not_done(POINTS, before) == POINTS[4:]
    assert run._not_done(POINTS, None) == POINTS
    both = [replace(p, passes=("inference", "training")) for p in POINTS]
    assert run._not_done(both, before) == both


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
    assert len(results.load(tmp_path / "r.json")["rows"]) == 4


def test_a_broken_device_keeps_what_there_is(gpu, tmp_path):
    def breaking(points):
        yield points[0]
        gpu.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
        yield points[1]

    done = go(POINTS, gpu, tmp_path / "r.json", effort=QUICK, progress=breaking)
    assert done["stopped"].startswith("the device failed")
    rows = results.load(tmp_path / "r.json")["rows"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]


def test_the_file_is_good_while_it_is_written(gpu, tmp_path):
    """Saved every few seconds of the run's clock, so a kill loses little."""
    gpu.seconds = 3.0
    path = tmp_path / "r.json"
    seen = []

    def watching(points):
        for point in points:
            if path.exists():
                seen.append(results.load(path))
            yield point

    go(POINTS, gpu, path, effort=QUICK, progress=watching)
    assert len(seen) == len(POINTS) - 1
    assert seen[0]["stopped"] == "not finished"
    assert not list(tmp_path.glob("*.tmp"))


def test_select():
    plan = shapes.gpu_plan()
    chosen = run.select(plan, only="gru bf16 T256 B1 ", tiers="planes", passes="training")
    assert len(chosen) == len(shapes.H_GRID)
    assert {p.passes for p in chosen} == {("training",)}
    chosen = run.select(plan, only="decoding", backends="auto, triton")
    assert {p.backends for p in chosen} == {("auto", "triton")}
    with pytest.raises(ValueError, match="tiers"):
        run.select(plan, tiers="everything")
    with pytest.raises(ValueError, match="passes"):
        run.select(plan, passes="backward")


def test_check_finds_what_is_wrong(gpu, tmp_path):
    good = go(POINTS[:1], gpu, tmp_path / "r.json", effort=QUICK)
    assert results.check(good) == []
    assert "schema" in results.check({**good, "schema": 1})[0]
    row = good["rows"][0]
    assert "lacks" in results.check({**good, "rows": [{"cell": "lstm"}]})[0]
    assert "neither" in results.check({**good, "rows": [{**row, "ms": None}]})[0]
    assert "and an error" in results.check({**good, "rows": [{**row, "error": "x"}]})[0]
    (tmp_path / "half.json").write_text('{"schema": 1, "rows": [')
    with pytest.raises(ValueError, match="not a results file"):
        results.load(tmp_path / "half.json")


def test_newer_rows_replace_older_ones_as_a_whole(gpu, tmp_path):
    old = go(POINTS[:2], gpu, tmp_path / "a.json", effort=QUICK)
    new = go(POINTS[:1], gpu, tmp_path / "b.json", effort=QUICK)
    merged = results.newest_rows([old, new])
    assert merged[:2] == new["rows"]
    assert merged[2:] == old["rows"][2:]


def test_paths_say_device_date_and_commit(gpu):
    path = results.default_path(gpu.environment())
    assert path.relative_to(results.FOLDER).as_posix() == "fake-gpu/202601020304-0123456789.json"
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_limits_come_back_from_a_file(gpu, limits, tmp_path):
    go(POINTS[:1], gpu, tmp_path / "r.json", effort=QUICK, limits=limits)
    assert Limits.from_dict(results.load(tmp_path / "r.json")["limits"]) == limits


def test_limits_from_another_process(capfd):
    found = limits_module.measure_apart("cpu")
    assert found.flops["fp32-exact"] > 0
    assert limits_module.measure_apart("tpu") is None
    assert "no limits: ValueError: device must be 'cpu' or 'cuda'" in capfd.readouterr().out


def test_a_limit_that_breaks_the_device_is_not_just_missing():
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    failed = {}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        limits_module._try(failed, "l2", broken, 0.0)
    assert limits_module._try(failed, "l2", lambda: 1 / 0, 0.0) == 0.0
    assert failed == {"l2": "ZeroDivisionError: division by zero"}


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "FUSEDRNN_BACKEND": "auto", **more}


def test_the_command_line_with_the_kernels_interpreted(tmp_path):
    """As on a GPU, but for the speed: our kernels, gated, through `python -m bench.run`."""
    out = tmp_path / "r.json"
    command = [
        sys.executable, "-m", "bench.run", "--plan", "tiny", "--device", "cpu", "--no-limits",
        "--only", "^gru fp32-tf32 T5 B3 I6 H8 ?$", "--passes", "training",
        "--backends", "auto,triton,triton_states", "--out", str(out), "--budget", "20",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = results.load(out)["rows"]
    assert rows, done.stdout
    assert {row["backend"] for row in rows} == {"torch_nn", "auto", "triton", "triton_states"}
    assert not [row["error"] for row in rows if row["error"]]


def test_sigterm_leaves_a_good_file(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "bench.run", "--no-limits", "--quick", "--device", "cpu",
               "--tiers", "curves", "--out", str(out), "--budget", "60"]  # fmt: skip
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert "torch.nn ms" in child.stdout.readline()
    assert child.stdout.readline()  # one point is measured
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    loaded = results.load(out)
    assert loaded["stopped"] == "interrupted"
    assert loaded["rows"]
