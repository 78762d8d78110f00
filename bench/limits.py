"""The limit: what the machine at hand can do, measured, and what that allows every shape.

    python -m bench.limits [--out FILE]

The model of a time step, for a layer with gates G, units H, batch B, spread over P_h x P_b
multiprocessors a direction (P_h slices of the units, P_b of the batch):

    arithmetic  = 2 * b * G * u * H / rate           b = B / P_b rows, u = H / P_h units
    weights     = what of G * u * H elements does not stay in registers, from shared memory,
                  and what does not fit there either, from L2
    exchange    = all programs' reads of h (forward: b * H, backward: b * G * H), from L2
    round trip  = measured, store -> L2 -> load among P_h programs; none for P_h = 1
    step        = max(max(arithmetic, weights) + round trip, exchange)

and the floor of a step is the least over all P_h. A call cannot be faster than its steps one
after the other (a stack in one direction may overlap its layers: T + L - 1 steps on a share of
the machine each), than all its arithmetic at the full rate, or than moving its inputs, weights
and outputs once. It is a floor under this model, not a promise that code can reach it.

On a CPU, which has no round trip, the weights come through the caches at the rate that a
matrix-vector product of that size reaches.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch

from bench.device import Device, is_sticky, pick_device
from bench.problem import TORCH_DTYPES, set_precision
from bench.shapes import Shape, length_list, steps_in

BYTES = {"bf16": 2, "fp16": 2, "fp32-tf32": 4, "fp32-exact": 4}
TENSOR_ROWS = 8  # the narrowest batch that a tensor core instruction multiplies


@dataclass(frozen=True)
class Limits:
    """Rates of a machine. Bytes and FLOPs per second, seconds, bytes.

    Attributes:
        flops: of the whole machine, by dtype.
        dram, l2: bandwidth of the whole machine.
        shared: bandwidth of one multiprocessor's shared memory.
        register_bytes, shared_bytes: of one multiprocessor, usable for weights.
        l2_bytes: capacity.
        launch: from one launch to the next.
        roundtrip: number of programs -> seconds per step of an exchange among them.
        caches: CPU only: (bytes, bandwidth) of a read of that size, ascending.
        clocks: GPU only: parameters of the step-cost meter (bench.step_cost.parameters) by their
            names there, in clock cycles, but for clock_ghz and l2_bytes_per_clock; see `clocks`.
        failed: what could not be measured, and why.
    """

    device: str
    multiprocessors: int
    flops: dict[str, float]
    dram: float
    l2: float
    shared: float
    register_bytes: int
    shared_bytes: int
    l2_bytes: int
    launch: float
    roundtrip: dict[int, float] = field(default_factory=dict)
    caches: tuple[tuple[int, float], ...] = ()
    clocks: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return id(self)

    def as_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Limits:
        """From a results file, where JSON made strings of the numbers of programs."""
        trips = {int(n): seconds for n, seconds in values["roundtrip"].items()}
        caches = tuple((int(size), rate) for size, rate in values["caches"])
        return Limits(**{**values, "roundtrip": trips, "caches": caches})

    def rate(self, dtype: str) -> float:
        """FLOP/s of the whole machine."""
        return self.flops[dtype]

    def trip(self, programs: int) -> float:
        """Seconds of a round trip among so many programs."""
        if programs <= 1 or not self.roundtrip:
            return 0.0
        return interpolate(sorted(self.roundtrip.items()), programs)

    def weights_seconds(self, held: float, programs: int) -> float:
        """Seconds for one multiprocessor to go once through `held` bytes of weights, while
        `programs` do the same."""
        if self.caches:
            return held / interpolate(list(self.caches), held)
        beyond_registers = max(held - self.register_bytes, 0)
        beyond_shared = max(beyond_registers - self.shared_bytes, 0)
        from_shared = (beyond_registers - beyond_shared) / self.shared
        return max(from_shared, beyond_shared * programs / self.l2)

    def move_seconds(self, moved: float) -> float:
        """Seconds to move that many bytes once, from the nearest memory that holds them."""
        return moved / (self.l2 if moved <= self.l2_bytes else self.dram)


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Between measured points on a logarithmic axis; beyond them, the nearest."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 + share * (y1 - y0)
    return points[-1][1]


@dataclass(frozen=True)
class StepFloor:
    """The floor of one time step of one layer, all directions, and what it is made of, in s."""

    seconds: float
    arithmetic: float
    weights: float
    exchange: float
    roundtrip: float
    hidden_tiles: int
    batch_tiles: int

    @property
    def bound_by(self) -> str:
        """The largest term."""
        terms = ("arithmetic", "weights", "exchange", "roundtrip")
        return max(terms, key=lambda term: getattr(self, term))


@lru_cache(maxsize=4096)
def step_floor(
    cell_gates: int, dtype: str, B: int, H: int, directions: int, limits: Limits, backward: bool,
    multiprocessors: int,
) -> StepFloor:  # fmt: skip
    """The least over all ways to spread a step over that many multiprocessors."""
    per_direction = max(multiprocessors // directions, 1)
    share = max(directions / multiprocessors, 1)  # directions that must take turns
    size, G = BYTES[dtype], cell_gates
    rate = limits.rate(dtype) / limits.multiprocessors
    best = None
    for hidden in range(1, min(per_direction, H) + 1):
        batch = min(max(per_direction // hidden, 1), B)
        rows, units = math.ceil(B / batch), math.ceil(H / hidden)
        padded = rows if limits.caches else max(rows, TENSOR_ROWS)
        programs = hidden * batch * directions
        arithmetic = share * 2 * padded * G * units * H / rate
        weights = share * limits.weights_seconds(G * units * H * size, programs)
        width = G * H if backward else H
        exchange = programs * rows * width * size / limits.l2 if hidden > 1 else 0.0
        trip = limits.trip(hidden)
        seconds = max(max(arithmetic, weights) + trip, exchange)
        if best is None or seconds < best.seconds:
            best = StepFloor(seconds, arithmetic, weights, exchange, trip, hidden, batch)
    assert best is not None
    return best


def step_of(shape: Shape, limits: Limits, backward: bool = False, among: int = 1) -> StepFloor:
    """The step of a shape, on the `among`-th part of the machine."""
    return step_floor(
        shape.gates, shape.dtype, shape.B, shape.H, shape.directions, limits, backward,
        max(limits.multiprocessors // among, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class CallFloor:
    """The floor of one call, and its three bounds, in seconds."""

    seconds: float
    loop: float
    arithmetic: float
    memory: float
    flops: float
    moved_bytes: float

    @property
    def bound_by(self) -> str:
        return max(("loop", "arithmetic", "memory"), key=lambda term: getattr(self, term))


def batch_sizes(shape: Shape) -> dict[int, int]:
    """How many time steps have so many rows."""
    if not shape.lengths:
        return {shape.B: shape.T}
    lengths = length_list(shape.lengths, shape.T, shape.B)
    return Counter(sum(length > t for length in lengths) for t in range(shape.T))


def loop_seconds(shape: Shape, limits: Limits, backward: bool) -> float:
    """All time steps of all layers, one pass."""
    layers = shape.layers
    steps = batch_sizes(shape)

    def one_layer(among: int) -> float:
        return sum(
            count * step_of(replace(shape, B=rows), limits, backward, among).seconds
            for rows, count in steps.items()
        )

    in_turn = layers * one_layer(1)
    if layers == 1 or shape.bidirectional or limits.multiprocessors < layers:
        return in_turn
    # Layer l at step t runs beside layer l+1 at step t-1: T steps and a start of L - 1.
    return min(in_turn, one_layer(layers) * (shape.T + layers - 1) / shape.T)


def call_flops(shape: Shape, which: str) -> float:
    """Multiplications and additions of the matrix products of a call.

    Forward: 2 * G * H * (I + H) for every time step, row, layer and direction. Backward twice
    that: the gradients of the operands are two products of the same size.
    """
    D, G, H = shape.directions, shape.gates, shape.H
    inputs = shape.I + (shape.layers - 1) * D * H
    forward = 2.0 * steps_in(shape) * D * G * H * (inputs + shape.layers * H)
    return 3 * forward if which == "training" else forward


def call_bytes(shape: Shape, which: str) -> float:
    """The bytes that a call must move: inputs, weights, outputs; in training, their gradients."""
    D, G, H, size = shape.directions, shape.gates, shape.H, BYTES[shape.dtype]
    inputs = shape.I + (shape.layers - 1) * D * H
    weights = D * G * H * (inputs + shape.layers * (H + 2))
    rows = steps_in(shape)
    moved = size * (rows * shape.I + weights + rows * D * H)
    return float(2 * moved if which == "training" else moved)


def call_floor(shape: Shape, which: str, limits: Limits) -> CallFloor | None:
    """The floor of a call; None where the machine's rate for the dtype is not known."""
    if shape.dtype not in limits.flops:
        return None
    loop = loop_seconds(shape, limits, backward=False)
    if which == "training":
        loop += loop_seconds(shape, limits, backward=True)
    flops, moved = call_flops(shape, which), call_bytes(shape, which)
    arithmetic, memory = flops / limits.rate(shape.dtype), limits.move_seconds(moved)
    seconds = limits.launch + max(loop, arithmetic, memory)
    return CallFloor(seconds, loop, arithmetic, memory, flops, moved)


# Measuring. Each is the best of several repeats: a limit is what the machine can do.


def measure_limits(device: Device, show: Callable[[str], None] = lambda line: None) -> Limits:
    """All rates of the machine; takes seconds. What fails is named in `failed`."""
    cuda = device.torch.type == "cuda"
    measured, failed = (_measure_cuda if cuda else _measure_cpu)(device, show)
    limits = replace(measured, failed=failed)
    for name, why in failed.items():
        show(f"limit {name}: not measured, {why}")
    return limits


def measure_apart(wanted: str = "") -> Limits | None:
    """`measure_limits` in a process of its own: what breaks the device there breaks nothing here.

    Returns None, and says why, where it did.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure_and_print, wanted).result()
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        print(f"no limits: {type(failure).__name__}: {lines[0] if lines else ''}", flush=True)
        return None


def _measure_and_print(wanted: str) -> Limits:
    return measure_limits(pick_device(wanted), lambda line: print(line, flush=True))


def _try(failed: dict[str, str], name: str, call: Callable[[], float], default: float) -> float:
    try:
        return call()
    except Exception as failure:
        if is_sticky(failure):
            raise
        failed[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:150]}"
        return default


def best_seconds(device: Device, call: Callable[[], object], repeats: int = 25) -> float:
    """The fastest of `repeats` calls, or of as many as half a second takes."""
    once = max(device.time_calls([call])[0], 1e-6)
    return min(device.time_calls([call] * min(repeats, math.ceil(0.5 / once))))


def matmul_rate(device: Device, dtype: str, size: int) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    set_precision(dtype)
    a, b = (
        torch.randn(size, size, device=device.torch, dtype=TORCH_DTYPES[dtype]) for _ in range(2)
    )
    return 2.0 * size**3 / best_seconds(device, lambda: a @ b)


def copy_rate(device: Device, size: int) -> float:
    """Bytes/s read and written by a copy of `size` bytes."""
    source = torch.ones(size // 4, device=device.torch)
    target = torch.empty_like(source)
    return 2.0 * size / best_seconds(device, lambda: target.copy_(source))


def matvec_rate(device: Device, side: int, calls: int) -> float:
    """Bytes/s of a matrix that matrix-vector products read over and over."""
    matrix = torch.randn(side, side, device=device.torch)
    vector = torch.randn(side, device=device.torch)
    out = torch.empty_like(vector)

    def several():
        for _ in range(calls):
            torch.mv(matrix, vector, out=out)

    return calls * matrix.nbytes / best_seconds(device, several)


def _measure_cpu(device: Device, show) -> tuple[Limits, dict[str, str]]:
    failed: dict[str, str] = {}
    flops = {}
    rate = _try(failed, "flops fp32-exact", lambda: matmul_rate(device, "fp32-exact", 768), 0.0)
    if rate:
        flops["fp32-exact"] = rate
        show(f"limit fp32-exact: {rate / 1e9:.0f} GFLOP/s")
    caches = []
    for side in (64, 128, 256, 512, 1024, 2048):
        calls = max(1, 2**20 // side**2)
        rate = _try(failed, f"matvec {side}", lambda s=side, n=calls: matvec_rate(device, s, n), 0)
        if rate:
            caches.append((4 * side * side, rate))
    # A smaller matrix is no slower to read; the dips of small ones are the cost of the call.
    for n in reversed(range(len(caches) - 1)):
        caches[n] = (caches[n][0], max(caches[n][1], caches[n + 1][1]))
    show("limit weights: " + ", ".join(f"{s >> 10} KiB {r / 1e9:.0f} GB/s" for s, r in caches))
    dram = _try(failed, "dram", lambda: copy_rate(device, 1 << 27), math.inf)
    l2 = _try(failed, "cache", lambda: copy_rate(device, 1 << 20), dram)
    one = torch.zeros(1)
    launch = best_seconds(device, lambda: [one.add_(1) for _ in range(100)]) / 100
    show(f"limit memory: {dram / 1e9:.0f} GB/s, launch: {launch * 1e6:.2f} us")
    limits = Limits(
        device.name, 1, flops, dram, max(l2, dram), math.inf, 0, 0, 1 << 20, launch,
        caches=tuple(caches),
    )  # fmt: skip
    # JSON has no infinity; a CPU has no shared memory to wait for.
    return replace(limits, shared=0.0), failed


def _measure_cuda(device: Device, show) -> tuple[Limits, dict[str, str]]:
    from bench import limits_kernels as kernels

    failed: dict[str, str] = {}
    properties = device.properties  # pyright: ignore[reportAttributeAccessIssue]
    flops = {}
    for dtype in BYTES:
        size = 4096 if dtype == "fp32-exact" else 8192
        rate = _try(failed, f"flops {dtype}", lambda d=dtype, n=size: matmul_rate(device, d, n), 0)
        if rate:
            flops[dtype] = rate
            show(f"limit {dtype}: {rate / 1e12:.0f} TFLOP/s")
    dram = _try(failed, "dram", lambda: copy_rate(device, 1 << 31), math.inf)
    l2 = _try(failed, "l2", lambda: kernels.l2_rate(device), dram)
    nominal = 128 * float(getattr(properties, "clock_rate", 0) or 1.7e6) * 1e3
    shared = _try(failed, "shared", lambda: kernels.shared_rate(device), nominal)
    launch = _try(failed, "launch", lambda: kernels.launch_seconds(device), 0.0)
    show(
        f"limit memory: {dram / 1e12:.2f} TB/s, L2: {l2 / 1e12:.2f} TB/s, shared: "
        f"{shared / 1e9:.0f} GB/s a multiprocessor, launch: {launch * 1e6:.2f} us"
    )
    trips = roundtrips(device, failed)
    line = ", ".join(f"{n}: {s * 1e6:.2f}" for n, s in trips.items())
    show(f"limit round trip, us by programs: {line}")
    limits = Limits(
        device.name, properties.multi_processor_count, flops, dram, l2, shared,
        # Half the registers: the other half holds h, the sums and the addresses.
        128 << 10, kernels.shared_bytes(device), properties.L2_cache_size, launch, trips,
        clocks=clocks(
            lambda probe, repeats: kernels.run_probe(device, kernels.PROBES[probe], repeats),
            failed, properties.multi_processor_count, 0.0 if "l2" in failed else l2,
        ),
    )  # fmt: skip
    show("limit clocks: " + ", ".join(f"{n} {c:.4g}" for n, c in limits.clocks.items()))
    return limits, failed


def clocks(
    run: Callable[[str, int], tuple[float, float]],
    failed: dict[str, str],
    multiprocessors: int,
    l2: float,
) -> dict[str, float]:
    """The step-cost meter's parameters, by its names, in clock cycles.

    Most are a probe of the same name in `limits_kernels`: a long run less a short one, the best of
    several each, per operation. The others follow:

        clock_ghz           clocks over nanoseconds of a long run
        poll_phase          half of the time from one poll to the next: so late does a poll see
                            a word on average
        store_visible       from a store to the moment where another multiprocessor's load can see
                            it: a trip of `hand_over` less what the poll adds, its phase and the
                            way back of its load, half of l2_load
        l2_bytes_per_clock  of one multiprocessor while all of them read

    Args:
        run: (probe, repeats) -> clocks and nanoseconds of a run.
        l2: bytes/s of all multiprocessors together, 0 where not known.
    Returns:
        what could be measured; the rest is named in `failed`.
    """
    from bench.limits_kernels import PROBES

    found: dict[str, float] = {}

    def measure(name: str, call: Callable[[], float]) -> None:
        def positive() -> float:
            value = call()
            if not value > 0:
                raise ValueError(f"came out as {value:.3g}, which is noise or a wrong model")
            return value

        value = _try(failed, f"clocks {name}", positive, 0.0)
        if value:
            found[name] = value

    def each(name: str) -> float:
        probe = PROBES[name]
        short, long = (
            min(run(name, n)[0] for _ in range(5)) for n in (probe.repeats, 2 * probe.repeats)
        )
        return (long - short) / (probe.repeats * probe.each)

    def clock() -> float:
        # Tens of milliseconds: %globaltimer advances once a microsecond on some GPUs.
        runs = [run("special", 60 * PROBES["special"].repeats) for _ in range(5)]
        return max(cycles / nanoseconds for cycles, nanoseconds in runs)

    measure("clock_ghz", clock)
    for name in PROBES:
        measure(name, lambda n=name: each(n))
    steps = ("poll", "hand_over")  # measured for what follows from them

    def known(name: str) -> float:
        if name not in found:
            raise ValueError(f"{name} was not measured")
        return found[name]

    measure("poll_phase", lambda: known("poll") / 2)
    measure(
        "store_visible", lambda: known("hand_over") - known("l2_load") / 2 - known("poll_phase")
    )
    measure("l2_bytes_per_clock", lambda: l2 / multiprocessors / (known("clock_ghz") * 1e9))
    return {name: value for name, value in found.items() if name not in steps}


def roundtrips(
    device: Device,
    failed: dict[str, str],
    roundtrip: Callable[..., float] | None = None,
    counts: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 96, 128),
) -> dict[int, float]:
    """Seconds per step of an exchange, by the number of programs."""
    if roundtrip is None:
        from bench.roundtrip import roundtrip

    trips = {}
    for programs in counts:
        microseconds = _try(
            failed, f"round trip {programs}",
            lambda n=programs: roundtrip(n, device.torch, steps=1000), 0.0,
        )  # fmt: skip
        # A difference of two runs: noise can make it zero or less, which is no measurement.
        if microseconds > 0:
            trips[programs] = microseconds * 1e-6
    return trips


def table(limits: Limits, some: list[Shape]) -> str:
    """Floors of some shapes, for people."""
    lines = [f"{'shape':46} {'step us':>8} {'bound by':>11} {'tiles':>8} {'training ms':>12}"]
    for shape in some:
        if shape.dtype not in limits.flops:
            continue
        step = step_of(shape, limits)
        training = call_floor(shape, "training", limits)
        assert training is not None
        lines.append(
            f"{shape.key:46} {step.seconds * 1e6:8.3f} {step.bound_by:>11} "
            f"{step.hidden_tiles:>4}x{step.batch_tiles:<3} {training.seconds * 1e3:12.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    from bench import results, shapes

    parser = argparse.ArgumentParser(prog="python -m bench.limits")
    parser.add_argument("--out", type=Path, help="results file to put them into, made or extended")
    options = parser.parse_args(arguments)
    device = pick_device()
    content = None
    if options.out:
        try:
            before = results.load(options.out) if options.out.exists() else None
            content = results.begin(device, before)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    limits = measure_limits(device, print)
    if content is not None:
        results.save({**content, "limits": limits.as_dict()}, options.out)
    cuda = device.torch.type == "cuda"
    plan = shapes.gpu_plan() if cuda else shapes.cpu_plan()
    some = [p.shape for p in plan if p.tier in ("headline", "workloads")]
    print(table(limits, some))
    return 0


if __name__ == "__main__":
    sys.exit(main())
