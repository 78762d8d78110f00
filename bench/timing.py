"""The machine that is measured, and what can be said of two programs on it in spite of its noise.

`Device` is all that the measuring code knows of a machine; tests put in one with a fake clock.

Both sides take turns, call by call, in an order drawn anew for every turn. A run is STRETCHES
stretches; each has one figure, the ratio (or the difference) of the two sides' low quantiles in it.
The figure of the run is their median, its interval leaves out the TRIMMED smallest and largest.
Were both sides the same program, a stretch's ratio would fall on either side of 1 with equal
chance, whatever the noise is like, so all but TRIMMED of them are on one side with the chance
FALSE_ALARM, about 1 in 2,500 points. That does not cover what stays the same for a whole run, as
where in memory a side's tensors happen to lie.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# With these a processor does as if it had fewer instructions: ATen's, and oneDNN's.
CPU_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


class Device:
    """A CPU, timed by the host's clock, or by the CPU time of the one thread that runs: that leaves
    out what other programs took meanwhile, but would count the waiting of several threads too.
    `compiles` is torch.compile's backend for the compiled competitor, `clock` says what times are.
    """

    has_graphs = False
    clock = "wall time"
    now_seconds = staticmethod(time.perf_counter)

    def __init__(self, compiles: str = "inductor", cpu_time: bool = False):
        self.torch = torch.device("cpu")
        self.compiles = compiles
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
            start = self.now_seconds()
            call()
            times.append(self.now_seconds() - start)
        return times

    def best_seconds(self, call: Callable[[], object], repeats: int = 25) -> float:
        """The fastest of `repeats` calls, or of as many as half a second takes."""
        once = max(self.time_calls([call])[0], 1e-6)
        return min(self.time_calls([call] * min(repeats, math.ceil(0.5 / once))))

    def host_seconds(self, calls: list[Callable[[], object]]) -> float | None:
        """How long a call keeps the host busy, where that is not the whole call."""
        return None

    def graph(self, call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        raise NotImplementedError("a CPU has no graphs")

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most bytes that `call` holds at once, of those it allocates itself; None where
        torch does not count them."""
        return None

    def environment(self) -> dict:
        sha, dirty = commit()
        return {
            "device": self.name, "kind": self.torch.type,
            "capability": torch.backends.cpu.get_cpu_capability(),
            **{name: os.environ[name] for name in CPU_SETTINGS if name in os.environ},
            "cpu": cpu_model(), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1), "os": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(), "torch": torch.__version__,
            "triton": import_module("triton").__version__ if find_spec("triton") else None,
            "commit": sha, "dirty": dirty,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }  # fmt: skip


class CudaDevice(Device):
    """A GPU, timed by CUDA events."""

    has_graphs = True
    clock = "CUDA events"

    def __init__(self, compiles: str = "inductor", cpu_time: bool = False):
        if cpu_time:
            raise ValueError("CPU time says nothing about a GPU")
        super().__init__(compiles)
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch)

    @property
    def name(self) -> str:
        return self.properties.name

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def time_calls(self, calls: list[Callable[[], object]]) -> list[float]:
        pairs = []
        for call in calls:
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
        names = ("driver_version", "clocks.current.sm", "clocks.max.sm", "power.limit")
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i0"]
        shown = ""
        if shutil.which("nvidia-smi"):
            shown = subprocess.run(command, capture_output=True, text=True).stdout
        return {
            **super().environment(),
            "capability": f"sm_{major}{minor}",
            "multiprocessors": self.properties.multi_processor_count,
            **dict(zip(names, (v.strip() for v in shown.split(",")), strict=False)),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip


def is_sticky(failure: Exception) -> bool:
    """Whether a CUDA error leaves the process unable to go on."""
    words = ("illegal memory access", "unspecified launch failure", "misaligned address",
             "device-side assert", "illegal instruction")  # fmt: skip
    return any(word in str(failure) for word in words)


def pick_device(wanted: str = "", **options) -> Device:
    """The GPU where there is one and "cpu" is not asked for."""
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': expected a CUDA device, torch sees none")
    cuda = torch.cuda.is_available() and wanted != "cpu"
    return CudaDevice(**options) if cuda else Device(**options)


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", model).strip() or platform.machine()


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


# Taking turns.

STRETCHES = 20
TRIMMED = 2
LOW = 0.1
FALSE_ALARM = 2 * sum(math.comb(STRETCHES, n) for n in range(TRIMMED + 1)) / 2**STRETCHES
# Seconds between two readings of the clock, at least: shorter calls are timed a few at a time. A
# hundred times what reading the slowest clock costs (a thread's CPU time, a microsecond) and what
# CUDA events resolve (half a microsecond).
LEAST = 1e-4

Samples = list[list[float]]  # seconds of a call: a list for each stretch, in the order of turns


@dataclass(frozen=True)
class Effort:
    """How long to measure a backend in one pass."""

    seconds: float = 0.2  # of calls, per backend and pass
    most: int = 200  # timings; at least one in each stretch
    sets: int = 3  # input sets in rotation


def take_turns(
    runs: dict[str, Callable[[int], object]],
    device: Device,
    effort: Effort,
    failed: Callable[[str, Exception], None],
) -> tuple[dict[str, Samples], dict[str, int]]:
    """Seconds of a call, by backend, stretch and turn; and how many calls each backend had.

    In a turn every backend computes the same set of inputs, in an order drawn anew: once, or a
    few times where the fastest takes less than LEAST. A slow backend takes only the first turns
    of a stretch. One that raises is told to `failed` and drops out; the others go on.

    Args:
        runs: by backend, what computes a set of inputs by its number.
    """
    estimates = {}
    for name, run in runs.items():  # warm-up, too
        calls = [lambda r=run, i=i: r(i) for i in range(effort.sets)]
        try:
            estimates[name] = max(min(device.time_calls(calls)), 1e-6)
        except Exception as failure:
            failed(name, failure)
    together = math.ceil(LEAST / min(estimates.values(), default=1.0))
    turns = {
        name: max(1, round(min(effort.seconds / (together * seconds), effort.most) / STRETCHES))
        for name, seconds in estimates.items()
    }
    most = max(turns.values(), default=0)
    samples: dict[str, Samples] = {name: [] for name in turns}
    order, running = random.Random(0), ""

    def timing(name: str, number: int) -> Callable[[], None]:
        def call() -> None:
            nonlocal running
            running = name
            for _ in range(together):
                runs[name](number % effort.sets)

        return call

    for stretch in range(STRETCHES):
        done = False
        while turns and not done:
            names = []
            for turn in range(most):
                taking = [name for name in turns if turn < turns[name]]
                order.shuffle(taking)
                names += [(name, stretch * most + turn) for name in taking]
            running = names[0][0]
            try:  # in one go: a GPU's queue is not emptied in between
                times = device.time_calls([timing(*name) for name in names])
            except Exception as failure:
                failed(running, failure)
                del turns[running], samples[running]
                continue
            for name in turns:
                samples[name].append(
                    [t / together for t, (n, _) in zip(times, names, strict=True) if n == name]
                )
            done = True
    return samples, {name: STRETCHES * turns[name] * together for name in turns}


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[int(q * len(times))]


def against(theirs: Samples, own: Samples) -> dict[str, float | None]:
    """`ratio` (theirs / own) and `overhead_us` (own - theirs), each with `_low` and `_high`.

    Of a stretch count the turns that both took: a quantile of more calls would be a lower one.
    """
    pairs = []
    for a, b in zip(theirs, own, strict=True):
        both = min(len(a), len(b))
        pairs.append((quantile(a[:both], LOW), quantile(b[:both], LOW)))
    found = {}
    for name, digits, parts in (
        ("ratio", 4, [a / b for a, b in pairs]),
        ("overhead_us", 3, [1e6 * (b - a) for a, b in pairs]),
    ):
        parts.sort()
        ends = ("", statistics.median(parts)), ("_low", parts[TRIMMED]), ("_high", parts[~TRIMMED])
        found |= {name + end: round_to(value, digits) for end, value in ends}
    return found


def statistics_of(samples: Samples) -> dict[str, float | None]:
    """`ms`, the low quantile of all calls in milliseconds; `ms_p50` and `ms_p90` show the noise."""
    times = [time for stretch in samples for time in stretch]
    quantiles = {"ms": LOW, "ms_p50": 0.5, "ms_p90": 0.9}
    return {name: round_to(quantile(times, q) * 1e3, 5) for name, q in quantiles.items()}


def round_to(value: float, digits: int) -> float | None:
    """`value` with that many significant digits; None where it is no finite number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


# What is said of a results row.

UNCLEAR = "cannot be told apart"


def same_kernels(row: dict) -> bool:
    """Whether a row ran the kernels of torch that torch.nn runs: its cost is the module's own, in
    microseconds, and it has no speed-up."""
    return row["ran_on"] == "aten"


def verdict(row: dict) -> str:
    """Of a row's ratio to torch.nn: "faster", "slower", or that noise could be all of it."""
    if row["ratio_low"] > 1:
        return "faster"
    return "slower" if row["ratio_high"] < 1 else UNCLEAR


def overhead_is_clear(row: dict) -> bool:
    """Whether a row's overhead is beyond noise, above or below 0."""
    return not row["overhead_us_low"] <= 0 <= row["overhead_us_high"]


def figure(row: dict) -> str:
    """A row against torch.nn, in words."""
    if not row["ratio"]:
        return "-"
    if same_kernels(row):
        value, low, high = (f"{row['overhead_us' + end]:+.1f}" for end in ("", "_low", "_high"))
        unclear = "" if overhead_is_clear(row) else ", cannot be told from none"
        return f"{value} us ({low} to {high}){unclear}"
    unclear = f", {UNCLEAR}" if verdict(row) == UNCLEAR else ""
    return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){unclear}"
