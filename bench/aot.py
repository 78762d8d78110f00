"""Compiles the time loops ahead of time, for GPUs that need not be here.

    python bench/aot.py                    for every target
    python bench/aot.py --target sm_90 --cell lstm --hidden 768

For each (cell, pass, dtype, hidden size, batch) the plan is asked what it would run on a typical
device of each target, and that is compiled with everything switched on: lengths, packed rows,
both directions. For sm_90, which the plans were made for, that is all of them, for the others one
of each schedule. What comes out is registers, spills, shared memory and where the weights live,
and whether the code has what the design rests on. Results go to bench/results/aot/, one table
for each version of Triton; what they hold already is not compiled again unless a kernel changed.

`make aot` does so for three versions of Triton, each installed into a folder of its own that comes
before the environment's: PYTHONPATH=out/triton-3.6.0 python bench/aot.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.bind import bind
from fusedrnn.kernels.plan import PASSES, Device, Plan, plan_scan
from fusedrnn.kernels.scan_backward import scan_backward_kernel
from fusedrnn.kernels.scan_forward import scan_forward_kernel

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "aot"

HIDDEN = (64, 128, 192, 256, 300, 384, 512, 640, 768, 1024, 1536, 2048)
BATCHES = (1, 16, 64, 256, 1024)
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
    "gfx942": Device((9, 4), 304, 65536, 65536, "hip"),
}

# Where no plan may spill.
MADE_FOR = "sm_90"


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

    def key(self) -> str:
        p = self.plan
        tile = f"{p.block_b}x{p.block_h} {p.resident}/{p.chunks}x{p.block_k}/{p.split} +{p.ahead}"
        return " ".join(
            [self.target, self.cell, self.which, self.save, self.dtype, self.precision]
            + [f"H={self.H}", p.schedule, tile, str(p.num_warps), str(p.max_registers)]
            + [str(p.protocol)]
        )


def jobs(
    targets, cells, hidden, dtypes, precisions=("tf32",), batches=BATCHES, every_plan=True
) -> list[Job]:
    """What the plan can choose, without repetition. Where not every plan is wanted, one for each
    schedule will do, except on the target for which plans are made."""
    found: dict[Any, Job] = {}
    for target, cell, which, H, dtype, B, precision in itertools.product(
        targets, cells, PASSES, hidden, dtypes, batches, precisions
    ):
        if dtype != "fp32" and precision != "tf32":
            continue  # 16-bit products have one precision
        try:
            plan = plan_scan(
                REGISTRY[cell],
                which,
                DTYPES[dtype],
                B=B,
                H=H,
                D=1,
                device=TARGETS[target],
                input_precision=precision,
            )
        except ValueError:
            continue  # test_plan.py says where that may happen
        for save in ("gates",) if which == "forward" else ("gates", "states"):
            job = Job(target, cell, which, save, dtype, precision, H, plan)
            if every_plan or target == MADE_FOR:
                key = job.key()
            else:
                key = (target, cell, which, save, dtype, precision, H, plan.schedule)
            found.setdefault(key, job)
    return list(found.values())


def arguments(job: Job) -> dict[str, Any]:
    """Types of the kernel's pointers and integers, values of its constants."""
    cell, plan = REGISTRY[job.cell], job.plan
    G, K, S, P = len(cell.gates), len(cell.saved), len(cell.states), len(cell.params)
    sequence = f"*{job.dtype}"
    exchange = sequence if plan.protocol in ("counter", "flags") else _polled_word(job)
    recompute = job.save == "states" and K > 0
    values: dict[str, Any] = {
        **dict.fromkeys(("x_gates_ptr", "w_hh_ptr", "b_hh_ptr", "output_ptr"), sequence),
        **dict.fromkeys(("d_output_ptr", "dx_gates_ptr"), sequence),
        **dict.fromkeys(("state_ptrs", "final_ptrs"), (sequence,) * S),
        **dict.fromkeys(("d_final_ptrs", "d_state_ptrs"), (sequence,) * S),
        "param_ptrs": (sequence,) * P,
        "d_param_ptrs": ("*fp32",) * P,
        "saved_ptr": sequence if K else None,
        "states_ptr": sequence if S > 1 else None,
        "kept_ptrs": (sequence, sequence) if recompute else (sequence,) if K else (),
        "dh_gates_ptr": None if cell.additive else sequence,
        "offsets_ptr": "*i64",
        "lengths_ptr": "*i64",
        "ring_ptr": exchange,
        "signal_ptr": "*i32",
        "error_ptr": "*i32",
        **dict.fromkeys(("ring_stride", "signal_stride", "spin_limit"), "i32"),
        **dict.fromkeys(("T", "B", "first_b", "first_d", "stride_t", "stride_b"), "i32"),
        # What regularizes is off: it adds loads and selects, and no product.
        **dict.fromkeys(("reset_ptr", "h_mask_ptr", "zoneout_ptr", "ZONEOUT", "clip")),
        **dict.fromkeys(("fresh_ptrs", "d_fresh_ptrs"), ()),
        "CELL": bind(cell.forward),
        "CELL_FORWARD": bind(cell.forward) if recompute else None,
        "CELL_BACKWARD": bind(cell.backward),
        "KEPT": G if recompute else K,
        "G": G,
        "H": job.H,
        "D": 2,
        "PRECISION": job.precision,
        "FLAGS_BLOCK": 256,
        **plan.constants(),
    }
    if plan.protocol is None:
        values.update(
            dict.fromkeys(
                ("ring_ptr", "signal_ptr", "error_ptr", "ring_stride", "signal_stride")
                + ("spin_limit", "FLAGS_BLOCK")
            )
        )
    return values


def _polled_word(job: Job) -> str:
    wide = job.dtype == "fp32"
    if job.plan.protocol == "ll":
        return "*i64" if wide else "*i32"
    return "*i32" if wide else "*i16"


def compile_job(job: Job):
    """The compiled kernel."""
    kernel = scan_forward_kernel if job.which == "forward" else scan_backward_kernel
    values = arguments(job)
    signature, constants, attributes = {}, {}, {}
    ring_stride = (kernel.arg_names.index("ring_stride"),)

    def describe(value, path, constant):
        if isinstance(value, tuple) and not constant:
            return tuple(describe(v, (*path, i), constant) for i, v in enumerate(value))
        if value is None or constant:
            constants[path] = value
            return "constexpr"
        if value.startswith("*") or path == ring_stride:
            attributes[path] = [["tt.divisibility", 16]]  # as torch allocates
        return value

    for i, name in enumerate(kernel.arg_names):
        signature[name] = describe(values[name], (i,), kernel.params[i].is_constexpr)
    device = TARGETS[job.target]
    if device.backend == "hip":
        target = GPUTarget("hip", job.target, 64)
    else:
        target = GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=target,
        options=job.plan.options(device),
    )


def resources(job: Job, compiled) -> dict[str, int]:
    """Registers, bytes spilled and shared memory of one program."""
    shared = compiled.metadata.shared
    if TARGETS[job.target].backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spill = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return {"registers": registers, "spill": 4 * spill, "shared": shared}
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
    return {"registers": registers, "spill": stack + local, "shared": shared}


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


def faults(job: Job, compiled, used: dict[str, int]) -> list[str]:
    """What the design relies on and the compiled code has not."""
    found = []
    plan, device = job.plan, TARGETS[job.target]
    cell, item = REGISTRY[job.cell], DTYPES[job.dtype].itemsize
    if used["shared"] > device.shared_per_program:
        found.append(f"shared memory {used['shared']} > limit {device.shared_per_program}")
    if device.backend == "hip":
        return found
    promised = plan.shared_bytes(cell, job.which, item)
    if used["shared"] > promised:
        found.append(f"shared memory {used['shared']} > planned {promised}")
    loop = time_loop(compiled.asm["ttgir"])
    ptx = compiled.asm["ptx"]
    products = ("tt.dot ", "warp_group_dot", "tc_gen5_mma")
    if not any(name in line for line in loop for name in products):
        found.append("no product in the time loop")
    if job.precision != "ieee" and not re.search(r"mma\.sync|wgmma\.mma|tcgen05\.mma", ptx):
        found.append("no tensor-core instruction")
    if plan.resident == plan.chunks:
        # The ring is read past L1 (.cg, volatile); any other load of such a shape is a weight.
        shape = f"{plan.block_k}x{plan.block_h}x"
        if plan.split > 1:
            shape = f"{plan.split}x{plan.block_k // plan.split}x{plan.block_h}x"
        loads = [line for line in loop if "tt.load" in line or "async_copy" in line]
        loads = [line for line in loads if not re.search(r"= cg|isVolatile = true", line)]
        if any(f"tensor<{shape}!tt.ptr" in line for line in loads):
            found.append("weights are loaded in the time loop")
    if plan.protocol == "counter":
        if not re.search(r"(atom|red)\S*\.release", ptx):
            found.append("no release")
        if not re.search(r"atom\S*\.acquire|ld\S*\.acquire", ptx):
            found.append("no acquire")
    if "cp.async" in ptx:
        found.append("asynchronous copies, which may read the ring through L1")
    if plan.protocol is not None and not re.search(r"ld\S*\.(cg|volatile)", ptx):
        found.append("the exchange is read through L1")
    return found


def run_job(job: Job) -> dict[str, Any]:
    compiled = compile_job(job)
    used = resources(job, compiled)
    cell, item, plan = REGISTRY[job.cell], DTYPES[job.dtype].itemsize, job.plan
    weights = plan.resident * plan.block_k * plan.block_h * len(cell.gates) * item
    home = "L2" if weights == 0 else "shared" if used["shared"] >= weights else "registers"
    return {
        **{k: v for k, v in asdict(job).items() if k != "plan"},
        "plan": {k: v for k, v in asdict(plan).items() if v is not None},
        **used,
        "limit": TARGETS[job.target].shared_per_program,
        "weights": home if plan.resident == plan.chunks else f"{home} + L2",
        "faults": faults(job, compiled, used),
    }


@functools.cache
def fingerprint() -> str:
    """Of everything that a compiled kernel depends on, besides the version of Triton: lines that
    are only a comment are left out."""
    digest = hashlib.sha256()
    host = ("__init__", "interpreter", "launch", "plan", "tune")
    kernels = [f for f in sorted((ROOT / "kernels").glob("*.py")) if f.stem not in host]
    for file in [*kernels, *sorted((ROOT / "fusedrnn" / "cells").glob("*.py"))]:
        lines = file.read_text().splitlines()
        digest.update("\n".join(n for n in lines if not n.lstrip().startswith("#")).encode())
    return digest.hexdigest()[:16]


def write(path: Path, results: dict[str, dict]) -> None:
    """The results as JSON, and as a table for readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    rows = (f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
    partial.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    partial.replace(path)
    lines = [
        f"# Compiled ahead of time with Triton {triton.__version__}",
        "",
        "Made by `python bench/aot.py`; nothing here was measured on a GPU. Shared memory is that",
        "of one program, against the limit of the target, in KiB; `spill` in bytes per thread.",
        "Lengths, packed rows and two directions are switched on. Fingerprint of the kernels:",
        f"{fingerprint()}; a run of the command compiles again what has another one.",
        "",
        "| target | cell | pass | saves | dtype | H | schedule | tile B x H | K resident | warps "
        "| registers | spill | shared | limit | weights | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(TARGETS)
    for r in sorted(
        results.values(),
        key=lambda r: (order.index(r["target"]), r["cell"], r["which"], r["dtype"], r["H"]),
    ):
        p = r["plan"]
        dtype = r["dtype"] if r["dtype"] != "fp32" else f"fp32 {r['precision']}"
        lines.append(
            f"| {r['target']} | {r['cell']} | {r['which']} | {r['save']} | {dtype} | {r['H']} "
            f"| {p['schedule']} | {p['block_b']} x {p['block_h']} "
            f"| {p['resident']} of {p['chunks']} x {p['block_k']} | {p['num_warps']} "
            f"| {r['registers']} | {r['spill']} | {r['shared'] / 1024:.0f} "
            f"| {r['limit'] // 1024} | {r['weights']} | {'; '.join(r['faults'])} |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be set: there is nothing to compile then")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cell", nargs="+", choices=REGISTRY, default=list(REGISTRY))
    parser.add_argument("--hidden", nargs="+", type=int, default=HIDDEN)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument(
        "--every-plan",
        action="store_true",
        help=f"all tiles of a schedule on every target, not only on {MADE_FOR}",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    path = options.output or RESULTS / f"triton-{triton.__version__}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    wanted = jobs(
        options.target,
        options.cell,
        options.hidden,
        options.dtype,
        options.precision,
        options.batch,
        options.every_plan,
    )
    current = {f"{job.key()} {fingerprint()}": job for job in wanted}
    # Results of kernels that have changed since, or that no plan chooses, say nothing any more.
    everything = jobs(TARGETS, REGISTRY, HIDDEN, DTYPES, PRECISIONS)
    planned = {f"{job.key()} {fingerprint()}" for job in everything} | set(current)
    results = {k: r for k, r in results.items() if k in planned}
    todo = [(key, job) for key, job in current.items() if key not in results]
    print(f"{len(wanted)} configurations, {len(todo)} of them to compile", flush=True)
    failed = 0
    with ProcessPoolExecutor(options.workers) as pool:
        futures = {pool.submit(run_job, job): (key, job) for key, job in todo}
        for done, future in enumerate(as_completed(futures), 1):
            key, job = futures[future]
            try:
                result = future.result()
            except Exception as error:
                failed += 1
                print(f"FAILED {job.key()}: {type(error).__name__}: {str(error)[-300:]}")
                continue
            results[key] = result
            told = "; ".join(result["faults"]) or "ok"
            print(
                f"{done}/{len(todo)} {job.key()}: {result['registers']} registers, "
                f"{result['spill']} spilled, {result['shared'] / 1024:.0f} KiB, {told}",
                flush=True,
            )
            if done % 20 == 0:
                write(path, results)
    write(path, results)
    faulty = sum(bool(results[key]["faults"]) for key in current if key in results)
    print(f"{len(results)} results in {path}, {failed} failed to compile, {faulty} with faults")
    return 1 if failed or faulty else 0


if __name__ == "__main__":
    sys.exit(main())
