"""The machine that is measured: its clock, its memory, its graphs, and what it is.

`Device` is all that the measuring code knows of a machine. Tests put in one with a fake clock,
and every line that does not itself talk to CUDA runs on a CPU.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


class Device:
    """A CPU, timed by the host's clock, or by the CPU time of the one thread that runs.

    CPU time leaves out what other programs took meanwhile, so a busy machine can be measured; it
    would count the waiting of several threads too.

    Attributes:
        name: as results files call it.
        has_graphs: whether a call can be captured and replayed.
        compiles: torch.compile's backend for the compiled competitor, or "" to leave it out.
        cache: "warm" (input sets in rotation) or "cold" (caches flushed before each call).
        clock: what times are, in words.
    """

    has_graphs = False
    clock = "wall time"
    now_seconds = staticmethod(time.perf_counter)

    def __init__(self, compiles: str = "inductor", cache: str = "warm", cpu_time: bool = False):
        self.torch = torch.device("cpu")
        self.compiles = compiles
        self.cache = cache
        if cpu_time:
            if torch.get_num_threads() != 1:
                raise ValueError(f"CPU time needs one thread, not {torch.get_num_threads()}")
            self.clock, self.now_seconds = "CPU time of one thread", time.thread_time

    @property
    def name(self) -> str:
        return f"cpu {cpu_model()}"

    def synchronize(self) -> None:
        pass

    def warm_up(self) -> None:
        """Loads libraries, so that no backend's first call pays for them."""
        module = torch.nn.LSTM(16, 16).to(self.torch)
        module(torch.randn(2, 2, 16, device=self.torch))[0].sum().backward()
        self.synchronize()

    def time_calls(self, calls: list[Callable[[], object]]) -> list[float]:
        """Seconds of each call."""
        times = []
        for call in calls:
            if self.cache == "cold":
                self.flush()
            start = self.now_seconds()
            call()
            times.append(self.now_seconds() - start)
        return times

    def host_seconds(self, calls: list[Callable[[], object]]) -> float | None:
        """How long a call keeps the host busy, where that is not the whole call."""
        return None

    def flush(self) -> None:
        torch.empty(1 << 24).fill_(1.0)

    def graph(self, call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        raise NotImplementedError("a CPU has no graphs")

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most bytes that `call` holds at once, of those it allocates itself."""
        return _peak_of_allocations(call)

    def environment(self) -> dict:
        return {
            "device": self.name,
            "kind": "cpu",
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "capability": torch.backends.cpu.get_cpu_capability(),
            **_software(),
        }


class CudaDevice(Device):
    """A GPU, timed by CUDA events."""

    has_graphs = True
    clock = "CUDA events"

    def __init__(self, compiles: str = "inductor", cache: str = "warm", cpu_time: bool = False):
        if cpu_time:
            raise ValueError("CPU time says nothing about a GPU")
        super().__init__(compiles, cache)
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch)
        self._flush_buffer: Tensor | None = None

    @property
    def name(self) -> str:
        return self.properties.name

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def time_calls(self, calls: list[Callable[[], object]]) -> list[float]:
        pairs = []
        for call in calls:
            if self.cache == "cold":
                self.flush()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def host_seconds(self, calls: list[Callable[[], object]]) -> float | None:
        times = []
        for call in calls:
            self.synchronize()  # an empty queue, so that the host never waits for a place in it
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        self.synchronize()
        return statistics.median(times)

    def flush(self) -> None:
        if self._flush_buffer is None:
            words = 2 * max(self.properties.L2_cache_size, 1 << 20) // 4
            self._flush_buffer = torch.empty(words, dtype=torch.int32, device=self.torch)
        self._flush_buffer.zero_()

    def graph(self, call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        side = torch.cuda.Stream(self.torch)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = call()

        def replay() -> tuple[Tensor, ...]:
            captured.replay()
            return results

        return replay

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def environment(self) -> dict:
        major, minor = torch.cuda.get_device_capability(self.torch)
        return {
            "device": self.name,
            "kind": "cuda",
            "capability": f"sm_{major}{minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "l2_bytes": self.properties.L2_cache_size,
            **_nvidia_smi(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cpu": cpu_model(),
            "load": round(os.getloadavg()[0], 1),
            **_software(),
        }


def is_sticky(failure: Exception) -> bool:
    """Whether a CUDA error leaves the process unable to go on."""
    words = ("illegal memory access", "unspecified launch failure", "misaligned address",
             "device-side assert", "illegal instruction")  # fmt: skip
    return any(word in str(failure) for word in words)


def pick_device(wanted: str = "", **options) -> Device:
    """The GPU where there is one and "cpu" is not asked for."""
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {wanted!r}")
    cuda = torch.cuda.is_available() if not wanted else wanted == "cuda"
    return CudaDevice(**options) if cuda else Device(**options)


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", model).strip() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> tuple[str, bool | None]:
    """The commit and whether the tree differs from it; FUSEDRNN_COMMIT where git is missing."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Results and reports are what a run writes; they do not change what it measured.
        changes = git(
            "status", "--porcelain", "--", ".", ":!bench/results", ":!bench/report",
            ":!bench/REPORT.md", ":!README.md",
        )  # fmt: skip
        return git("rev-parse", "--short=10", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSEDRNN_COMMIT", "unknown"), None


def _software() -> dict:
    import numpy

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    sha, dirty = commit()
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "commit": sha,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _nvidia_smi() -> dict:
    """Driver and clocks in MHz; empty where the program is missing."""
    fields = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.current.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.current.memory",
        "memory_clock_max_mhz": "clocks.max.memory",
        "power_limit_w": "power.limit",
    }
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    shown = subprocess.run([*command, "-i", "0"], capture_output=True, text=True)
    if shown.returncode:
        return {"nvidia_smi": (shown.stderr or shown.stdout).strip()[:200]}
    return dict(zip(fields, (v.strip() for v in shown.stdout.split(",")), strict=False))


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler announces itself below Python, once for every use."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak_of_allocations(call: Callable[[], object]) -> int | None:
    """Follows torch's CPU allocations through the profiler, those inside operators included."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    del kept
    inner = found.profiler
    events = [] if inner is None else inner.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
