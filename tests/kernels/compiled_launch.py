"""Launches compiled kernels on a machine without a GPU: Triton binds the arguments, specializes
on them and compiles as it would for a GPU, and `ptx_machine` executes what comes out.

For programs that have not put Triton into its interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np
import torch
import triton
from ptx_machine import Machine
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fusedrnn.kernels import launch
from fusedrnn.kernels.plan import Device


class Driver:
    """What binding and compiling ask of a driver."""

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # kernels are kept by device, and must not be by another target's

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def on_cpu(
    capability: tuple[int, int], seed: int = 0, without: str | None = None
) -> Iterator[list[Machine]]:
    """Within, kernels are compiled for that capability and executed on tensors of the host.

    seed: of the order in which the programs of a launch take turns.
    without: lines of PTX with this in them are left out.
    Yields what executed them, one machine for each launch so far.
    """
    compile_and_run, device_of = JITFunction.run, launch.device_of
    launched: list[Machine] = []

    def run(self, *, grid, warmup, **arguments):
        kernel = compile_and_run(self, grid=grid, warmup=True, **arguments)
        launched.append(execute(kernel, grid, arguments, seed, without))
        return kernel

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = run
    launch.device_of = lambda device: Device(capability, 132, 232_448, 233_472)
    try:
        yield launched
    finally:
        JITFunction.run, launch.device_of = compile_and_run, device_of


def execute(
    kernel, grid: tuple[int, int, int], arguments: dict, seed: int, without: str | None = None
) -> Machine:
    """Runs a kernel as compiled, with the arguments by name that it was compiled for."""
    parameters: list[int] = []
    memory: dict[int, np.ndarray] = {}

    def pass_on(kind, value) -> None:
        if isinstance(kind, tuple):
            for part, its_value in zip(kind, value, strict=True):
                pass_on(part, its_value)
        elif isinstance(value, torch.Tensor):
            parameters.append(value.data_ptr())
            memory[value.data_ptr()] = _bytes(value)
        elif kind != "constexpr":
            parameters.append(int(value))

    for name, kind in kernel.src.signature.items():
        if kind != "constexpr":
            pass_on(kind, arguments[name])
    parameters += [0, 0]  # scratch memory, which these kernels do not have
    lines = kernel.asm["ptx"].splitlines(keepends=True)
    ptx = "".join(line for line in lines if without is None or without not in line)
    machine = Machine(ptx, parameters, memory, grid, kernel.metadata.shared, seed)
    machine.run()
    return machine


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    size = tensor.numel() * tensor.element_size()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
