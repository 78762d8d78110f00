"""Everything of a launch but the launch: modules on a machine that pretends to have a GPU.

A program, run by `test_jit_binding.py` without the interpreter. A driver that knows only its
target lets Triton bind the arguments of every launch, specialize on them and compile; the kernels
are not run. Prints a JSON line for each launch: kernel, grid, shared memory, whether it waits for
a cooperative grid, and whether it was compiled for this launch.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.kernels import launch
from fusedrnn.kernels.plan import Device

H100 = Device((9, 0), 132, 232_448, 233_472)


class NoDriver:
    """What binding and compiling ask of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(run):
    compiled = set()

    def bind(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        record = {
            "kernel": self.fn.__name__,
            "grid": grid,
            "shared": kernel.metadata.shared,
            "cooperative": kernel.metadata.launch_cooperative_grid,
            "compiled": id(kernel) not in compiled,
        }
        compiled.add(id(kernel))
        print(json.dumps(record), flush=True)
        return kernel

    return bind


def main(module: str, H: int, dtype: str) -> None:
    triton.runtime.driver.set_active(NoDriver())
    JITFunction.run = compile_only(JITFunction.run)
    launch.device_of = lambda device: H100
    dispatch.REFUSES["triton"] = lambda call: None
    rnn = getattr(fusedrnn, module)(16, H, bidirectional=True, backend="triton")
    rnn.to(getattr(torch, dtype))
    for T, B in ((5, 3), (9, 4)):
        input = torch.randn(T, B, 16, dtype=getattr(torch, dtype), requires_grad=True)
        output, _ = rnn(input, lengths=torch.full((B,), T))
        output.sum().backward()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
