"""The GPU's microbenchmarks without a GPU: compiled for sm_90, and run by the interpreter.

Each in its own process, since Triton decides at import which of the two it does.
"""

import os
import subprocess
import sys

import pytest

from bench.device import ROOT

pytest.importorskip("triton")

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import limits_kernels as kernels

def ptx(fn, signature, constexprs, warps):
    signature |= dict.fromkeys(constexprs, "constexpr")
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(2)}
    source = ASTSource(fn, signature, constexprs, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

read = ptx(kernels.read_kernel, {"x_ptr": "*i32", "out_ptr": "*i32", "blocks": "i32",
           "repeats": "i32"}, {"BLOCK": 8192}, 16)
loads = re.findall(r"ld\\.global\\S*", read)
assert loads and all(load == "ld.global.cg.v4.b32" for load in loads), loads

dot = ptx(kernels.dot_kernel, {"h_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32",
          "repeats": "i32"}, {"ROWS": 16, "K": 512, "N": 128}, 4)
labels = {m.group(1): m.start() for m in re.finditer(r"^(\\$L__\\S+):", dot, re.M)}
loops = [dot[labels[m.group(1)]:m.start()] for m in re.finditer(r"bra\\S*\\s+(\\$L__\\S+);", dot)
         if labels.get(m.group(1), len(dot)) < m.start()]
assert len(loops) == 1
assert loops[0].count("ldmatrix") * 512 * 4 == 192 * 1024, loops[0].count("ldmatrix")
ptx(kernels.empty_kernel, {"x_ptr": "*fp32"}, {}, 1)
"""

INTERPRET = """
from types import SimpleNamespace
import torch
from bench import limits_kernels as kernels
from bench.device import Device

torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    multi_processor_count=2, shared_memory_per_block_optin=1 << 17)

class Ticking(Device):
    elapsed = 0.0
    def time_calls(self, calls):
        calls[0]()
        Ticking.elapsed += 1.0
        return [Ticking.elapsed] * len(calls)
    def graph(self, call):
        return call

device = Ticking()
sign = -1 if kernels.l2_rate(device, 1 << 12, 64, 2) < 0 else 1   # the long run is timed first
bytes_read = 4 * 2 * 64 * 4
assert kernels.l2_rate(device, 1 << 12, 64, 2) == sign * bytes_read
moved = 32 * 32 * 2 + 4 * 16 * 32 * 2
assert kernels.shared_rate(device, 32, 32, 3) == sign * 3 * moved
assert kernels.launch_seconds(device, 2) == Ticking.elapsed / 2
assert kernels.shared_bytes(device) == 1 << 17
"""


@pytest.mark.parametrize(("script", "interpreted"), [(COMPILE, "0"), (INTERPRET, "1")])
def test_kernels(script, interpreted):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": interpreted}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
