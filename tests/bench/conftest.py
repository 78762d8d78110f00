"""A GPU that is none: graphs that just call, and a clock that only tests move."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
for folder in (ROOT, Path(__file__).parent):  # importlib mode leaves sys.path alone
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from bench.timing import Device  # noqa: E402


class FakeDevice(Device):
    """Runs on the CPU, claims to be a GPU, and takes `seconds` for every call that is timed."""

    has_graphs = True

    def __init__(self, seconds: float = 0.01):
        super().__init__(compiles="eager")
        self.seconds = seconds
        self.time = 0.0
        self.timed = 0
        self.broken: Exception | None = None

    name = "Fake GPU"

    def now(self) -> float:
        return self.time

    def time_calls(self, calls):
        if self.broken is not None:
            raise self.broken
        if calls:
            calls[0]()
        times = []
        for _ in calls:
            self.timed += 1
            times.append(self.seconds * (1 + 0.1 * (self.timed % 7)))
        self.time += sum(times)
        return times

    def host_seconds(self, calls):
        return 5e-5

    def graph(self, call):
        results = call()
        return lambda: results

    def peak_bytes(self, call):
        call()
        return 1 << 20

    def environment(self):
        return {
            "device": self.name, "kind": "cuda", "date": "2026-01-02T03:04:05Z",
            "commit": "0123456789", "dirty": False, "torch": torch.__version__, "triton": None,
            "cudnn": None, "python": "3",
        }  # fmt: skip


@pytest.fixture(autouse=True)
def _precision():
    """What is measured sets torch's switches for good; other tests want them as they were."""
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.fixture
def gpu(monkeypatch) -> FakeDevice:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return FakeDevice()


LIMITS = {
    "flops": {"bf16": 1e14, "fp16": 1e14, "fp32-tf32": 5e13, "fp32-exact": 2e13}, "dram": 1e12,
    "l2": 5e12, "l2_bytes": 50_000_000, "launch": 2e-6, "roundtrip": {"2": 1e-6, "96": 1.5e-6},
    "clocks": {"l2_load": 310.0}, "failed": {},
}  # fmt: skip


@pytest.fixture
def limits() -> dict:
    """Round numbers, as a results file has them."""
    return LIMITS
