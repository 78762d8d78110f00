"""Nothing that a machine's noise does may be called a win or a loss."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
from made_results import rows_of

from bench import noise, report
from bench.measure import Effort, measure
from bench.noise import STRETCHES, against, verdict
from bench.shapes import Point, Shape

# Wall times of one torch kernel against itself on a busy machine; "how" in the file says how they
# were taken.
RECORDED = json.loads((Path(__file__).parent / "recorded_spikes.json").read_text())["calls"]
SHAPE = Shape("lstm", "fp32-exact", 4, 2, 3, 5)
UNCLEAR = "cannot be told apart"


def stretches(times):
    """Seconds of all calls, as the samples of a run."""
    n = len(times)
    return [times[s * n // STRETCHES : (s + 1) * n // STRETCHES] for s in range(STRETCHES)]


def of_turns(turns, rng):
    """The samples of two sides that drew their places in each turn's (first, second)."""
    turns = [turn if rng.random() < 0.5 else turn[::-1] for turn in turns]
    return [stretches([turn[side] for turn in turns]) for side in (0, 1)]


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


@pytest.mark.parametrize("what", RECORDED)
def test_a_device_with_recorded_spikes(gpu, what):
    """As above, with the turns of `measure` in between: the clock plays the record."""
    played = itertools.cycle(itertools.chain.from_iterable(zip(*RECORDED[what], strict=True)))

    def time_calls(calls):
        for call in calls:
            call()
        return list(itertools.islice(played, len(calls)))

    gpu.time_calls = time_calls
    point = Point(SHAPE, "headline", ("torch_nn", "auto", "reference"))
    rows, _ = measure(point, "inference", gpu, Effort(seconds=0.5))
    auto, reference = rows[1:]
    assert auto["ran_on"] == "aten"
    assert "us (" in noise.figure(auto)
    assert "cannot be told from none" in noise.figure(auto)
    assert verdict(reference) == UNCLEAR
    assert UNCLEAR in noise.figure(reference)
    text = "\n".join(report.told(rows))
    assert "slower" not in text  # auto is all that counts, and it ran torch's kernels
    assert "told from none at 0 points, and is less than the noise at 1 (" in text


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
    """Runs of a program against one that takes `factor` times as long, in that noise."""
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
    assert pytest.approx(1 / 2500, rel=0.01) == noise.FALSE_ALARM
    assert wrong <= 6


@pytest.mark.parametrize("kind", NOISES)
def test_the_derivation_holds_where_it_can_be_counted(kind, monkeypatch):
    """With six left out on each side the chance is 11.5 %, whatever the noise; within four
    standard deviations of it, 1 in 15,000."""
    monkeypatch.setattr(noise, "TRIMMED", 6)
    chance = 2 * sum(math.comb(STRETCHES, n) for n in range(7)) / 2**STRETCHES
    wrong = sum(told(*sides) != UNCLEAR for sides in runs(kind, 1500, 40))
    deviation = math.sqrt(1500 * chance * (1 - chance))
    assert abs(wrong - 1500 * chance) < 4 * deviation


def test_recorded_noise_is_called_a_difference_no_more_often_than_stated():
    """Both calls of a turn are of one kernel, so which side had which is anybody's guess: 400
    guesses for each record, 0.64 expected of 1600; more than 6 come once in 300,000."""
    rng = random.Random(0)
    wrong = 0
    for sides in RECORDED.values():
        turns = list(zip(*sides, strict=True))
        for n in range(400):
            start = rng.randrange(200)
            wrong += told(*of_turns(turns[start : start + (60, 200)[n % 2]], rng)) != UNCLEAR
    assert wrong <= 6


@pytest.mark.parametrize(("kind", "factor"), [(quiet, 1.02), (drifting, 1.1), (bursts, 1.1)])
def test_a_true_loss_is_seen_through_the_noise(kind, factor):
    found = [told(*sides) for sides in runs(kind, 100, 200, factor)]
    assert found.count("slower") >= 90
    assert "faster" not in found


def test_stretches_in_which_only_one_side_was_hit_decide_nothing():
    theirs, own = next(runs(quiet, 1))
    for hit, much in ((3, 20.0), (11, 6.5)):
        own[hit] = [much * t for t in own[hit]]
    assert told(theirs, own) == UNCLEAR
    assert against(theirs, own)["ratio"] == pytest.approx(1.0, abs=0.02)


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
    assert noise.statistics_of([[0.011, 0.001, 0.003], [0.001 * n for n in range(4, 11)]]) == {
        "ms": 3.0, "ms_p50": 7.0, "ms_p90": 11.0,
    }  # fmt: skip


def test_what_is_said():
    row = {"ran_on": "triton", "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    assert noise.figure(row) == "1.50x (1.40 to 1.60)"
    assert verdict(row) == "faster"
    assert verdict({**row, "ratio_low": 0.7, "ratio_high": 0.8}) == "slower"
    assert noise.figure({**row, "ratio_low": 1.0}) == "1.50x (1.00 to 1.60), cannot be told apart"
    same = {**row, "ran_on": "aten"}
    same |= {"overhead_us": 12.3, "overhead_us_low": 2.5, "overhead_us_high": 20.0}
    assert noise.figure(same) == "+12 us (+2.5 to +20)"
    same["overhead_us_low"] = -1.0
    assert noise.figure(same) == "+12 us (-1.0 to +20), cannot be told from none"
    assert noise.figure({**row, "ratio": None}) == "-"


def test_the_same_kernels_are_no_win_and_no_loss():
    rows = rows_of(SHAPE, torch_nn=4.0, auto=2.0) + rows_of(SHAPE, torch_nn=2.0, auto=4.0)
    assert "faster at 1, slower at 1; 0 cannot" in report.told(rows)[0]
    for row in rows[1::2]:
        row["ran_on"] = "aten"
    text = "\n".join(report.told(rows) + report.summary(rows))
    assert "faster" not in text
    assert "slower" not in text
    assert "told from none at 2 points (-2000 to +2000 us), and is less" in text
