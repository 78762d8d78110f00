"""fusedrnn's modules against torch.nn's on the CPU, where both run the same kernels of torch.

What is left is the cost of our module around them. The goal is 3 % at sizes that people run; the
smallest call of all, one time step of a small layer, shows the fixed cost in microseconds.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from bench import backends
from bench.device import Device
from bench.problem import Problem
from bench.shapes import Shape

DTYPE = "fp32-exact"
SHAPES = {
    "one step": Shape("lstm", DTYPE, 1, 1, 64, 64),
    "small": Shape("lstm", DTYPE, 16, 4, 32, 32),
    "small gru": Shape("gru", DTYPE, 16, 4, 32, 32),
    "medium": Shape("lstm", DTYPE, 64, 16, 128, 128),
    "medium packed": Shape("lstm", DTYPE, 64, 16, 128, 128, lengths="text"),
    "medium 2 layers both ways": Shape("lstm", DTYPE, 32, 16, 128, 128, 2, True),
    "large": Shape("lstm", DTYPE, 128, 32, 512, 512),
    "large gru": Shape("gru", DTYPE, 64, 32, 512, 512),
}
SECONDS = 0.8  # for each shape and pass
ROUNDS = 40


def alternate(calls: list, rounds: int, inner: int, clock=None) -> list[list[float]]:
    """Seconds of each call: `rounds` times each, in turns, `inner` calls at a time.

    With one thread (OMP_NUM_THREADS=1) CPU time, which other programs do not lengthen.
    """
    if clock is None:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            call = calls[which]
            start = clock()
            for _ in range(inner):
                call()
            samples[which].append((clock() - start) / inner)
    return samples


def ratio_of(theirs: list[float], own: list[float]) -> float:
    """The median over turns of own / theirs: neighbours in time meet the same load."""
    return statistics.median(o / t for o, t in zip(own, theirs, strict=True))


@pytest.mark.parametrize("which", ["inference", "forward", "training"])
@pytest.mark.parametrize("name", SHAPES)
def test_overhead(name, which, tiny, ratios, benchmark, request):
    """The ratio comes from alternating calls; pytest-benchmark times ours for its own table."""
    shape = SHAPES[name].tiny() if tiny else SHAPES[name]
    device = Device()
    problem = Problem(shape, "cpu", sets=1)
    runners = [backends.build(n, problem, which, device) for n in ("torch_nn", "auto")]
    torch.testing.assert_close(runners[0].run(0), runners[1].run(0))
    calls = [lambda r=runner: r.run(0) for runner in runners]
    benchmark.group = f"overhead, {which}"
    if tiny:
        alternate(calls, 1, 1)
        benchmark(calls[1])
        return
    once = min(alternate(calls[:1], 3, 1)[0])
    inner = max(1, int(SECONDS / (2 * ROUNDS) / once))
    theirs, own = alternate(calls, ROUNDS, inner)
    ratio = ratio_of(theirs, own)
    microseconds = [1e6 * min(samples) for samples in (theirs, own)]
    benchmark.extra_info |= {"ratio": ratio, "us_torch_nn": microseconds[0]}
    ratios.append((f"{name}, {which}", ratio, *microseconds))
    benchmark.pedantic(calls[1], rounds=3, iterations=max(1, inner // 4))
    most = request.config.getoption("most_overhead")
    assert most is None or ratio <= most
