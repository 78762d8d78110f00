import os
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import device as module
from bench.device import CudaDevice, Device, cpu_model, pick_device, slug


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


def test_a_cold_cache_is_flushed_outside_the_events(cuda):
    cuda.cache = "cold"
    cuda._flush_buffer = SimpleNamespace(zero_=lambda: cuda.log.append("flush"))
    cuda.time_calls([lambda: cuda.log.append("call")])
    assert cuda.log == ["flush", "record", "call", "record", "synchronize"]


def test_the_environment_names_everything(cuda, monkeypatch):
    shown = SimpleNamespace(returncode=0, stdout="580.1, 345 MHz, 1980 MHz, 1 MHz, 2 MHz, 700 W\n")
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    real = subprocess.run
    monkeypatch.setattr(
        module.subprocess, "run",
        lambda command, **o: shown if command[0] == "nvidia-smi" else real(command, **o),
    )  # fmt: skip
    environment = cuda.environment()
    assert environment["device"] == "NVIDIA Fake"
    assert environment["driver"] == "580.1"
    assert environment["sm_clock_max_mhz"] == "1980 MHz"
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


def test_peak_memory_on_a_cpu_counts_what_operators_take():
    """3 MB alive at once: a, b, and their sum."""

    def call():
        a, b = torch.ones(1 << 18), torch.ones(1 << 18)
        return a + b

    assert Device().peak_bytes(call) == 3 << 20


def test_pick_device():
    assert type(pick_device("cpu")) is Device
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        pick_device("tpu")


def test_names():
    assert cpu_model()
    assert slug("NVIDIA GeForce RTX 4090 (24 GB)") == "nvidia-geforce-rtx-4090-24-gb"


def test_a_commit_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("git")

    monkeypatch.setattr(module.subprocess, "run", missing)
    monkeypatch.setitem(os.environ, "FUSEDRNN_COMMIT", "abcdef0123")
    assert module.commit() == ("abcdef0123", None)
