from dataclasses import replace

import pytest

from bench import precompile, shapes
from bench.shapes import Point, Shape
from fusedrnn.kernels.plan import Device

H200 = Device((9, 0), 132, 232_448, 233_472)
BASE = Shape("lstm", "bf16", 256, 16, 512, 512)


def of(*found, backends=shapes.TWO, passes=("training",)):
    return precompile.jobs([Point(s, "grid", backends, passes) for s in found], H200, 100)


def test_one_job_for_what_has_the_same_kernels():
    same = [replace(BASE, T=64), replace(BASE, I=64), replace(BASE, layers=4)]
    assert len(of(BASE, *same)) == 1
    for other in (
        replace(BASE, cell="gru"), replace(BASE, dtype="fp16"), replace(BASE, H=256),
        replace(BASE, bidirectional=True), replace(BASE, lengths="text"),
        replace(BASE, resets=True), replace(BASE, B=256),
    ):  # fmt: skip
        assert len(of(BASE, other)) == 2, other
    assert len(of(BASE, backends=shapes.CLOSE)) == 2  # both ways of saving
    assert of(BASE, backends=("torch_nn",)) == []


def test_a_job_has_the_passes_of_all_its_points():
    points = [
        Point(BASE, "grid", shapes.TWO, ("training",)),
        Point(replace(BASE, T=64), "grid", shapes.TWO, ("inference",)),
    ]
    (job,) = precompile.jobs(points, H200, 100)
    assert job.passes == ("training", "inference")
    assert (job.shape.T, job.shape.layers) == (2, 1)


def test_the_first_of_the_plan_come_first():
    plan = shapes.gpu_plan()
    few = precompile.jobs(plan, H200, 30)
    assert len(few) == 30
    assert few == precompile.jobs(plan, H200, 60)[:30]
    assert few[0].shape.dtype == "fp16"  # the hardest point


@pytest.mark.parametrize("backend", ["triton", "triton_states"])
def test_a_job_runs_with_the_kernels_interpreted(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = []
    from fusedrnn import kernels

    forward = kernels.scan_forward
    monkeypatch.setattr(
        kernels, "scan_forward", lambda *a, **k: ran.append(k["save"]) or forward(*a, **k)
    )
    job = precompile.Job(Shape("gru", "fp32-exact", 2, 3, 4, 8), backend, shapes.PASSES)
    seconds, failure = precompile.compile_job(job, "cpu")
    assert not failure
    assert seconds > 0
    saved = "states" if backend == "triton_states" else "gates"
    assert ran == [saved, saved, None]


@pytest.mark.parametrize("step", ["pick_device", "Problem", "set_precision"])
def test_whatever_fails_in_a_process_is_reported(step, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(precompile, step, broken)
    job = precompile.Job(Shape("gru", "fp32-exact", 2, 3, 4, 8), "triton", ("inference",))
    assert precompile.compile_job(job, "cpu") == (
        0.0, "gru fp32-exact T2 B3 I4 H8: RuntimeError: out of luck"
    )  # fmt: skip


def test_a_failure_is_reported_and_not_the_end(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    job = precompile.Job(Shape("gru", "fp32-exact", 2, 3, 4, 8), "triton", ("no such pass",))
    seconds, failure = precompile.compile_job(job, "cpu")
    assert seconds == 0
    assert failure.startswith("gru fp32-exact T2 B3 I4 H8: KeyError")


def test_processes(monkeypatch):
    """Every job comes back from its process, and what failed in one ends nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(precompile, "compile_job", _compile_on_the_cpu)
    said = []
    tiny = replace(BASE, dtype="fp32-exact", B=2)
    plan = [Point(replace(tiny, H=n, I=n), "grid", shapes.TWO, ("inference",)) for n in (8, 16, 24)]
    done = precompile.precompile(plan, H200, 300, workers=2, show=said.append)
    assert not said
    assert done["layers"] == done["planned"] == 3
    assert done["slowest_first_call_s"] > 0
    monkeypatch.delenv("TRITON_INTERPRET")
    done = precompile.precompile(plan, H200, 300, workers=2, show=said.append)
    assert (done["layers"], done["planned"]) == (0, 3)
    assert len(said) == 3
    assert all("the tensors are on the cpu" in line for line in said)
    said.clear()
    done = precompile.precompile(plan, H200, 0.0, workers=1, show=said.append)
    assert done["layers"] == 0
    assert said == ["compiling ahead was stopped after 0 s"]


def _compile_on_the_cpu(job):
    return precompile.compile_job(job, "cpu")
