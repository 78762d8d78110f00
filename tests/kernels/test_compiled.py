"""The time loops as compiled, executed on the CPU: what the interpreter cannot show.

It knows no threads, so it does not see where the compiler puts the elements of a tile, which
register of the assembly in `sync.load` goes where, and what tensor cores take from which lane.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_machine import Code, names, parse

from fusedrnn.kernels import layout

pytest.importorskip("triton.backends.nvidia")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROBLEMS = (
    "lstm fp16",
    "lstm bf16, streamed, lengths, 8.0",
    "lstm fp16, wgmma",
    "lstm bf16, wgmma of 8 rows, packed",
    "gru fp16, wgmma of 32 rows, lengths",
    "lstm fp16, 4 warps",
    "gru bf16, packed, 4 warps",
    "gru fp32, 8.0",
    "rnn fp16",
    "rnn bf16, single block",
    "rnn fp32, single block",
    "rnn fp32, ieee, lengths",
    "reset before bf16",
    "means bf16",
    "gru fp32, ieee, 2 heads",
)
PROJECTION = "projection fp16, lengths"  # in a process of its own, with a longer lap
SMALL = "rnn fp16"
WARP_GROUPS = [name for name in PROBLEMS if "wgmma" in name]
EXACT = "rnn fp32, ieee, lengths"


def run(cache: Path, *problems: str, package: Path | None = None) -> subprocess.CompletedProcess:
    """Runs problems in a process that compiles.

    cache: folder in which Triton keeps what it compiled. package: folder of another fusedrnn.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if package is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    return subprocess.run(
        [sys.executable, HERE / "compiled_scan.py", *problems],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def records(done: subprocess.CompletedProcess) -> dict[str, dict]:
    found = map(json.loads, done.stdout.splitlines())
    return {record["problem"]: record for record in found}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The records of all problems, and the TTGIR and PTX of their kernels."""
    cache = tmp_path_factory.mktemp("triton")
    found = {}
    for problems in (PROBLEMS, (PROJECTION,)):
        done = run(cache, *problems)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        found |= records(done)
    return found, texts(cache, "ttgir"), texts(cache, "ptx")


def texts(cache: Path, kind: str) -> list[str]:
    return [file.read_text() for file in sorted(cache.rglob(f"scan_*.{kind}"))]


def warps(text: str) -> int:
    return int(re.search(r'"ttg.num-warps" = (\d+)', text)[1])  # type: ignore[index]


@pytest.mark.parametrize("name", [*PROBLEMS, PROJECTION])
def test_both_passes_compute_the_recurrence(name, compiled):
    record = compiled[0][name]
    too_far = {what: share for what, share in record["share"].items() if not share <= 1}
    assert too_far == {}
    one_stage = {"state 0", "final 0", "dx_gates", "dh_gates", "d_state 0"} <= set(record["share"])
    assert one_stage or {"output", "final[0]", "gradient[0]"} <= set(record["share"])


def test_some_elements_had_to_be_asked_for_again(compiled):
    """Else what asks again was never executed. Resident programs have nothing to ask for."""
    for name, record in compiled[0].items():
        assert (sum(record["retries"]) == 0) == ("single block" in name), name


def test_the_layout_is_as_needed(compiled):
    assert len(compiled[1]) == 2 * len((*PROBLEMS, PROJECTION))
    exchanging = [text for text in compiled[1] if "tt.elementwise_inline_asm" in text]
    alone = sum("single block" in name for name in PROBLEMS)
    assert len(exchanging) == len(compiled[1]) - 2 * alone
    for text in exchanging:
        assert layout.faults(text, warps(text)) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[1, 8], threadsPerWarp = [32, 1]", "[1, 4], threadsPerWarp = [32, 1]", "lies as"),
        ("[1, 8], threadsPerWarp = [32, 1]", "[1, 8], threadsPerWarp = [16, 2]", "lies as"),
        ("[1, 8], threadsPerWarp = [32, 1], warpsPerCTA = [2, 1], order = [1, 0]",
         "[1, 8], threadsPerWarp = [32, 1], warpsPerCTA = [2, 1], order = [0, 1]", "lies as"),
        ("[1, 8], threadsPerWarp = [32, 1], warpsPerCTA = [2, 1]",
         "[1, 8], threadsPerWarp = [32, 1], warpsPerCTA = [1, 2]", "lies as"),
        ("packed_element = 8", "packed_element = 16", "goes into 16 elements"),
        ("packed_element = 8", "packed_element = 1", "no assembly"),
    ],
)  # fmt: skip
def test_another_layout_is_found(old, new, fault, compiled):
    having = [text for text in compiled[1] if old in text and warps(text) == 2]
    assert having
    for text in having:
        assert any(fault in found for found in layout.faults(text.replace(old, new), 2))


MOVE = ("mov",)
TAKE_APART = ("mov", "add.s32", "and", "sub", "selp")  # a float32 into its upper part and the rest


def origins(
    code: Code, register: str, through: tuple[str, ...], seen: frozenset[str] = frozenset()
) -> set[str]:
    """Opcodes of what a register holds, looked up through some of them."""
    found = set()
    for instruction in code.instructions:
        stores = instruction.opcode.startswith(("st", "red", "bra", "ret", "bar"))
        if stores or not instruction.operands:
            continue
        if register not in names(instruction.operands[0]):
            continue
        if instruction.opcode.startswith(through):
            for source in itertools.chain(*map(names, instruction.operands[1:])):
                if source in code.registers and source not in seen and source[:2] != "%p":
                    found |= origins(code, source, through, seen | {source})
        else:
            found.add(instruction.opcode)
    return found


def test_what_is_loaded_is_multiplied_as_it_lies_in_the_registers(compiled):
    """Shared memory, shuffles and shifts would show as another origin: only names change, but for
    what takes factors apart."""
    products = apart = groups = 0
    for code in map(parse, compiled[2]):
        lefts = [names(i.operands[1]) for i in code.instructions if i.opcode.startswith("mma")]
        opcodes = {i.opcode for i in code.instructions}
        load = "ld.relaxed.gpu.global.v4.b32"
        if any(i.opcode.startswith("wgmma.mma") for i in code.instructions):
            groups += 1
            # The weights stay where they were loaded, and what was polled goes to shared memory.
            assert not lefts
            lefts = [names(i.operands[1]) for i in code.instructions if "mma_async" in i.opcode]
            found = set().union(*(origins(code, r, MOVE) for r in itertools.chain(*lefts)))
            # What is masked is 0, which the compiler takes from the counter of steps.
            assert {"ld.global.b32"} <= found <= {"ld.global.b32", "add.s32"}
            if load not in opcodes:  # backward, where parts are added up
                assert "ld.relaxed.gpu.global.b128" in opcodes
                continue
            stored = [i for i in code.instructions if i.opcode.startswith("st.shared.v4")]
            words = list(itertools.chain(*(names(i.operands[1]) for i in stored)))
            polled = [r for r in words if origins(code, r, MOVE) == {load}]
            # Each load stands there twice: it is asked for again.
            assert 8 * len(polled) == 16 * sum(i.opcode == load for i in code.instructions)
        elif lefts and load in opcodes:
            products += 1
            registers = list(itertools.chain(*lefts))
            found = set().union(*(origins(code, r, MOVE) for r in registers))
            if "and.b32" in found:
                apart += 1
                found = set().union(*(origins(code, r, TAKE_APART) for r in registers))
            assert found == {load}
    assert groups == 2 * len(WARP_GROUPS)
    alone = sum("single block" in name for name in PROBLEMS)
    assert products == 2 * (len((*PROBLEMS, PROJECTION)) - alone) - groups
    assert apart == 2 * sum("ieee" in name for name in PROBLEMS)


# Mistakes, and what gives them away. The first is none for the interpreter, and the last two are
# smaller than what it allows.
LOADED = 'tile = tl.load(slot_ptr + at, cache_modifier=".cg")'
MUTANTS = {
    "a tile that was not loaded": (
        "sync.py",
        LOADED,
        "tile = at.to(tl.int16).to(slot_ptr.dtype.element_ty, bitcast=True)",
        "BadAccess",
    ),
    "words of a vector in another order": (
        "sync.py", '[f"${4 * n + i}" for i in', '[f"${4 * n + (i ^ 1)}" for i in', "numbers"
    ),
    "reads another group's vector": (
        "fragments.py", "offset = group * BLOCK", "offset = (SPLIT - 1 - group) * BLOCK", "numbers"
    ),
    "halves of K in another order": (
        "fragments.py", "tile = tl.permute(tile, (0, 4, 1, 3, 2, 5))",
        "tile = tl.permute(tile, (0, 4, 1, 2, 3, 5))", "numbers",
    ),
    "both warp groups have the same units": (
        "wgmma.py", "k += warp_group() * PART", "k += warp_group() * 0", "numbers"
    ),
    "sums of one warp group": (
        "wgmma.py", "gl.split(first_group + second_group)", "gl.split(first_group)", "numbers"
    ),
    "gates in another order": (
        "wgmma.py", "gl.split(low) + gl.split(high)", "gl.split(high) + gl.split(low)", "numbers"
    ),
    "weights of another chunk": (
        "wgmma.py", "weights[chunk], right", "weights[CHUNKS - 1 - chunk], right", "numbers"
    ),
    "gates in another order, backward": (
        "wgmma_backward.py", "gl.join(gates[0], gates[2])", "gl.join(gates[2], gates[0])", "numbers"
    ),
    "parts for another chunk's owners": (
        "wgmma_backward.py", "weights[i], right", "weights[COUNT - 1 - i], right", "numbers"
    ),
    "parts of half of the warps": (
        "wgmma_backward.py", "x = left + right", "x = left", "numbers"
    ),
    "what is new looks like what is old": (
        "wgmma_backward.py", "+ 1) // 2 % 2", "* 0 + 1)", "numbers"
    ),
    "another program's parts": (
        "wgmma_backward.py", "(own * PROGRAMS + warp)", "((own ^ 1) * PROGRAMS + warp)", "numbers"
    ),
    "the rest of h is left out": (
        "matmul.py", "tl.dot(lhs_rest, rhs, total,", "tl.dot(lhs, rhs * 0, total,", EXACT
    ),
    "the rest of W is left out": (
        "matmul.py", "tl.dot(lhs, rhs_rest, total,", "tl.dot(lhs, rhs * 0, total,", EXACT
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MUTANTS)
def mutant(request, tmp_path_factory):
    """A copy of the package with a mistake in it, what running it gave, and its TTGIR."""
    file, old, new, shows = MUTANTS[request.param]
    folder = tmp_path_factory.mktemp("mutant")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fusedrnn", folder / "fusedrnn", ignore=ignored)
    kernels = folder / "fusedrnn" / "kernels"
    shutil.copytree(ROOT / "kernels", kernels, ignore=ignored)
    source = (kernels / file).read_text()
    assert source.count(old) == 1, f"{file} must have {old!r} for this mutant to be one"
    (kernels / file).write_text(source.replace(old, new))
    problem = EXACT if shows == EXACT else WARP_GROUPS[0] if "wgmma" in file else SMALL
    done = run(folder / "cache", problem, package=folder)
    return problem, shows, done, texts(folder / "cache", "ttgir")


def test_mistakes_are_noticed(mutant):
    problem, shows, done, layouts = mutant
    if shows in ("numbers", EXACT):
        assert done.returncode == 0, done.stderr[-3000:]
        share = records(done)[problem]["share"]
        assert max(share["final 0"], share["d_state 0"]) > 2
    else:
        assert done.returncode != 0
        assert shows in done.stderr
        assert all(layout.faults(text, warps(text)) for text in layouts)


@pytest.mark.parametrize(
    ("without", "shows"),
    [
        ("fence.proxy.async", "NotVisible: wgmma"),
        ("wgmma.fence", "NotVisible: wgmma"),
        ("wgmma.wait_group", "InUse"),
        ("wgmma.commit_group", "InUse"),
    ],
)
def test_what_warp_groups_need_is_noticed(without, shows, tmp_path):
    """Some versions of Triton put the fence there by themselves, so that no source lacks it."""
    done = run(tmp_path, "--without", without, WARP_GROUPS[0])
    assert done.returncode != 0
    assert shows in done.stderr


def test_a_left_operand_that_moves_is_found(compiled):
    """The warp groups' left operands differ, though the compiler takes them for the same."""
    having = [text for text in compiled[1] if "ttng.warp_group_dot" in text]
    assert len(having) == 2 * len(WARP_GROUPS)
    for text in having:
        kind = re.search(r"tensor<\d+x\d+x\w+, #ttg\.dot_op<[^>]*>>", text)
        assert kind is not None
        moved = text + f"%1 = ttg.convert_layout %0 : {kind[0]} -> tensor<64x64xf16, #blocked>\n"
        assert "changes its layout" in layout.faults(moved, 8)[0]
        assert layout.faults(text.replace("ld.relaxed", "ld.weak"), 8)
