"""The floor and the ranking of plans without a GPU: clocks that are arithmetic, kernels that are
interpreted in a process of their own."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from bench import aot, floor, run
from bench.timing import ROOT, Device

GPU = aot.TARGETS[aot.MADE_FOR]


class Clock(Device):
    """Takes as long as the call says."""

    name = "Fake GPU"
    properties = SimpleNamespace(
        multi_processor_count=132, L2_cache_size=50 << 20, clock_rate=1_700_000
    )

    def time_calls(self, calls):
        return [call() for call in calls]


def test_launches_cancel_and_noise_is_no_measurement():
    assert floor.slope(Clock(), lambda n: 2e-5 + 3e-6 * n, 400) == pytest.approx(3e-6)
    with pytest.raises(ValueError, match="800 repeats took 1 s, 400 1 s"):
        floor.slope(Clock(), lambda n: 1.0, 400)


def test_what_fails_is_named_and_a_broken_device_ends_it(monkeypatch):
    def failing(device, dtype, size):
        if dtype == "bf16":
            raise RuntimeError("no such product\nand a story")
        return 1e14

    for name, value in (("copy_rate", 4e12), ("l2_rate", 9e12), ("launch_seconds", 2e-6)):
        monkeypatch.setattr(floor, name, lambda *a, value=value: value)
    monkeypatch.setattr(floor, "matmul_rate", failing)
    monkeypatch.setattr(floor, "step_seconds", lambda d, layer, pass_, plan: 1e-8 * layer.H)
    monkeypatch.setattr("fusedrnn.kernels.launch.device_of", lambda device: GPU)
    limits = floor.measure(Clock())
    assert limits["failed"] == {"bf16": "RuntimeError: no such product"}
    assert set(limits["flops"]) == {"fp16", "fp32-tf32", "fp32-exact"}
    assert limits["roundtrip"][2] == pytest.approx(16e-8)
    assert set(limits["roundtrip"]) == set(floor.PROGRAMS)
    assert limits["clocks"]["l2_bytes_per_clock"] == pytest.approx(9e12 / 132 / 1.7e9)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(floor, "copy_rate", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        floor.measure(Clock())


def test_candidates_are_timed_while_there_is_time_and_a_device(monkeypatch):
    some = aot.every_candidate(GPU)[:4]
    times = iter([1e-6, RuntimeError("no room"), RuntimeError("illegal memory access")])

    def seconds(device, *candidate):
        found = next(times)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(floor, "step_seconds", seconds)
    found = [us for _, us in floor.time_candidates(Clock(), some, lambda: True)]
    assert found == [
        1.0, "RuntimeError: no room", *["RuntimeError: illegal memory access"] * 2
    ]  # fmt: skip
    late = floor.time_candidates(Clock(), some, lambda: False)
    assert {us for _, us in late} == {"the budget was spent"}


def test_the_ranking_of_times():
    every = aot.every_candidate(GPU)
    assert {layer for layer, _, _ in every} == set(aot.NAMED)
    clocks = [float(line.split("|")[4]) for line in aot.rank([(c, 1.0) for c in every], GPU)[4:]]
    exact = aot.rank([(c, 0.5 + k / 1000) for c, k in zip(every, clocks, strict=True)], GPU)
    assert f"Rank correlation 1.000 over {len(every)} candidates" in exact[0]
    assert "by 0 % on average, by 0 % at most" in exact[0]
    assert "Microseconds = 0.500 + 1.000 for every 1,000" in exact[0]
    assert len(exact) == 4 + len(every)
    # The other way round, the chosen plan is the slowest of its layer.
    wrong = aot.rank([(c, 100 - k / 1000) for c, k in zip(every, clocks, strict=True)], GPU)
    assert "Rank correlation -1.000" in wrong[0]
    assert "by 0 % at most" not in wrong[0]
    few = aot.rank([(every[0], "no room"), (every[1], 2.0)], GPU)
    assert few[0].startswith("| layer")
    assert few[2].endswith("| no room |")


INTERPRETED = """
import os
from types import SimpleNamespace
from bench import floor
from bench.aot import Named
from bench.timing import Device
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import Device as Gpu, plan_scan
import torch

class Ticking(Device):
    ticks = 0
    def time_calls(self, calls):
        for call in calls[:1]:
            call()
        Ticking.ticks += 1
        return [1.0 * Ticking.ticks] * len(calls)

assert floor.l2_rate(Ticking(), 2, 1 << 12, 64) == 2 * 64 * 4 * 256 / 2
for which in ("forward", "backward"):
    plan = plan_scan(REGISTRY["gru"], which, torch.float32, B=3, H=8, D=1,
                     device=Gpu((8, 0), 1, 1 << 20, 1 << 20, backend="interpreter"))
    assert floor.step_seconds(Ticking(), Named("gru", "fp32", 8, 3), which, plan, 2) == 1.0
"""


def test_kernels_run_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_both_measurements_extend_one_file(tmp_path, monkeypatch):
    path = tmp_path / "limits.json"
    monkeypatch.setattr(floor, "pick_device", lambda wanted: Clock())
    monkeypatch.setattr(floor, "measure", lambda device: {"flops": {}})
    monkeypatch.setattr(floor, "ahead", lambda function, items, seconds: {"planned": len(items)})
    monkeypatch.setattr(floor, "step_seconds", lambda d, layer, pass_, plan: 1e-6 * plan.block_h)
    monkeypatch.setattr("fusedrnn.kernels.launch.device_of", lambda device: GPU)
    assert floor.main(["--out", str(path)]) == 0
    assert floor.main(["--out", str(path), "--calibrate", "75"]) == 0
    content = run.load(path)
    assert content["limits"] == {"flops": {}}
    assert content["calibration"][0].startswith("Rank correlation")
    run.save({**content, "environment": {**content["environment"], "device": "Another"}}, path)
    with pytest.raises(SystemExit):
        floor.main(["--out", str(path)])


def test_the_first_run_keeps_to_ten_minutes():
    script = (ROOT / "bench" / "first_run.sh").read_text()
    verify = re.sub(r"(?s)if \[\[ \$what == measure.*?\nfi\n", "", script)
    steps = dict(re.findall(r"^ *step (\S+) (\d+) ", verify, re.M))
    assert list(steps)[-3:] == ["limits", "calibrate", "sanitizers"]
    assert {"install", "selfcheck", "layers", "launches"} <= set(steps)
    assert sum(map(int, steps.values())) < 600
    files = set(re.findall(r'-m bench\.floor .*--out "(\S+)"', verify))
    assert len(files) == 1
    (budget,) = re.findall(r"--calibrate (\d+)", verify)
    assert int(budget) < int(steps["calibrate"])
