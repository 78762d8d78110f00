"""What a GPU can do at best, and whether the plan's estimate orders its candidates as it does.

    python -m bench.floor --out FILE                  rates, bandwidths, round trips
    python -m bench.floor --out FILE --calibrate 75   in so many seconds: candidates, timed

Both extend one results file. `limits` is what `bench.shapes.floor_ms` takes, in FLOP/s, bytes/s
and seconds. A `roundtrip` among so many programs is a step of a plain RNN of 16 rows and 8 units a
program, which is little but the exchange: store -> L2 -> load. `clocks` are parameters of the
meter (bench/step_cost.py). `calibration` is what `bench.aot.rank` says of measured times: the
offset of its straight line is what `plan.TRIP` is off by.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from bench.aot import DTYPES, Candidate, Named, every_candidate, rank
from bench.backends import TORCH_DTYPES, set_precision
from bench.run import ahead, begin, describe, load, save
from bench.timing import Device, is_sticky, pick_device
from fusedrnn import cells
from fusedrnn.call import Weights
from fusedrnn.kernels.plan import Plan, plan_scan
from fusedrnn.packing import Rows

STEPS = 400
PROGRAMS = (2, 8, 32, 64, 96, 128)


@triton.jit
def read_kernel(
    x_ptr,  # [blocks * BLOCK]
    out_ptr,  # [programs * BLOCK]
    blocks,
    repeats,
    BLOCK: tl.constexpr,
):
    """Reads `repeats` blocks past L1, each program beginning elsewhere."""
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    block = program * 37 % blocks
    for _ in range(repeats):
        total += tl.load(x_ptr + block * BLOCK + offs, cache_modifier=".cg")
        block += 1
        block = tl.where(block == blocks, 0, block)
    tl.store(out_ptr + program * BLOCK + offs, total)


@triton.jit
def empty_kernel(x_ptr):
    pass


def slope(device: Device, call, count: int) -> float:
    """Seconds of one of `call(count)`'s operations: a long run less a short one, so that launch
    and the first touch do not count.

    Raises:
        ValueError: noise was larger than the difference.
    """
    times = []
    for n in (count, 2 * count):
        call(n)  # compiles, which is not to be taken for the length of a call
        times.append(device.best_seconds(lambda n=n: call(n)))
    if times[1] <= times[0]:
        raise ValueError(f"{2 * count} repeats took {times[1]:.3g} s, {count} {times[0]:.3g} s")
    return (times[1] - times[0]) / count


def matmul_rate(device: Device, dtype: str, size: int) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    set_precision(dtype)
    options = {"device": device.torch, "dtype": TORCH_DTYPES[dtype]}
    a, b = (torch.randn(size, size, **options) for _ in range(2))
    return 2.0 * size**3 / device.best_seconds(lambda: a @ b)


def copy_rate(device: Device, size: int) -> float:
    """Bytes/s read and written by a copy of `size` bytes."""
    source = torch.ones(size // 4, device=device.torch)
    target = torch.empty_like(source)
    return 2.0 * size / device.best_seconds(lambda: target.copy_(source))


def l2_rate(device: Device, programs: int, size: int = 16 << 20, block: int = 8192) -> float:
    """Bytes/s of reads that hit L2 and miss L1, all multiprocessors together."""
    x = torch.randint(1 << 20, (size // 4,), dtype=torch.int32, device=device.torch)
    out = torch.empty(programs * block, dtype=torch.int32, device=device.torch)

    def call(repeats: int) -> None:
        read_kernel[(programs,)](
            x_ptr=x, out_ptr=out, blocks=size // 4 // block, repeats=repeats, BLOCK=block,
            num_warps=16,
        )  # fmt: skip

    return programs * block * 4 / slope(device, call, 256)


def launch_seconds(device: Device, count: int = 200) -> float:
    """From one launch to the next, of a kernel that does nothing, replayed from a graph."""
    x = torch.empty(1, device=device.torch)

    def several():
        for _ in range(count):
            empty_kernel[(1,)](x_ptr=x, num_warps=1)
        return (x,)

    return device.best_seconds(device.graph(several)) / count


def step_seconds(device: Device, layer: Named, pass_: str, plan: Plan, steps: int = STEPS) -> float:
    """Seconds of a step of the time loop of one layer, without the products around it."""
    from fusedrnn.kernels.launch import check, scan_backward, scan_forward

    cell, B, H = cells.get(layer.cell), layer.B, layer.H
    G, dtype = len(cell.gates), DTYPES[layer.dtype]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device.torch).to(dtype)

    w_hh = draw(G * H, H) / H**0.5
    weights = [Weights(w_hh, w_hh, None, draw(G * H), None, ())]
    state = tuple(draw(1, B, H) for _ in cell.states)

    def call(n: int):
        x_gates, options = runs[n]
        if pass_ == "forward":
            return scan_forward(cell, x_gates, weights, state, plan=plan, **options)
        output, _, saved, _, states = kept[n]
        return scan_backward(
            cell, output, state, weights, state, output, states, saved, plan=plan, **options
        )

    runs, kept = {}, {}
    for n in (steps, 2 * steps):
        rows = Rows(n, B, B, 1)
        runs[n] = (draw(n * B, 1, G, H), {"rows": rows, "save": "gates", "input_precision": "tf32"})
        if pass_ == "backward":
            kept[n] = scan_forward(cell, runs[n][0], weights, state, **runs[n][1])
    call(steps)
    check(device.torch)  # a launch that timed out would be timed
    return slope(device, call, steps)


def measure(device: Device) -> dict:
    """The `limits` of a GPU; takes half a minute. What fails is named in `failed`.

    Raises:
        RuntimeError: the device cannot go on.
    """
    from fusedrnn.kernels.launch import device_of

    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    properties, gpu = device.properties, device_of(device.torch)
    count = properties.multi_processor_count

    def trip(programs: int) -> float:
        layer = Named("rnn_tanh", "bf16", 8 * programs, 16)
        plan = plan_scan(
            cells.get(layer.cell), "forward", torch.bfloat16, B=16, H=layer.H, D=1, device=gpu
        )
        return step_seconds(device, layer, "forward", plan)

    measurements = {
        **{
            d: lambda d=d: matmul_rate(device, d, 4096 if "exact" in d else 8192)
            for d in TORCH_DTYPES
        },
        "dram": lambda: copy_rate(device, 1 << 31),
        "l2": lambda: l2_rate(device, 2 * count),
        "launch": lambda: launch_seconds(device),
        **{f"trip {n}": lambda n=n: trip(n) for n in PROGRAMS if n <= count},
    }
    for name, call in measurements.items():
        try:
            found[name] = call()
            print(f"{name}: {found[name]:.4g}", flush=True)
        except Exception as failure:
            if is_sticky(failure):
                raise
            failed[name] = describe(failure)
            print(f"{name}: not measured, {failed[name]}", flush=True)
    clocks, hertz = {}, 1e3 * float(getattr(properties, "clock_rate", 0))
    if hertz and "l2" in found:
        clocks = {"clock_ghz": hertz / 1e9, "l2_bytes_per_clock": found["l2"] / count / hertz}
    dram = found.get("dram", 1e15)
    return {
        "device": device.name, "multiprocessors": count,
        "flops": {d: found[d] for d in TORCH_DTYPES if d in found},
        "dram": dram, "l2": found.get("l2", dram), "l2_bytes": properties.L2_cache_size,
        "launch": found.get("launch", 0.0),
        "roundtrip": {n: found[f"trip {n}"] for n in PROGRAMS if f"trip {n}" in found},
        "clocks": clocks, "failed": failed,
    }  # fmt: skip


def compile_candidate(candidate: Candidate) -> str:
    """Runs a step of it; what went wrong, or ""."""
    try:
        step_seconds(pick_device("cuda"), *candidate, steps=1)
    except ValueError:  # noise: two steps need not take longer than one
        return ""
    except Exception as failure:
        return f"{candidate[0].name}: {describe(failure)}"
    return ""


def time_candidates(device: Device, some: list[Candidate], in_time: Callable[[], bool]):
    """Candidates with microseconds of a step, or why not, while there is time."""
    broken = ""
    for candidate in some:
        found = broken or ("" if in_time() else "the budget was spent")
        if not found:
            try:
                found = 1e6 * step_seconds(device, *candidate)
            except Exception as failure:
                found = describe(failure)
                broken = found if is_sticky(failure) else ""
        yield candidate, found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.floor", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="results file, made or extended")
    parser.add_argument("--calibrate", type=float, metavar="SECONDS", help="time candidates")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        device = pick_device("cuda")
        content = begin(device, load(options.out) if options.out.exists() else None)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.calibrate is None:
        content["limits"] = measure(device)
    else:
        from fusedrnn.kernels.launch import device_of

        gpu = device_of(device.torch)
        some = every_candidate(gpu)
        print(ahead(compile_candidate, some, options.calibrate / 2), flush=True)
        timed = time_candidates(device, some, lambda: time.monotonic() - start < options.calibrate)
        content["calibration"] = rank(timed, gpu)
        print("\n".join(content["calibration"]))
    save(content, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
