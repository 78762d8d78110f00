"""python -m fusedrnn: readable, --json for a script, and an exit status that tells."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedrnn
from fusedrnn import __main__ as program
from fusedrnn import cells, selfcheck
from fusedrnn.backends import aten


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_it_runs():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fusedrnn"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (fusedrnn.__version__, torch.__version__, "aten", "reference", "ok", "cpu"):
        assert word in done.stdout
    # A person reads why Triton was not checked.
    line = next(line for line in done.stdout.splitlines() if "triton  " in line and "cpu" in line)
    assert "unavailable" in line


def test_a_reader_that_stops():
    """`python -m fusedrnn | head -1`"""
    program = [sys.executable, "-u", "-m", "fusedrnn"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline().split() == ["fusedrnn", fusedrnn.__version__]
        running.stdout.close()
        errors = running.stderr.read()
    assert "BrokenPipeError" not in errors
    assert running.returncode == 1


def test_json(capsys):
    assert program.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    cpu = {c["backend"]: c for c in report["checks"] if c["device"] == "cpu"}
    assert set(cpu) == set(fusedrnn.BACKENDS)
    for name in ("aten", "reference"):
        assert cpu[name]["status"] == "ok"
        assert 0 < cpu[name]["error"] <= cpu[name]["tolerance"]
    assert cpu["triton"]["status"] == "unavailable"
    assert cpu["triton"]["reason"]


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_every_cell_that_the_backend_has_is_checked(backend, monkeypatch):
    ran, run = set(), selfcheck._run

    def noted(cell, device, backend, dtype):
        ran.add((cell, backend))
        return run(cell, device, backend, dtype)

    monkeypatch.setattr(selfcheck, "_run", noted)
    result = selfcheck.check("cpu", backend)
    has = {name for name, cell in cells.REGISTRY.items() if backend == "reference" or cell.aten}
    assert {name for name, on in ran if on == backend} >= has
    lacking = set(cells.REGISTRY) - has
    assert all(f"without {name}: torch has no {name}" in result.reason for name in lacking)


def wrong_forward(original):
    def run(*args, **kwargs):
        output, *final = original(*args, **kwargs)
        return (output * 1.001, *final)

    return run


class Wrong(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d * 1.001


def wrong_backward(original):
    def run(*args, **kwargs):
        output, *final = original(*args, **kwargs)
        return (output, *(Wrong.apply(f) for f in final))

    return run


def not_a_number(original):
    def run(*args, **kwargs):
        output, *final = original(*args, **kwargs)
        return (output * float("nan"), *final)

    return run


@pytest.mark.parametrize("mistake", [wrong_forward, wrong_backward, not_a_number])
def test_a_wrong_backend_is_noticed(mistake, monkeypatch, capsys):
    monkeypatch.setattr(aten, "forward", mistake(aten.forward))
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "wrong" in out
    assert "do not use" in out
    assert selfcheck.check("cpu", "aten").status == "wrong"
    assert selfcheck.check("cpu", "reference").status == "ok"


def test_a_backend_that_raises_is_reported(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(aten, "forward", broken)
    assert program.main(["--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = [c for c in checks if c["status"] == "failed"]
    assert [c["backend"] for c in failed] == ["aten"]
    assert "no such kernel" in failed[0]["reason"]
