"""This machine's shapes under pytest-benchmark: every backend in every pass.

`python -m bench.run` measures the same things within a budget and with floors; this is for
looking at a few of them (`pytest bench -k "hardest and training"`), and for pytest-benchmark's
own way of saving and comparing.
"""

from __future__ import annotations

import pytest
import torch

from bench import backends, shapes
from bench.measure import deviation, limit
from bench.problem import Problem, set_precision

PLAN = shapes.gpu_plan() if torch.cuda.is_available() else shapes.cpu_plan()
CASES = [
    pytest.param(p.shape, which, name, id=f"{p.shape.name or p.shape.key}-{which}-{name}")
    for p in PLAN
    if p.tier in ("headline", "workloads")
    for which in p.passes
    for name in p.backends
]


@pytest.mark.parametrize(("shape", "which", "name"), CASES)
def test_layer(shape, which, name, tiny, device, benchmark):
    why = backends.refuses(name, shape, device)
    if why:
        pytest.skip(why)
    if tiny:
        shape = shape.tiny()
    set_precision(shape.dtype)
    problem = Problem(shape, device.torch, sets=1)
    runner = backends.build(name, problem, which, device)
    error, where = deviation(runner, runner.run(0), problem.answer())
    assert error <= limit(shape.dtype, None), f"{where} is off by {error}"
    benchmark.group = f"{shape.name or shape.key}, {which}"
    benchmark.extra_info["ran_on"] = runner.ran_on

    def call():
        runner.run(0)
        device.synchronize()

    benchmark(call)
