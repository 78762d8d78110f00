"""Compiles a time loop ahead of time, for a GPU that need not be here, and says what is wrong.

The plan of a job is compiled and read (bench.step_cost): registers, spills, shared memory, bank
conflicts, waits, and whether the code has what the design rests on. What is compiled of all that
could be, and the pages in bench/results/aot/, are bench/aot_suite.py's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.step_cost import parameters
from bench.step_cost.gate import gate
from bench.step_cost.read import Reading, disassemble, read
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.bind import bind
from fusedrnn.kernels.plan import Device, Plan
from fusedrnn.kernels.scan_backward import scan_backward_kernel
from fusedrnn.kernels.scan_forward import scan_forward_kernel
from fusedrnn.kernels.state_ops import StateOps
from fusedrnn.kernels.sync import Exchange

ROOT = Path(__file__).parent.parent

PRECISIONS = ("tf32", "ieee")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# A typical device of each: multiprocessors, shared memory of a program and of a multiprocessor.
TARGETS = {
    "sm_80": Device((8, 0), 108, 166912, 167936),
    "sm_86": Device((8, 6), 82, 101376, 102400),
    "sm_89": Device((8, 9), 128, 101376, 102400),
    "sm_90": Device((9, 0), 132, 232448, 233472),
    "sm_100": Device((10, 0), 148, 232448, 233472),
    "sm_120": Device((12, 0), 170, 101376, 102400),
}


@dataclass(frozen=True)
class Job:
    target: str
    cell: str
    which: str
    save: str
    dtype: str
    precision: str
    H: int
    plan: Plan
    plain: bool = False  # dense rows, one direction: as most calls are

    def key(self) -> str:
        p = self.plan
        chunks = f"{p.resident}/{p.chunks}x{p.block_k}/{p.split_k} +{p.prefetch}"
        tile = f"{p.block_b}x{p.block_h} {chunks}"
        return " ".join(
            [self.target, self.cell, self.which, self.save, self.dtype, self.precision]
            + [f"H={self.H}", p.schedule, tile, str(p.num_warps), str(p.max_registers)]
            + ["plain"] * self.plain
        )


def arguments(job: Job) -> dict[str, Any]:
    """Types of the kernel's pointers and integers, values of its constants."""
    cell, plan = REGISTRY[job.cell], job.plan
    G, K, S, P = len(cell.gates), len(cell.saved), len(cell.states), len(cell.params)
    sequence = f"*{job.dtype}"
    D = 1 if job.plain else 2
    recompute = job.save == "states" and K > 0
    values: dict[str, Any] = {
        **dict.fromkeys(("x_gates_ptr", "output_ptr"), sequence),
        **dict.fromkeys(("w_ptrs", "b_hh_ptrs"), (sequence,) * D),
        **dict.fromkeys(("d_output_ptr", "dx_gates_ptr"), sequence),
        **dict.fromkeys(("state_ptrs", "final_ptrs"), (sequence,) * S),
        **dict.fromkeys(("d_final_ptrs", "d_state_ptrs"), (sequence,) * S),
        "param_ptrs": ((sequence,) * D,) * P,
        "d_param_ptrs": ("*fp32",) * P,
        "saved_ptr": sequence if K else None,
        "states_ptr": sequence if S > 1 else None,
        "kept_ptrs": (sequence, sequence) if recompute else (sequence,) if K else (),
        "dh_gates_ptr": None if cell.additive else sequence,
        "offsets_ptr": None if job.plain else "*i64",
        "lengths_ptr": None if job.plain else "*i64",
        "exchange": Exchange(sequence, "*i32", "*i32", *["i32"] * 3),
        **dict.fromkeys(("T", "B", "first_b", "first_d", "stride_t", "stride_b"), "i32"),
        # What regularizes is off: it adds loads and selects, and no product.
        "ops": StateOps(),
        "d_reset_state_ptrs": (),
        "CELL": bind(cell.forward),
        "CELL_FORWARD": bind(cell.forward) if recompute else None,
        "CELL_BACKWARD": bind(cell.backward),
        "KEPT": G if recompute else K,
        "G": G,
        "H": job.H,
        "D": D,
        "PRECISION": job.precision,
        "PLAN": replace(plan, batch_per_launch=None, directions_per_launch=None),
    }
    return values


def require_compiler() -> None:
    """Raises RuntimeError where Triton interprets kernels, and compiles none."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: there is nothing to compile then")


def compile_job(job: Job):
    """The compiled kernel."""
    kernel = scan_forward_kernel if job.which == "forward" else scan_backward_kernel
    values = arguments(job)
    signature, constants, attributes = {}, {}, {}
    exchange = kernel.arg_names.index("exchange")

    def describe(value, path, constant):
        if isinstance(value, tuple) and not constant:
            parts = [describe(v, (*path, i), constant) for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or constant:
            constants[path] = value
            return "constexpr"
        if value.startswith("*") or path[0] == exchange:
            attributes[path] = [["tt.divisibility", 16]]  # as torch and `sync` allocate
        return value

    for i, name in enumerate(kernel.arg_names):
        signature[name] = describe(values[name], (i,), kernel.params[i].is_constexpr)
    device = TARGETS[job.target]
    capability = device.capability[0] * 10 + device.capability[1]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=job.plan.options(device),
    )


def resources(compiled) -> dict[str, int]:
    """Registers, bytes spilled and shared memory of one program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", told)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "spill": stack + local, "shared": compiled.metadata.shared}


def time_loop(ttgir: str) -> list[str]:
    """The lines of the longest loop."""
    lines, longest = ttgir.splitlines(), []
    for first, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        depth = 0
        for last in range(first, len(lines)):
            depth += lines[last].count("{") - lines[last].count("}")
            if depth == 0:
                longest = max(longest, lines[first:last], key=len)
                break
    return longest


def faults(job: Job, compiled, reading: Reading) -> list[str]:
    """What the design relies on and the compiled code has not."""
    if not job.plain:
        # Packed rows are found by an offset that is loaded first.
        reading = replace(reading, early=())
    found = gate(reading, job.target)
    plan, device = job.plan, TARGETS[job.target]
    cell, item = REGISTRY[job.cell], DTYPES[job.dtype].itemsize
    if reading.shared > device.shared_per_program:
        found.append(f"shared memory {reading.shared} > limit {device.shared_per_program}")
    promised = plan.shared_bytes(cell, job.which)
    if reading.shared > promised:
        found.append(f"shared memory {reading.shared} > planned {promised}")
    loop = time_loop(compiled.asm["ttgir"])
    ptx = compiled.asm["ptx"]
    products = ("tt.dot ", "warp_group_dot", "tc_gen5_mma")
    if not any(name in line for line in loop for name in products):
        found.append("no product in the time loop")
    if not re.search(r"mma\.sync|wgmma\.mma|tcgen05\.mma", ptx):
        found.append("no tensor-core instruction")
    if plan.resident == plan.chunks:
        # The ring is read past L1 (.cg, volatile); any other load of such a shape is a weight: see
        # `load_rhs_operand` in fragments.py.
        rows = plan.block_h // 8 * plan.split_k * 32
        shape = f"{2 * rows}x2x" if item == 4 else f"{rows}x4x"
        loads = [line for line in loop if "tt.load" in line or "async_copy" in line]
        loads = [line for line in loads if not re.search(r"= cg|isVolatile = true", line)]
        if any(f"tensor<{shape}!tt.ptr" in line for line in loads):
            found.append("weights are loaded in the time loop")
    if not re.search(r"(atom|red)\S*\.release", ptx):
        found.append("no release")
    if not re.search(r"atom\S*\.acquire|ld\S*\.acquire", ptx):
        found.append("no acquire")
    if not re.search(r"ld\S*\.relaxed", ptx):
        found.append("the exchange is read through L1")
    if "cp.async" in ptx:
        found.append("asynchronous copies, which may read the ring through L1")
    return found


def run_job(job: Job, B: int | None = None) -> dict[str, Any]:
    """Compiles and reads one kernel. For a batch B, a step's time is predicted as well."""
    compiled = compile_job(job)
    ptx, sass = compiled.asm["ptx"], disassemble(compiled.asm["cubin"])
    assumed = None if B is None else parameters.load(capability=job.target)
    reading = read(
        ptx, sass, job.plan, job.H, resources(compiled), B=B or 1,
        multiprocessors=TARGETS[job.target].multiprocessors, parameters=assumed,
    )  # fmt: skip
    return {
        **{k: v for k, v in asdict(job).items() if k != "plan"},
        "B": B,
        "plan": {k: v for k, v in asdict(job.plan).items() if v is not None},
        **asdict(reading),
        "faults": faults(job, compiled, reading),
    }


@functools.cache
def fingerprint() -> str:
    """Of all that decides which kernels there are and what they are compiled to, besides the
    version of Triton: lines that are only a comment are left out."""
    elsewhere = ("__init__", "launch", "layout", "tune")
    kernels = [f for f in sorted((ROOT / "kernels").glob("*.py")) if f.stem not in elsewhere]
    return _digest([*kernels, *sorted((ROOT / "fusedrnn" / "cells").glob("*.py"))])


@functools.cache
def tool_fingerprint() -> str:
    """Of what reads a compiled kernel."""
    return _digest([Path(__file__), *sorted((ROOT / "bench" / "step_cost").glob("*.py"))])


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        lines = file.read_text().splitlines()
        digest.update("\n".join(n for n in lines if not n.lstrip().startswith("#")).encode())
    return digest.hexdigest()[:16]
