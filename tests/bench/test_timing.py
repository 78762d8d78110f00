"""Nothing that a machine's noise does may be called a win or a loss; and the machine itself."""

import itertools
import json
import math
import os
import random
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_results import rows_of

from bench import report, timing
from bench.shapes import Shape
from bench.timing import (
    STRETCHES,
    UNCLEAR,
    CudaDevice,
    Device,
    Effort,
    against,
    take_turns,
    verdict,
)

# Wall times of one torch kernel against itself on a busy machine; "how" in the file says how they
# were taken.
RECORDED = json.loads((Path(__file__).parent / "recorded_spikes.json").read_text())["calls"]
SHAPE = Shape("lstm", "fp32-exact", 4, 2, 3, 5)


def stretches(times):
    """Seconds of all calls, as the samples of a run."""
    n = len(times)
    return [times[s * n // STRETCHES : (s + 1) * n // STRETCHES] for s in range(STRETCHES)]


def told(theirs, own):
    return verdict(against(theirs, own))


def test_the_recorded_spikes_are_spikes():
    """As bad as what once was reported as 0.05x and as 6.5x."""
    for theirs, own in RECORDED.values():
        ratios = [a / b for a, b in zip(theirs, own, strict=True)]
        assert min(ratios) < 0.05
        assert max(ratios) > 6.5


@pytest.mark.parametrize("what", RECORDED)
@pytest.mark.parametrize("turns", [20, 60, 400])
def test_recorded_spikes_are_no_loss_and_no_win(what, turns):
    """The whole way to the summary, with every call of the record as one of other kernels."""
    theirs, own = (stretches(side[:turns]) for side in RECORDED[what])
    rows = rows_of(SHAPE, torch_nn=theirs, auto=own)
    assert verdict(rows[1]) == UNCLEAR
    first = report.told(rows)[0]
    assert "faster at 0, slower at 0; 1 cannot be told apart" in first
    assert "| 1 | 0 |" in report.summary(rows)[2]  # one point, none of torch's own kernels
    assert "| 0 | 0 | 1 |" in report.summary(rows)[2]  # faster, slower, cannot be told apart


def quiet(rng):
    while True:
        yield rng.gauss(1.0, 0.01)


def drifting(rng):
    """Half as fast again at the end, and a slow swing."""
    for n in itertools.count():
        yield (1 + n / 240) * (1 + 0.2 * math.sin(n / 17)) * rng.gauss(1.0, 0.01)


def bursts(rng):
    """Seconds on end in which everything takes five times as long."""
    busy = False
    while True:
        busy = rng.random() < (0.9 if busy else 0.05)
        yield (5.0 if busy else 1.0) * rng.gauss(1.0, 0.02)


def spikes(rng):
    """A heavy tail: half of the calls are longer, some a hundredfold."""
    while True:
        yield rng.paretovariate(0.8) if rng.random() < 0.5 else rng.gauss(1.0, 0.02)


NOISES = [quiet, drifting, bursts, spikes]


def runs(kind, count, turns=120, factor=1.0):
    """Runs of a program against one that takes `factor` times as long, in that timing."""
    rng = random.Random(0)
    for _ in range(count):
        times = kind(rng)
        theirs, own = [], []
        for _ in range(turns):
            first, second = next(times), next(times)
            if rng.random() < 0.5:
                first, second = second, first
            theirs.append(first)
            own.append(factor * second)
        yield stretches(theirs), stretches(own)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_called_a_difference_no_more_often_than_stated(kind):
    """2000 runs: 0.8 are expected. More than 6 come with a chance of 1 in 10^5."""
    wrong = sum(told(*sides) != UNCLEAR for sides in runs(kind, 2000))
    assert pytest.approx(1 / 2500, rel=0.01) == timing.FALSE_ALARM
    assert wrong <= 6


@pytest.mark.parametrize("kind", NOISES)
def test_the_derivation_holds_where_it_can_be_counted(kind, monkeypatch):
    """With six left out on each side the chance is 11.5 %, whatever the noise; within four
    standard deviations of it, 1 in 15,000."""
    monkeypatch.setattr(timing, "TRIMMED", 6)
    chance = 2 * sum(math.comb(STRETCHES, n) for n in range(7)) / 2**STRETCHES
    wrong = sum(told(*sides) != UNCLEAR for sides in runs(kind, 1500, 40))
    deviation = math.sqrt(1500 * chance * (1 - chance))
    assert abs(wrong - 1500 * chance) < 4 * deviation


@pytest.mark.parametrize(("kind", "factor"), [(quiet, 1.02), (drifting, 1.1), (bursts, 1.1)])
def test_a_true_loss_is_seen_through_the_noise(kind, factor):
    found = [told(*sides) for sides in runs(kind, 100, 200, factor)]
    assert found.count("slower") >= 90
    assert "faster" not in found


def test_a_drift_meets_both_sides():
    theirs = [[2.0 * (s + 1)] * 3 for s in range(STRETCHES)]
    own = [[1.0 * (s + 1)] * 3 for s in range(STRETCHES)]
    found = against(theirs, own)
    assert found["ratio_low"] == found["ratio"] == found["ratio_high"] == 2.0
    assert found["overhead_us"] == -10.5e6  # the median of 1 to 20
    assert (found["overhead_us_low"], found["overhead_us_high"]) == (-18e6, -3e6)


def test_only_turns_that_both_took_are_compared():
    """The tenth part of many calls is lower than that of few."""
    few = [[1.0]] * STRETCHES
    many = [[1.0, *[0.5] * 9]] * STRETCHES
    assert against(few, many)["ratio"] == against(many, few)["ratio"] == 1.0


def test_statistics():
    assert timing.statistics_of([[0.011, 0.001, 0.003], [0.001 * n for n in range(4, 11)]]) == {
        "ms": 3.0, "ms_p50": 7.0, "ms_p90": 11.0,
    }  # fmt: skip


def test_what_is_said():
    row = {"ran_on": "triton", "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    assert timing.figure(row) == "1.50x (1.40 to 1.60)"
    assert verdict(row) == "faster"
    assert verdict({**row, "ratio_low": 0.7, "ratio_high": 0.8}) == "slower"
    assert timing.figure({**row, "ratio_low": 1.0}) == "1.50x (1.00 to 1.60), cannot be told apart"
    same = {**row, "ran_on": "aten"}
    same |= {"overhead_us": 12.3, "overhead_us_low": 2.5, "overhead_us_high": 20.0}
    assert timing.figure(same) == "+12.3 us (+2.5 to +20.0)"
    same["overhead_us_low"] = -1.0
    assert timing.figure(same) == "+12.3 us (-1.0 to +20.0), cannot be told from none"
    assert timing.figure({**row, "ratio": None}) == "-"


def test_the_same_kernels_are_no_win_and_no_loss():
    rows = rows_of(SHAPE, torch_nn=4.0, auto=2.0) + rows_of(SHAPE, torch_nn=2.0, auto=4.0)
    assert "faster at 1, slower at 1; 0 cannot" in report.told(rows)[0]
    for row in rows[1::2]:
        row["ran_on"] = "aten"
    text = "\n".join(report.told(rows) + report.summary(rows))
    assert "faster" not in text
    assert "slower" not in text
    assert "told from none at 2 points (-2000.0 to +2000.0 us)" in text


class Clock:
    """A device whose calls are run, and take what `seconds` says of their name."""

    def __init__(self, **seconds):
        self.seconds, self.order, self.asked = seconds, [], 0

    def runner(self, name):
        return lambda i: self.order.append((name, i))

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
    samples, calls = take_turns(runners, clock, effort, None)
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


@pytest.fixture
def cuda(monkeypatch) -> CudaDevice:
    """A CudaDevice over a torch.cuda that keeps a log instead of talking to a GPU."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.at = 0

        def record(self):
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    @contextmanager
    def using(what):
        log.append("enter")
        yield
        log.append("leave")

    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    fakes = {
        "current_device": lambda: 0,
        "get_device_properties": lambda d: SimpleNamespace(
            name="NVIDIA Fake", multi_processor_count=132, total_memory=10, L2_cache_size=1 << 20
        ),
        "get_device_capability": lambda d: (9, 0),
        "synchronize": lambda d=None: log.append("synchronize"),
        "Event": Event,
        "Stream": lambda d: stream,
        "current_stream": lambda: stream,
        "stream": using,
        "CUDAGraph": lambda: graph,
        "graph": using,
        "reset_peak_memory_stats": lambda d: None,
        "memory_allocated": lambda d: 100,
        "max_memory_allocated": lambda d: 350,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    made = CudaDevice()
    made.log = log
    return made


def test_events_stand_around_each_call(cuda):
    times = cuda.time_calls([lambda: cuda.log.append("call")] * 2)
    assert cuda.log == ["record", "call", "record"] * 2 + ["synchronize"]
    assert times == [0.002, 0.002]


def test_the_host_is_timed_with_an_empty_queue(cuda):
    assert cuda.host_seconds([lambda: cuda.log.append("call")] * 3) > 0
    assert cuda.log == ["synchronize", "call"] * 3 + ["synchronize"]


def test_a_graph_is_warmed_up_captured_and_replayed(cuda):
    replay = cuda.graph(lambda: cuda.log.append("call"))
    assert cuda.log.count("call") == 3
    assert cuda.log[-3:] == ["enter", "call", "leave"]
    replay()
    assert cuda.log[-1] == "replay"


def test_peak_memory_is_what_the_call_added(cuda):
    assert cuda.peak_bytes(lambda: None) == 250


def test_the_environment_names_everything(cuda, monkeypatch):
    shown = SimpleNamespace(returncode=0, stdout="580.1, 345 MHz, 1980 MHz, 700 W\n")
    monkeypatch.setattr(timing.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    real = subprocess.run
    monkeypatch.setattr(
        timing.subprocess, "run",
        lambda command, **o: shown if command[0] == "nvidia-smi" else real(command, **o),
    )  # fmt: skip
    environment = cuda.environment()
    assert environment["device"] == "NVIDIA Fake"
    assert environment["driver_version"] == "580.1"
    assert environment["clocks.max.sm"] == "1980 MHz"
    for name in ("kind", "cuda", "cudnn", "torch", "triton", "commit", "dirty", "date", "python"):
        assert name in environment


def test_cpu_time_needs_one_thread():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Device(cpu_time=True).clock == "CPU time of one thread"
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="one thread"):
            Device(cpu_time=True)
    finally:
        torch.set_num_threads(threads)


def test_pick_device():
    assert type(timing.pick_device("cpu")) is Device
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        timing.pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="torch sees none"):
        timing.pick_device("cuda")


def test_a_commit_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("git")

    monkeypatch.setattr(timing.subprocess, "run", missing)
    monkeypatch.setitem(os.environ, "FUSEDRNN_COMMIT", "abcdef0123")
    assert timing.commit() == ("abcdef0123", None)
