"""Compiles time loops ahead of time, for GPUs that need not be here, and says what is wrong.

    python -m bench.aot            the suite; what a page in bench/results/aot/ needs; resumes
    python -m bench.aot --check    whether the pages are of today's kernels
    python -m bench.aot --ranking  whether the plan's estimate orders its candidates as the meter

The plan of a job is compiled and read (bench/step_cost.py): registers, spills, shared memory, bank
conflicts, waits, and whether the code has what the design rests on. `make aot` does so for three
versions of Triton, each installed into a folder of its own that comes before the environment's:
PYTHONPATH=out/triton-3.6.0 python -m bench.aot.

Results of single kernels stay in out/aot/, which is not in git, and are not compiled again unless a
kernel, or what reads it, has changed. In git is a page for each version.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bench.machine_code import near, sass_step
from bench.step_cost import MOST_WAVEFRONTS, Parameters, Reading, gate, load_parameters, read
from bench.timing import ROOT
from fusedrnn.cells import REGISTRY, Cell, Mean, Projection, get
from fusedrnn.kernels.bind import bind
from fusedrnn.kernels.plan import (
    ITEM_SIZE,
    PASSES,
    Device,
    Plan,
    candidates,
    cycles,
    placed,
    plan_scan,
    stage_sizes,
)
from fusedrnn.kernels.scan_backward import scan_backward_gluon, scan_backward_kernel
from fusedrnn.kernels.scan_forward import scan_forward_gluon, scan_forward_kernel
from fusedrnn.kernels.state_ops import StateOps
from fusedrnn.kernels.sync import Exchange

PAGES = ROOT / "bench" / "results" / "aot"
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
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


def width(H: int, P: int, heads: int) -> str:
    """How wide a layer is."""
    return f"H={H}" + f" P={P}" * (P > 0) + f" heads={heads}" * (heads > 1)


@dataclass(frozen=True)
class Job:
    target: str
    cell: str
    pass_: str
    save: str
    dtype: str
    precision: str
    H: int
    plan: Plan
    plain: bool = False  # dense rows, one direction: as most calls are
    P: int = 0
    heads: int = 1

    def key(self) -> str:
        p = self.plan
        chunks = f"{p.resident}/{p.chunks}x{p.block_k}/{p.split_k} +{p.prefetch}"
        tile = f"{p.block_b}x{p.block_h} {chunks}"
        return " ".join(
            [self.target, self.cell, self.pass_, self.save, self.dtype, self.precision]
            + [
                width(self.H, self.P, self.heads),
                p.schedule,
                tile,
                str(p.num_warps),
                str(p.max_registers),
            ]
            + ["plain"] * self.plain
        )


def cell_of(name: str, P: int) -> Cell:
    """The cell that runs where h has P features, or as many as there are units."""
    return get(name, projected=P > 0 and not get(name).widest)


def arguments(job: Job) -> dict[str, Any]:
    """Types of the kernel's pointers and integers, values of its constants."""
    cell, plan = cell_of(job.cell, job.P), job.plan
    G, K, S, stages = len(cell.gates), len(cell.saved), len(cell.states), len(cell.stages)
    sequence = f"*{job.dtype}"
    D = 1 if job.plain else 2
    P = job.P or job.H
    recompute = job.save == "states" and K > 0
    means = sum(s.products for s in cell.stages if isinstance(s.receives, Mean))
    backward = job.pass_ == "backward"
    return {
        **dict.fromkeys(("x_gates_ptr", "output_ptr"), sequence),
        "w_ptrs": ((sequence,) * D,) * stages,
        "b_hh_ptrs": (sequence,) * D,
        **dict.fromkeys(("d_output_ptr", "dx_gates_ptr"), sequence),
        **dict.fromkeys(("state_ptrs", "final_ptrs"), (sequence,) * S),
        **dict.fromkeys(("d_final_ptrs", "d_state_ptrs"), (sequence,) * S),
        "param_ptrs": ((sequence,) * D,) * len(cell.params),
        "d_param_ptrs": ("*fp32",) * len(cell.params),
        "saved_ptr": sequence if K else None,
        "published_ptr": sequence if len(cell.weighted) > 1 else None,
        "states_ptr": sequence if S > 1 else None,
        "kept_ptrs": (sequence, sequence) if recompute else (sequence,) if K else (),
        "dh_gates_ptr": None if cell.additive else sequence,
        "d_projected_ptr": sequence if isinstance(cell.stages[-1].receives, Projection) else None,
        "offsets_ptr": None if job.plain else "*i64",
        "lengths_ptr": None if job.plain else "*i64",
        "exchange": Exchange(sequence, "*i32", "*i32", *["i32"] * 3) if plan.exchanged else None,
        **dict.fromkeys(
            ("T", "B", "first_b", "first_lane", "reverse", "stride_t", "stride_b"), "i32"
        ),
        # What regularizes is off: it adds loads and selects, and no product.
        "ops": StateOps(),
        "d_reset_state_ptrs": (),
        "bodies": tuple(bind(s.backward if backward else s.forward) for s in cell.stages),
        "forward_bodies": tuple(bind(s.forward) for s in cell.stages if recompute),
        "STAGES": stage_sizes(cell, job.pass_, job.H // job.heads, P // job.heads),
        "KEPT": (G, len(cell.sums) + means) if recompute else (K,),
        "G": G,
        "H": job.H,
        "P": P,
        "D": D,
        "HEADS": job.heads,
        "PRECISION": job.precision,
        "PLAN": plan.of_kernel(),
    }


def trips(job: Job) -> int:
    """To L2 in a step: what the stages load together."""
    cell, plan, heads = cell_of(job.cell, job.P), job.plan, job.heads
    stages = stage_sizes(cell, job.pass_, job.H // heads, (job.P or job.H) // heads)
    chunks = [-(-stage.k // plan.block_k) for stage in stages]
    return sum(-(-count // plan.prefetch) for count in chunks)


def require_compiler() -> None:
    """Raises RuntimeError where Triton interprets kernels, and compiles none."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: there is nothing to compile then")


def compile_job(job: Job):
    """The compiled kernel."""
    kernel = scan_forward_kernel if job.pass_ == "forward" else scan_backward_kernel
    source = ASTSource
    if job.plan.warp_groups:
        kernel = scan_forward_gluon if job.pass_ == "forward" else scan_backward_gluon
        source = GluonASTSource
    values = arguments(job)
    signature, constants, attributes = {}, {}, {}
    exchange = kernel.arg_names.index("exchange")

    def describe(value, path, constant):
        if isinstance(value, tuple) and not constant:
            parts = [describe(v, (*path, i), constant) for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or constant or not isinstance(value, str):
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
        source(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=job.plan.options(device),
    )


def compile_and_read(
    job: Job, B: int | None = None, parameters: Parameters | None = None
) -> tuple[tuple[str, str], Reading]:
    """PTX and SASS of a kernel, read. A step's time is predicted where there are parameters."""
    compiled = compile_job(job)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def told(tool: str, *options: str) -> str:
            path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
            command = [path, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told("cuobjdump", "-res-usage")))
        texts = compiled.asm["ptx"], told("nvdisasm", "-hex", "-c")
    used = {
        "registers": int(usage["REG"]), "spill": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
    }  # fmt: skip
    multiprocessors = TARGETS[job.target].multiprocessors
    return texts, read(
        *texts, job.plan, job.H // job.heads, used, B=B or 1, lanes=job.heads,
        trips=trips(job), multiprocessors=multiprocessors, parameters=parameters,
    )  # fmt: skip


# What the design relies on in every kernel, as the PTX has it.
NEEDED = {
    "no release": r"(atom|red)\S*\.release",
    "no acquire": r"atom\S*\.acquire|ld\S*\.acquire",
    "the exchange is read through L1": r"ld\S*\.relaxed",
}
# Parts of dh are marked, and need no order.
NEEDED_OF_PARTS = {
    "a part is stored in pieces": r"st\.relaxed\.gpu\.global\.b128",
    "a part is read in pieces": r"ld\.relaxed\.gpu\.global\.b128",
}


def faults(job: Job, ptx: str, sass: str, reading: Reading) -> list[str]:
    """What the design relies on and the compiled code has not."""
    if not job.plain:
        # Packed rows are found by an offset that is loaded first.
        reading = replace(reading, early=())
    found = gate(reading, job.target, exchanged=job.plan.exchanged)
    plan, device = job.plan, TARGETS[job.target]
    if not plan.exchanged:
        return found
    most = min(device.shared_per_program, plan.shared_bytes(REGISTRY[job.cell], job.pass_))
    if reading.shared > most:
        found.append(f"shared memory {reading.shared} > {most}, planned or of the device")
    if not reading.products:
        found.append("no tensor-core product in the time loop")
    # Of warp groups' weights nothing is read by 8 bytes; packed rows' offsets are.
    if plan.resident == plan.chunks and not plan.warp_groups and near(sass_step(sass)[0]):
        found.append("weights are loaded in the time loop")
    if "cp.async" in ptx:
        found.append("asynchronous copies, which may read the ring through L1")
    needed = NEEDED_OF_PARTS if plan.schedule == "wgmma_scatter" else NEEDED
    return found + [fault for fault, text in needed.items() if not re.search(text, ptx)]


def run_job(job: Job, B: int | None = None) -> dict[str, Any]:
    """Compiles and reads one kernel. For a batch B, a step's time is predicted as well."""
    parameters = None if B is None else load_parameters(capability=job.target)
    texts, reading = compile_and_read(job, B, parameters)
    return {
        **{k: v for k, v in asdict(job).items() if k != "plan"},
        "B": B,
        "plan": {k: v for k, v in asdict(job.plan).items() if v is not None},
        **asdict(reading),
        "faults": faults(job, *texts, reading),
    }


def fingerprint() -> str:
    """Of all that decides which kernels there are and what they are compiled to, besides the
    version of Triton: lines that are only a comment are left out."""
    elsewhere = ("__init__", "launch", "layout", "tune")
    kernels = [f for f in sorted((ROOT / "kernels").glob("*.py")) if f.stem not in elsewhere]
    return _digest([*kernels, *sorted((ROOT / "fusedrnn" / "cells").glob("*.py"))])


def tool_fingerprint() -> str:
    """Of what reads a compiled kernel."""
    return _digest([ROOT / "bench" / f"{n}.py" for n in ("aot", "machine_code", "step_cost")])


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        lines = file.read_text().splitlines()
        digest.update("\n".join(n for n in lines if not n.lstrip().startswith("#")).encode())
    return digest.hexdigest()[:16]


# The suite.

MADE_FOR = "sm_90"
HIDDEN = (8, 64, 256, 300, 768, 1536, 2048)
BATCHES = (1, 256)
# One program, spread with an empty rest of a chunk, and as large as streaming.
FEW = (8, 300, 1536)
SOME = (512, 1024)


class Named(NamedTuple):
    """A layer whose time a page predicts."""

    cell: str
    dtype: str
    H: int
    B: int
    P: int = 0
    heads: int = 1

    @property
    def name(self) -> str:
        sizes = width(self.H, self.P, self.heads)
        return f"{self.cell} {self.dtype.replace('fp32', 'tf32')} {sizes} B={self.B}"


NAMED = tuple(
    Named(*layer)
    for layer in (
        ("lstm", "fp16", 768, 16), ("gru", "bf16", 512, 64), ("lstm", "bf16", 1024, 64),
        ("lstm", "fp32", 512, 64), ("lstm", "bf16", 128, 32), ("lstm", "bf16", 512, 256),
        ("lstm", "bf16", 300, 20), ("lstm", "bf16", 200, 1), ("lstm", "bf16", 1500, 48),
    )
)  # fmt: skip
# Of two stages, of heads, and of all cells that torch does not have.
STAGED = (
    Named("lstm", "bf16", 1024, 16, P=320), Named("lstm", "bf16", 512, 64, heads=4),
    *(Named(name, "bf16", 512, 64) for name, cell in REGISTRY.items() if cell.aten is None),
)  # fmt: skip


def planned(
    target: str, cell: str, pass_: str, dtype: str, precision: str, H: int, B: int, P: int = 0,
    heads: int = 1,
) -> Job:  # fmt: skip
    """What the planner chooses for a layer.

    Raises:
        ValueError: there is no plan.
    """
    known = get(cell)
    if known.units(H) > H:
        H, P = known.units(H), H
    plan = plan_scan(
        cell_of(cell, P), pass_, DTYPES[dtype], B=B, H=H // heads, P=P, D=heads,
        device=TARGETS[target], input_precision=precision,
    )  # fmt: skip
    return Job(target, cell, pass_, "gates", dtype, precision, H, plan, True, P, heads)


def _of(
    target, cells, dtypes, hidden, precision="tf32", batches=BATCHES, plain=True, save="gates"
) -> Iterator[Job]:
    """A job for every plan of these."""
    for cell, pass_, dtype, H, B in itertools.product(cells, PASSES, dtypes, hidden, batches):
        try:
            job = planned(target, cell, pass_, dtype, precision, H, B)
        except ValueError:  # test_plan.py says where that may happen
            continue
        yield replace(job, plain=plain, save=save if pass_ == "backward" else "gates")


def jobs() -> list[tuple[Job, int | None]]:
    """What is compiled, each kernel once, and the batch of those whose time is predicted.

    For sm_90: what cells, dtypes, schedules and everything switched on (packed rows, two
    directions, states instead of gates) add to LSTM in bfloat16 at all of HIDDEN. float16 is
    bfloat16 with another name of the element type. For the others: LSTM, one of each schedule.
    """
    found: dict[object, tuple[Job, int | None]] = {}

    def add(job: Job, B: int | None = None, kind: object = None) -> None:
        # How a batch is cut into launches is no part of a kernel.
        bare = replace(job, plan=replace(job.plan, batch_per_launch=None, lanes_per_launch=None))
        key = (kind or bare, B)
        if B is not None or all((kind or bare, b) not in found for b in (None, *batches)):
            found.setdefault(key, (job, B))

    batches = {named.B for named in NAMED}
    for named in NAMED:
        for job in _of(MADE_FOR, [named.cell], [named.dtype], [named.H], batches=[named.B]):
            add(job, named.B)
    everything = {"plain": False, "save": "states"}
    for named, pass_ in itertools.product(STAGED, PASSES):
        cell, dtype, H, B, P, heads = named
        job = planned(MADE_FOR, cell, pass_, dtype, "tf32", H, B, P, heads)
        add(job, B)
        add(replace(job, plain=False, save="states" if pass_ == "backward" else "gates"))
    for cells, dtypes, hidden, options in (
        (["lstm"], ["bf16"], HIDDEN, {}), (["lstm"], ["fp32"], SOME, {}),
        (["gru"], ["bf16"], SOME, {}), (["gru", "rnn_tanh"], ["bf16"], FEW, {}),
        (["gru", "rnn_tanh"], ["fp32"], FEW[1:2], {}),
        (["lstm"], ["fp32"], FEW, {"precision": "ieee"}),
        (["lstm"], ["bf16", "fp32"], FEW, everything),
    ):  # fmt: skip
        for job in _of(MADE_FOR, cells, dtypes, hidden, **options):
            add(job)
    for target in TARGETS:
        if target != MADE_FOR:
            dtypes = ["bf16", "fp32"] if target in MOST_WAVEFRONTS else ["bf16"]
            for job in _of(target, ["lstm"], dtypes, (300, 1536)):
                add(job, kind=(target, job.pass_, job.dtype, job.plan.schedule))
    return list(found.values())


def compile_all(wanted: dict[str, tuple[Job, int | None]], path: Path, workers: int) -> dict:
    """Compiles what `path` has not, keeps it there, and returns what was wanted, by key, without
    what failed to compile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {k: r for k, r in results.items() if k in wanted}
    todo = [key for key in wanted if key not in results]
    print(f"{len(wanted)} kernels, {len(todo)} of them to compile", flush=True)
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(run_job, *wanted[key]): key for key in todo}
        for done, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            try:
                results[key] = future.result()
                told = "; ".join(results[key]["faults"]) or "ok"
            except Exception as error:
                told = f"FAILED: {type(error).__name__}: {str(error)[-300:]}"
            print(f"{done}/{len(todo)} {wanted[key][0].key()}: {told}", flush=True)
            if done % 10 == 0 or done == len(todo):  # whole or not at all, whenever it is killed
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(results, indent=0) + "\n")
                partial.replace(path)
    return results


def page(results: list[dict], version: str) -> str:
    """What a reader should know of one version of Triton."""
    lines = [
        f"# Compiled ahead of time with Triton {version}",
        "",
        "Made by `make aot`; nothing here was measured on a GPU. For each target: how many",
        "kernels were compiled, the most registers of a thread and bytes it spills, and the most",
        "wavefronts of shared memory over those without bank conflicts. Faults are what no kernel",
        "may show (`bench/step_cost.py`, `bench/aot.py`) where the target is held to them.",
        f"Kernels: {fingerprint()}",
        "",
        "| target | kernels | registers | spilled | wavefronts / ideal | held to | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        rows = [r for r in results if target == r["target"]]
        if rows:
            worst = max(r["wavefronts"] / max(1, r["ideal_wavefronts"]) for r in rows)
            lines.append(
                f"| {target} | {len(rows)} | {max(r['registers'] for r in rows)} "
                f"| {max(r['spill'] for r in rows)} | {worst:.2f} "
                f"| {MOST_WAVEFRONTS.get(target, 'reported')} "
                f"| {sum(bool(r['faults']) for r in rows)} |"
            )
    lines += [
        "",
        f"A step on {MADE_FOR}, as `python -m bench.step_cost` predicts it: microseconds for the",
        "whole batch, with all that is assumed of the hardware at its middle, low and high values.",
        "",
        "| layer | pass | schedule | tile | programs | launches | us | low | high |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    layers = {(*(r[field] for field in Named._fields), r["pass_"]): r for r in results if r["B"]}
    for named, pass_ in itertools.product((*NAMED, *STAGED), PASSES):
        r = layers[(*named, pass_)]
        p = r["plan"]
        lines.append(
            f"| {named.name} | {pass_} | {p['schedule']} | {p['block_b']} x {p['block_h']} "
            f"| {r['programs']} | {r['launches']} | {r['predicted_us']:.2f} "
            f"| {r['low_us']:.2f} | {r['high_us']:.2f} |"
        )
    told = Counter(f"{r['target']}: {f.split(':')[0]}" for r in results for f in r["faults"])
    if told:
        lines += ["", "Faults, and how many kernels have them:", ""]
        lines += [f"- {fault}: {count}" for fault, count in told.most_common(12)]
    return "\n".join(lines) + "\n"


def stale() -> list[str]:
    """Pages that are missing, or not of today's kernels."""
    found, today = [], fingerprint()
    for version in VERSIONS:
        path = PAGES / f"triton-{version}.md"
        if not path.exists():
            found.append(f"{path.name} is missing: run `make aot`")
        elif f"\nKernels: {today}\n" not in path.read_text():
            found.append(f"{path.name} is not of today's kernels ({today}): run `make aot`")
    return found


# The plan's own estimate beside times from elsewhere, of all candidates for the layers of NAMED.

Candidate = tuple[Named, str, Plan]


def every_candidate(device: Device) -> list[Candidate]:
    """Layer, pass and plan, as it is placed on the device."""
    return [
        (layer, pass_, fitting[0])
        for layer in NAMED
        for pass_ in PASSES
        for plan in candidates(
            REGISTRY[layer.cell], pass_, DTYPES[layer.dtype], layer.H, device, "tf32"
        )
        if (fitting := placed(plan, layer.H, 1, layer.B, device)) is not None
    ]


def predicted_us(layer: Named, pass_: str, plan: Plan) -> float:
    """Of a step of the whole batch, by the meter."""
    job = Job(MADE_FOR, layer.cell, pass_, "gates", layer.dtype, "tf32", layer.H, plan, plain=True)
    return compile_and_read(job, layer.B, load_parameters())[1].predicted_us


def rank(timed: Iterable[tuple[Candidate, float | str]], device: Device) -> list[str]:
    """Lines of Markdown: how well the estimate orders the candidates.

    Args:
        timed: candidates with microseconds of a step, or why there are none.
    """
    lines = ["| layer | pass | plan | estimated clocks | us |", "|---|---|---|---|---|"]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (layer, pass_, plan), us in timed:
        item = ITEM_SIZE[DTYPES[layer.dtype]]
        _, launches, programs = placed(plan, layer.H, 1, layer.B, device)
        clocks = launches * cycles(
            plan, REGISTRY[layer.cell], pass_, item, layer.H, "tf32" if item == 4 else "16-bit",
            programs, device,
        )  # fmt: skip
        shown = us if isinstance(us, str) else f"{us:.2f}"
        at = f"{plan.schedule} {plan.block_h}/{plan.split_k}"
        lines.append(f"| {layer.name} | {pass_} | {at} | {clocks:.0f} | {shown} |")
        if not isinstance(us, str):
            found.setdefault((layer.name, pass_), []).append((clocks, us))
    both = np.array([pair for group in found.values() for pair in group])
    if len(both) < 3:
        return lines
    ranks = [np.argsort(np.argsort(column)) for column in both.T]
    each, offset = np.polyfit(*both.T, 1)
    losses = [min(group)[1] / min(us for _, us in group) - 1 for group in found.values()]
    return [
        f"Rank correlation {np.corrcoef(*ranks)[0, 1]:.3f} over {len(both)} candidates. The chosen "
        f"plan is slower than the fastest candidate by {100 * np.mean(losses):.0f} % on average, "
        f"by {100 * max(losses):.0f} % at most. Microseconds = {offset:.3f} + {1e3 * each:.3f} for "
        "every 1,000 estimated clocks.", "", *lines,
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="compile nothing, check the pages")
    parser.add_argument("--ranking", action="store_true", help="compile all candidates instead")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.check:
        old = stale()
        print("\n".join(old) or "the pages are of today's kernels")
        return 1 if old else 0
    require_compiler()
    if options.ranking:
        every = every_candidate(TARGETS[MADE_FOR])
        with ProcessPoolExecutor(options.workers) as pool:
            timed = zip(every, pool.map(predicted_us, *zip(*every, strict=True)), strict=True)
            print("\n".join(rank(timed, TARGETS[MADE_FOR])))
        return 0
    now = f"{fingerprint()} {tool_fingerprint()}"
    wanted = {f"{job.key()} B={B} {now}": (job, B) for job, B in jobs()}
    path = ROOT / "out" / "aot" / f"triton-{triton.__version__}.json"
    results = compile_all(wanted, path, options.workers)
    failed = len(wanted) - len(results)
    faulty = sum(bool(r["faults"]) for r in results.values())
    print(f"{len(results)} results in {path}, {failed} failed to compile, {faulty} with faults")
    if not failed:
        file = PAGES / f"triton-{triton.__version__}.md"
        file.write_text(page([results[key] for key in wanted], triton.__version__))
        print(f"wrote {file}")
    return 1 if failed or faulty else 0


if __name__ == "__main__":
    sys.exit(main())
