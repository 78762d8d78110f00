"""The named workloads under pytest-benchmark, which can save and compare runs of its own.

    pytest tests/bench/test_benchmark.py --benchmark-only -k "training and torch_nn"

Without that option each runs once at a tiny size: none may rot. `python -m bench.run` measures the
same within a budget, alternating with torch.nn.
"""

import pytest
import torch

from bench import backends, shapes
from bench.run import deviation, limit
from bench.timing import pick_device

PLAN = shapes.gpu_plan() if torch.cuda.is_available() else shapes.cpu_plan()
CASES = [
    pytest.param(p.shape, pass_, name, id=f"{p.shape.name}-{pass_}-{name}")
    for p in PLAN
    if p.shape.name
    for pass_ in p.passes
    for name in p.backends
]


@pytest.mark.parametrize(("shape", "pass_", "name"), CASES)
def test_workload(shape, pass_, name, benchmark, request):
    device = pick_device()
    if not request.config.getoption("benchmark_only"):
        shape = shape.tiny()
    if why := backends.refuses(name, shape, device):
        pytest.skip(why)
    backends.set_precision(shape.dtype)
    problem = backends.Problem(shape, device.torch, sets=1)
    runner = backends.build(name, problem, pass_, device)
    error, where = deviation(runner, runner.run(0), problem.answer())
    assert error <= limit(shape.dtype, None), f"{where} is off by {error}"
    benchmark.group = f"{shape.name}, {pass_}"
    benchmark.extra_info["ran_on"] = runner.ran_on

    def call():
        runner.run(0)
        device.synchronize()

    benchmark(call)
