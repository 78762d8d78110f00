"""fusedrnn's modules against torch.nn's on the CPU, where both run the same kernels of torch.

What is left is the cost of our module around them. The goal is 3 % at sizes that people run; the
smallest call of all, one time step of a small layer, shows the fixed cost in microseconds.
"""

from __future__ import annotations

import pytest
import torch

from bench import backends
from bench.device import Device
from bench.measure import Effort, take_turns
from bench.noise import against, figure, statistics_of
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
SECONDS = 0.8  # of each module's calls, for each shape and pass


def fail(name: str, failure: Exception) -> None:
    raise failure


@pytest.mark.parametrize("which", ["inference", "forward", "training"])
@pytest.mark.parametrize("name", SHAPES)
def test_overhead(name, which, tiny, figures, benchmark, request):
    """The figure comes from alternating calls; pytest-benchmark times ours for its own table."""
    shape = SHAPES[name].tiny() if tiny else SHAPES[name]
    device = Device(cpu_time=torch.get_num_threads() == 1)
    problem = Problem(shape, "cpu", sets=1)
    runners = {n: backends.build(n, problem, which, device) for n in ("torch_nn", "auto")}
    torch.testing.assert_close(runners["torch_nn"].run(0), runners["auto"].run(0))
    effort = Effort(seconds=0.0 if tiny else SECONDS, sets=1)
    samples, _ = take_turns(runners, device, effort, fail)
    theirs, own = samples["torch_nn"], samples["auto"]
    found = {"ran_on": "aten", **statistics_of(own), **against(theirs, own)}
    benchmark.group = f"overhead, {which}"
    benchmark.extra_info |= found
    benchmark.pedantic(lambda: runners["auto"].run(0), rounds=3)
    if tiny:
        return
    figures.append((f"{name}, {which}", statistics_of(theirs)["ms"], found["ms"], figure(found)))
    most = request.config.getoption("most_overhead")
    assert most is None or 1 / found["ratio_high"] <= most
