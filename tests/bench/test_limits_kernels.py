"""The GPU's microbenchmarks without a GPU: compiled for sm_90, and run by the interpreter.

Each in its own process, since Triton decides at import which of the two it does.
"""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from bench.device import ROOT

pytest.importorskip("triton")
from bench import limits_kernels

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

# Which instruction, and how often, in the machine code of each probe: the loop itself, once or
# unrolled by the assembler. A chain that nobody needs would have vanished.
PROBES = """
import collections, json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import limits_kernels as kernels

signature = {"memory_ptr": "*i64", "out_ptr": "*i64", "repeats": "i32", "CODE": "constexpr",
             "THREADS": "constexpr"}
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
found = {}
for name, probe in kernels.PROBES.items():
    source = ASTSource(kernels.clocks_kernel, signature,
                       {"CODE": probe.code, "THREADS": 32 * probe.warps})
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": probe.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True,
                              check=True).stdout
    between = sass[sass.index("SR_CLOCKLO") : sass.rindex("SR_CLOCKLO")]
    found[name] = collections.Counter(re.findall(
        r"[*]/ +(?:@!?U?P\\d+ +)?([A-Z][A-Z0-9._]+)", between))
print(json.dumps([triton.__version__, found]))
"""
EXPECTED = {
    "l2_load": "LDG.E.64.STRONG.GPU", "dram_load": "LDG.E.64.STRONG.GPU",
    "poll": "LDG.E.STRONG.GPU", "hand_over": "STG.E.STRONG.GPU", "shared_load": "LDS",
    "ldmatrix": "LDSM.16.M88.4",
    "shuffle": "SHFL.IDX", "special": "MUFU.EX2", "mma": "HMMA.16816.F32.BF16",
    "barrier": "BAR.SYNC.DEFER_BLOCKING", "special_clocks": "MUFU.EX2",
    "mma_clocks": "HMMA.16816.F32.BF16",
}  # fmt: skip
# The Triton that is installed, and those that `make aot` has put beside it.
TRITONS = ["", *map(str, sorted((ROOT / "out").glob("triton-*")))]


@pytest.mark.parametrize("folder", TRITONS)
def test_probes_compile_to_what_they_time(folder):
    path = os.pathsep.join(filter(None, [folder, str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-c", PROBES],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, found = json.loads(done.stdout)
    assert folder.endswith(version) or not folder
    assert set(found) == set(EXPECTED)
    for name, instruction in EXPECTED.items():
        # A poll is a loop of its own within a repeat, and a hand-over takes two programs.
        each = 1 if name in ("poll", "hand_over") else limits_kernels.PROBES[name].each
        count = found[name].get(instruction, 0)
        assert count, (name, found[name])
        assert count % each == 0, (name, count, each)


def test_a_cycle_visits_every_line_once():
    address, size = 1 << 20, 128 * 50
    words = limits_kernels.cycle(size, address)
    assert words.numel() * words.element_size() == size
    at, seen = address, []
    for _ in range(50):
        seen.append(at)
        at = words[(at - address) // 8].item()
    assert at == address
    assert len(set(seen)) == 50
    steps = {b - a for a, b in pairwise(seen)}
    assert len(steps) > 25  # no pattern that a prefetcher could follow


def test_a_cold_run_reads_no_line_twice():
    probe = limits_kernels.PROBES["dram_load"]
    assert probe.cold
    assert 2 * probe.repeats * probe.each < probe.cycle // 128
    warm = limits_kernels.PROBES["l2_load"]
    assert not warm.cold
    assert warm.cycle // 128 > warm.repeats * warm.each / 2


class Launches:
    """Stands for the kernel: thread i of program p takes 100 * p + i clocks."""

    def __init__(self, value=0):
        self.value, self.grids, self.memory = value, [], None

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *, memory_ptr, out_ptr, THREADS, num_warps, **options):
        assert out_ptr.shape == (*grid, 3, THREADS)
        assert 32 * num_warps == THREADS
        assert options["launch_cooperative_grid"] == (grid != (1,))
        self.grids.append(grid)
        self.memory = memory_ptr.clone(), memory_ptr.data_ptr()
        clocks = 100 * torch.arange(grid[0])[:, None] + torch.arange(THREADS)
        out_ptr.copy_(torch.stack([clocks, 2 * clocks, torch.full_like(clocks, self.value)], 1))


@pytest.fixture
def launches(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    fake = Launches()
    monkeypatch.setattr(limits_kernels, "clocks_kernel", fake)
    return fake


def test_a_run_of_a_probe(launches):
    flushed = []
    device = SimpleNamespace(torch="cpu", flush=lambda: flushed.append(True))
    probes = limits_kernels.PROBES
    assert limits_kernels.run_probe(device, probes["mma"], 7) == (15.5, 31.0)
    # An even number of programs, in pairs: the mean over 4 of them.
    assert limits_kernels.run_probe(device, probes["hand_over"], 7) == (165.5, 331.0)
    assert not flushed
    limits_kernels.run_probe(device, probes["dram_load"], 7)
    assert flushed == [True]
    assert launches.grids == [(1,), (4,), (1,)]
    words, address = launches.memory
    assert words.nbytes == probes["dram_load"].cycle
    assert address <= words[0] < address + words.nbytes


def test_a_hand_over_without_a_partner(launches):
    launches.value = 1
    device = SimpleNamespace(torch="cpu")
    with pytest.raises(RuntimeError, match="waited in vain"):
        limits_kernels.run_probe(device, limits_kernels.PROBES["hand_over"], 7)
    limits_kernels.run_probe(device, limits_kernels.PROBES["special"], 7)


@pytest.mark.parametrize(("script", "interpreted"), [(COMPILE, "0"), (INTERPRET, "1")])
def test_kernels(script, interpreted):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": interpreted}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
