"""Host time: from a call of a module to the launch, with kernels that do nothing; on a CPU.

    python -m bench.overhead --out FILE    into a results file, made or extended

On a GPU this time passes before a launch, and is hidden only behind launches before it. The plan,
and the memory through which programs exchange, are those of an H100; Triton's own part of a launch
is left out. Beside it is, for the same calls, `backend="aten"` and torch.nn itself, with what they
compute. Each is the best of many calls on one thread, all taking turns: what else runs on a machine
only adds.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.run import begin, load, save
from bench.timing import Device

LAYERS = (1, 2, 4)
PASSES = ("inference", "forward", "step")  # a step: forward and backward
T, B, H = 2, 2, 64


class Stub:
    """Stands for a kernel: launching it does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: None


def best_us(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Microseconds of the fastest call of each; they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            best[name] = min(best[name], 1e6 * (time.thread_time() - start))
    return best


def step(module: torch.nn.Module, x: torch.Tensor) -> None:
    """A training step without an optimizer."""
    output = module(x)[0]
    output.backward(torch.ones_like(output))


def measure(repeats: int) -> list[dict]:
    """A row for each pass and number of directions; lists are by LAYERS."""
    import fusedrnn
    from bench.aot import TARGETS
    from fusedrnn.kernels import launch

    device_of, launch.device_of = launch.device_of, lambda device: TARGETS["sm_90"]
    kernels = launch.scan_forward_kernel, launch.scan_backward_kernel
    launch.scan_forward_kernel = launch.scan_backward_kernel = Stub()
    rows, x = [], torch.randn(T, B, H)
    try:
        for pass_ in PASSES:
            for directions in (1, 2):
                row = {
                    "call": f"lstm float32 T={T} B={B} I={H} H={H}", "pass": pass_,
                    "directions": directions, "layers": LAYERS,
                    "triton_us": [], "aten_us": [], "torch_nn_us": [],
                }  # fmt: skip
                for layers in LAYERS:
                    options = {"num_layers": layers, "bidirectional": directions == 2}
                    modules = {
                        "triton": fusedrnn.LSTM(H, H, **options),
                        "aten": fusedrnn.LSTM(H, H, **options),
                        "torch_nn": torch.nn.LSTM(H, H, **options),
                    }
                    modules["triton"].backend, modules["aten"].backend = "triton", "aten"
                    call = step if pass_ == "step" else torch.nn.Module.__call__
                    calls = {name: functools.partial(call, m, x) for name, m in modules.items()}
                    with torch.set_grad_enabled(pass_ != "inference"):
                        best_us(calls, 3)
                        found = best_us(calls, repeats)
                    for name, value in found.items():
                        row[f"{name}_us"].append(round(value, 1))
                rows.append(row)
    finally:
        launch.scan_forward_kernel, launch.scan_backward_kernel = kernels
        launch.device_of = device_of
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--out", type=Path, help="results file, made or extended")
    parser.add_argument("--repeats", type=int, default=1000, help="calls of each (default: 1000)")
    options = parser.parse_args(arguments)
    # Else kernels on a CPU are refused; read where Triton is imported, with the first of them.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    try:
        before = load(options.out) if options.out and options.out.exists() else None
        content = begin(Device(cpu_time=True), before)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    content["host"] = measure(options.repeats)
    for row in content["host"]:
        print({name: value for name, value in row.items() if name != "call"}, flush=True)
    if options.out:
        save(content, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
