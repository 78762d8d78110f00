"""A sample of the ahead-of-time suite, which `make aot` compiles all of, and the gate.

In a process of its own, because the tests beside this one have put Triton into its interpreter.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

from bench import aot
from bench.step_cost import Reading, gate
from fusedrnn.kernels.plan import PASSES

ROOT = Path(__file__).parents[2]

# Target, cell, pass, dtype, precision, H, B, P, heads. Every schedule, cell, dtype and pass once.
SAMPLE = [
    ("sm_90", "lstm", "forward", "fp16", "tf32", 768, 16),  # by warp groups
    ("sm_90", "lstm", "forward", "fp16", "tf32", 300, 20),
    ("sm_90", "lstm", "backward", "fp16", "tf32", 768, 16),
    ("sm_90", "lstm", "forward", "bf16", "tf32", 512, 256),  # two on a multiprocessor
    ("sm_90", "lstm", "backward", "bf16", "tf32", 1500, 48),
    ("sm_90", "gru", "forward", "fp32", "tf32", 300, 20),
    ("sm_90", "gru", "backward", "bf16", "tf32", 8, 2048),
    ("sm_90", "rnn_tanh", "backward", "bf16", "tf32", 512, 64),
    ("sm_90", "rnn_relu", "forward", "fp32", "ieee", 64, 16),
    ("sm_90", "lstm", "backward", "fp32", "ieee", 512, 64),
    ("sm_80", "lstm", "forward", "bf16", "tf32", 300, 20),
    ("sm_90", "gru_reset_before", "forward", "bf16", "tf32", 512, 64),
    ("sm_90", "lstm", "backward", "bf16", "tf32", 1024, 16, 320),  # a projection
    ("sm_90", "gru", "forward", "fp32", "tf32", 512, 16, 0, 4),  # heads
    ("sm_90", "coupled_lstm", "backward", "bf16", "tf32", 64, 16),
    ("sm_90", "indrnn_relu", "forward", "bf16", "tf32", 64, 16),
    ("sm_90", "indrnn_tanh", "backward", "fp32", "tf32", 64, 16),
    ("sm_90", "layer_norm_gru", "forward", "bf16", "tf32", 64, 16),
    ("sm_90", "layer_norm_lstm", "backward", "bf16", "tf32", 64, 16),
    ("sm_90", "ligru", "backward", "bf16", "tf32", 64, 16),
    ("sm_90", "mgu", "forward", "fp16", "tf32", 64, 16),
    ("sm_90", "mlp_transition", "backward", "bf16", "tf32", 64, 16),
    ("sm_90", "multiplicative_lstm", "forward", "bf16", "tf32", 64, 16),
    ("sm_90", "peephole_lstm", "backward", "fp32", "tf32", 64, 16),
    ("sm_90", "peephole_lstm_full", "forward", "fp32", "tf32", 64, 16),
    ("sm_90", "slstm", "forward", "bf16", "tf32", 64, 16),
    ("sm_90", "ugrnn", "backward", "bf16", "tf32", 64, 16),
]


def compile_plans(jobs, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(cwd)
    script = Path(__file__).parent / "compile_plans.py"
    done = subprocess.run(
        [sys.executable, script, json.dumps(jobs)],
        capture_output=True, text=True, env=environment, cwd=cwd, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def compiled():
    return compile_plans(SAMPLE)


@pytest.mark.parametrize("job", SAMPLE, ids=lambda job: " ".join(map(str, job)))
def test_compiles_to_what_the_design_relies_on(job, compiled):
    assert compiled[job]["faults"] == []


@dataclass(frozen=True)
class Mutant:
    """A change to the kernels that the gate must tell."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    fault: str

    def __str__(self) -> str:
        return self.name


X_GATES = "load_planes(x_gates_ptr, rows, tile, exists, D=D, PLANES=G, H=H)"
MUTANTS = (
    Mutant(
        "partial sums by tl.sum",
        "matmul.py",
        (("    COUNT: tl.constexpr = x.numel // SPLIT\n", "    return tl.sum(x, axis=0)\n"),),
        "bank conflicts",
    ),
    Mutant(
        "one load of the ring after the other",
        "matmul.py",
        (("PREFETCH: tl.constexpr = PLAN.prefetch\n", "PREFETCH: tl.constexpr = 1\n"),),
        "loads of the ring wait for one another",
    ),
    Mutant(
        "x_gates fetched in the step before",
        "scan_forward.py",
        (
            ("    where,\n)", "    where,\n    zeros,\n)"),
            (
                "    for step in range(T):\n",
                "    x_next = zeros(G, x_gates_ptr.dtype.element_ty, tile)\n"
                "    for step in range(T):\n",
            ),
            (f"        x_gates = {X_GATES}\n", "        x_gates = x_next\n"),
            (
                "        t += 1 - 2 * tile.reverse\n",
                f"        x_next = {X_GATES}\n        t += 1 - 2 * tile.reverse\n",
            ),
        ),
        "fetched ahead, and waited for before the poll",
    ),
    Mutant(
        "reads the counter of arrivals in every step",
        "sync.py",
        (('            "@missing bra READ;",\n', ""),),
        "no way round the loop reads what others stored and orders nothing",
    ),
    Mutant(
        "a block barrier in a poll",
        "sync.py",
        (('vectors), "AGAIN:"]', 'vectors), "AGAIN:", "bar.sync 0;"]'),),
        "block barriers in a spin",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_gate_catches(mutant, tmp_path):
    for folder in ("bench", "fusedrnn", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    (tmp_path / "fusedrnn" / "kernels").symlink_to(tmp_path / "kernels")
    file = tmp_path / "kernels" / mutant.file
    text = file.read_text()
    for old, new in mutant.changes:
        assert text.count(old) == 1, f"{mutant}: {old!r} is not in {mutant.file} once"
        text = text.replace(old, new)
    file.write_text(text)
    (result,) = compile_plans(SAMPLE[1:2], tmp_path).values()
    assert result["plan"]["schedule"] == "multi_block"
    assert any(mutant.fault in fault for fault in result["faults"])


def test_the_sample_has_every_kind(compiled):
    jobs = SAMPLE
    assert {job[1] for job in jobs} == set(aot.REGISTRY)
    assert {job[2] for job in jobs} == set(PASSES)
    assert {job[3] for job in jobs} == set(aot.DTYPES)
    schedules = {compiled[job]["plan"]["schedule"] for job in jobs}
    assert schedules == {"independent", "multi_block", "streamed", "wgmma", "wgmma_scatter"}


# --- the gate -----------------------------------------------------------------------------------

GOOD = Reading(
    registers=200, spill=0, shared=1024, programs=48, launches=1, together=1,
    warps=8, instructions=400,
    products=48, special=10, barriers=8, fences=0, spin_barriers=0, wavefronts=1250,
    ideal_wavefronts=1000, unknown=(), ring_loads=6, serial_waits=1, planned_waits=1, early=(),
)  # fmt: skip


def test_a_good_kernel_passes():
    for target in aot.TARGETS:
        assert gate(GOOD, target) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(wavefronts=1251), "bank conflicts: 1251 wavefronts"),
        (dict(unknown=("ld.shared [%r1]",)), "unknown addresses: ld.shared [%r1]"),
        (dict(spill=8), "8 bytes spilled"),
        (dict(serial_waits=2), "wait for one another 2 times a step, 1 planned"),
        (dict(early=("0x10 LDG",)), "before the poll: 0x10 LDG"),
        (dict(spin_barriers=2), "2 block barriers in a spin"),
        (dict(fences=2), "2 fences, acquires or atomics in every step"),
        (dict(ring_loads=0), "no way round the loop reads what others stored"),
    ],
)
def test_each_fault_is_told(change, told):
    (fault,) = gate(replace(GOOD, **change), "sm_90")
    assert told in fault


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120"])
def test_other_targets_may_lose_a_little(target):
    assert gate(replace(GOOD, wavefronts=1500, serial_waits=9), target) == []
    assert "bank conflicts" in gate(replace(GOOD, wavefronts=1501), target)[0]
    assert "spilled" in gate(replace(GOOD, spill=4), target)[0]


@pytest.mark.parametrize("target", ["sm_86", "sm_100"])
def test_some_targets_are_only_reported(target):
    assert gate(replace(GOOD, spill=4, wavefronts=9999), target) == []


# --- the suite ----------------------------------------------------------------------------------


def test_every_kernel_is_compiled_once():
    jobs = [job for job, B in aot.jobs() if B is None]
    bare = [replace(job, plan=job.plan.of_kernel()) for job in jobs]
    assert len(set(bare)) == len(bare)


def test_the_suite_has_every_kind():
    jobs = [job for job, _ in aot.jobs()]
    assert {job.target for job in jobs} == set(aot.TARGETS)
    made_for = [job for job in jobs if job.target == aot.MADE_FOR]
    for cell, hidden in (("lstm", aot.HIDDEN), ("gru", aot.SOME)):
        for pass_ in PASSES:
            mine = [j for j in made_for if (j.cell, j.pass_, j.dtype) == (cell, pass_, "bf16")]
            assert {j.H for j in mine} >= set(hidden)
    schedules = {job.plan.schedule for job in made_for}
    assert schedules == {"independent", "multi_block", "streamed", "wgmma", "wgmma_scatter"}
    assert len({job.key() for job in made_for}) == len(set(made_for))
    assert {job.dtype for job in made_for} == set(aot.DTYPES)
    assert {job.save for job in made_for} == {"gates", "states"}


def row(job, B):
    return {
        "target": job.target, "cell": job.cell, "pass_": job.pass_, "dtype": job.dtype,
        "precision": job.precision, "H": job.H, "P": job.P, "heads": job.heads, "B": B,
        "registers": 200, "spill": 0, "wavefronts": 1100, "ideal_wavefronts": 1000,
        "programs": 48, "launches": 2, "predicted_us": 2.5,
        "low_us": 2.0, "high_us": 3.0, "faults": ["bank conflicts: 9"] * (job.target == "sm_80"),
        "plan": {"schedule": job.plan.schedule, "block_b": 16, "block_h": 8},
    }  # fmt: skip


def test_a_page():
    page = aot.page([row(job, B) for job, B in aot.jobs()], "9.9.9")
    lines = page.splitlines()
    assert "# Compiled ahead of time with Triton 9.9.9" in lines
    assert f"Kernels: {aot.fingerprint()}" in lines
    assert len(lines) < 50 + 2 * len(aot.STAGED)
    assert any(line.startswith("| sm_90 |") and "| 1.10 | 1.25 | 0 |" in line for line in lines)
    for named in (*aot.NAMED, *aot.STAGED):
        assert sum(line.startswith(f"| {named.name} |") for line in lines) == 2
    assert any("sm_80: bank conflicts" in line for line in lines)


def test_old_pages_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "PAGES", tmp_path)
    assert [told.split()[:3] for told in aot.stale()] == [
        [f"triton-{version}.md", "is", "missing:"] for version in aot.VERSIONS
    ]
    for version in aot.VERSIONS:
        page = aot.page([row(job, B) for job, B in aot.jobs()], version)
        (tmp_path / f"triton-{version}.md").write_text(page)
    assert aot.stale() == []
    (tmp_path / "triton-3.6.0.md").write_text(page.replace(aot.fingerprint(), "0" * 16))
    (told,) = aot.stale()
    assert told.startswith("triton-3.6.0.md is not of today's kernels")
