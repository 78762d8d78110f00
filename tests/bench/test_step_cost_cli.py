"""The command, on what the Triton that is installed compiles; in a process of its own, because the
tests have put Triton into its interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

from made_sass import step
from test_step_cost_ptx import step as ptx_step

from bench.step_cost import __main__ as command
from bench.step_cost.parameters import LEVELS, Parameters, Range
from bench.step_cost.read import PARTS, Reading, attribute, by_address, read
from bench.step_cost.sass import time_loop
from fusedrnn.kernels.plan import Plan

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "bench.step_cost", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the command prints and leaves for a small layer, forward and backward."""
    folder = tmp_path_factory.mktemp("kept")
    told = run(
        "--cell", "gru", "--dtype", "bf16", "--hidden", 256, "--batch", 300,
        "--keep", folder / "files", "--json", folder / "rows.json",
    )  # fmt: skip
    return told, folder


def test_predicts_what_the_command_says(kept):
    script = (
        "from bench.step_cost.read import predict\n"
        "for which in ('forward', 'backward'):\n"
        "    print(predict('gru', 'bf16', 256, 300, which).predicted_us)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = json.loads((kept[1] / "rows.json").read_text())
    assert [float(line) for line in done.stdout.split()] == [row["predicted_us"] for row in rows]


def test_the_table_has_a_row_for_each_pass(kept):
    told, _ = kept
    rows = [line.split() for line in told.splitlines() if line.startswith("gru_bf16_256_300-")]
    names = [row[0] for row in rows if not row[0].endswith(":")]
    assert [name.split("-")[1] for name in names] == ["forward", "backward"]
    head = told.splitlines()[1].split()
    assert {"regs", "serial", "early", *PARTS} <= set(head)


def test_the_files_that_are_kept(kept):
    _, folder = kept
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row, path in zip(rows, sorted((folder / "files").iterdir(), reverse=True), strict=True):
        assert {file.name for file in path.iterdir()} == {
            "info.json", "kernel.cubin", "kernel.ptx", "kernel.sass",
        }  # fmt: skip
        assert json.loads((path / "info.json").read_text()) == row
        assert (path / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"
        assert "/*0000*/" in (path / "kernel.sass").read_text()


def test_what_a_row_says(kept):
    _, folder = kept
    for row in json.loads((folder / "rows.json").read_text()):
        assert (row["cell"], row["dtype"], row["H"], row["B"]) == ("gru", "bf16", 256, 300)
        plan = Plan(**row["plan"])
        assert row["warps"] == plan.num_warps
        assert row["programs"] == -(-256 // plan.block_h)
        assert row["launches"] == -(-300 // plan.batch_per_launch)
        assert row["wavefronts"] >= row["ideal_wavefronts"] > 0
        assert (row["unknown"], row["spill"]) == ([], 0)
        assert 0 < row["low_us"] <= row["predicted_us"] <= row["high_us"]
        assert sum(row["parts_us"].values()) == pytest.approx(row["predicted_us"])
        # What is stored and fetched behind the publication is the only part that may be hidden.
        assert all(row["parts_us"][part] > 0 for part in PARTS[:2])
        assert min(row["ring_loads"], row["products"]) > 0


def test_the_files_can_be_read_again(kept):
    _, folder = kept
    for path in (folder / "files").iterdir():
        row = json.loads((path / "info.json").read_text())
        used = {name: row[name] for name in ("registers", "spill", "shared")}
        again = read(
            (path / "kernel.ptx").read_text(), (path / "kernel.sass").read_text(),
            Plan(**row["plan"]), row["H"], used, B=row["B"],
        )  # fmt: skip
        assert isinstance(again, Reading)
        assert (again.wavefronts, again.serial_waits) == (row["wavefronts"], row["serial_waits"])
        assert (again.predicted_us, again.parts_us) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--target sm_99", "argument --target: invalid choice: 'sm_99'"),
        ("--cell mingru", "argument --cell: invalid choice: 'mingru'"),
        ("--hidden 0", "--hidden: expected at least 1, got 0"),
        ("--batch -3", "--batch: expected at least 1, got -3"),
        ("--hidden 300000", "no plan for forward of 'lstm' with H = 300000"),
        ("--hidden 300000 --every-plan", "no plan at all for forward of 'lstm' with H = 300000"),
    ],
)
def test_mistakes_are_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_nothing_is_compiled_where_triton_interprets(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main([])
    assert "TRITON_INTERPRET must not be 1" in capsys.readouterr().err


# --- reading, on machine code made by hand ------------------------------------------------------

PLAN = Plan("multi_block", 16, 16, 64, 1, 1, 1, 1, batch_per_launch=16)
LOAD = "ld.shared.b32 %r5, [%r4];"
USED = {"registers": 32, "spill": 0, "shared": 1024}
STEP = [
    ("LDG.E.128.STRONG.GPU R24, desc[UR4][R6.64]", dict(write=1)),
    ("LDS R1, [R2]", dict(wait=[1], write=2)),
    ("HMMA.16816.F32 R4, R8, R12, R4", dict(wait=[2], write=3)),
    ("LDS R1, [R2]", dict(wait=[3], write=2)),
    ("MUFU.TANH R1, R2", dict(wait=[2], write=4)),
    ("STG.E.U16.STRONG.GPU desc[UR4][R8.64], R9", dict(wait=[4])),
    ("STG.E.U16 desc[UR4][R8.64], R9", dict(stall=15)),
]


def reading(*ptx, parts=STEP, plan=PLAN, **how):
    return read(ptx_step(*ptx), step(*parts), plan, 48, USED, **how)


def test_a_batch_of_several_launches_takes_as_many_times_as_long():
    one, three = (reading(LOAD, LOAD, B=B, parameters=Parameters()) for B in (16, 48))
    assert (one.launches, three.launches) == (1, 3)
    assert three.predicted_us == pytest.approx(3 * one.predicted_us)
    assert three.parts_us == pytest.approx([3 * us for us in one.parts_us])
    assert one.programs == 3
    assert one.low_us < one.predicted_us < one.high_us


def test_bank_conflicts_reach_the_clock_model():
    stride = ["mul.lo.s32 %r4, %r1, 128;"]
    # 32-way, and as the thread is not known: reported, and taken for ideal.
    fast, slow, unknown = (
        reading(*way, LOAD, LOAD, parameters=Parameters())
        for way in (["shl.b32 %r4, %r1, 2;"], stride, [])
    )
    assert (fast.wavefronts, slow.wavefronts, unknown.wavefronts) == (2, 64, 0)
    assert (len(fast.unknown), len(slow.unknown), len(unknown.unknown)) == (0, 0, 2)
    clocks = Parameters().clock_ghz.middle * 1e3
    assert (slow.predicted_us - fast.predicted_us) * clocks == pytest.approx(62)
    assert unknown.predicted_us == fast.predicted_us


def test_where_it_goes():
    far = replace(Parameters(), store_visible=Range(400, 400, 400, "clocks", "far"))
    found = reading("shl.b32 %r4, %r1, 2;", LOAD, LOAD, parameters=far)
    clocks = [us * 1700 for us in found.parts_us]
    parts = dict(zip(PARTS, clocks, strict=True))
    a = far.at("middle")
    assert sum(clocks) == pytest.approx(found.predicted_us * 1700)
    assert parts["product"] == pytest.approx(a.shared_load, abs=3)
    assert parts["reduction"] == pytest.approx(a.mma, abs=3)
    assert parts["cell"] == pytest.approx(a.shared_load, abs=3)
    # From the store to the load that sees it, and the special function that the store waits for.
    whole = a.store_visible + a.poll_phase + a.l2_load / 2 + a.special
    assert parts["exchange"] + parts["stores"] == pytest.approx(whole, abs=10)
    assert 0 < parts["stores"] < 40


def test_where_it_goes_when_loads_are_waited_for_one_by_one():
    body = [
        ("LDG.E.128.STRONG.GPU R24, desc[UR4][R6.64]", dict(write=0)),
        ("LDG.E.128.STRONG.GPU R28, desc[UR4][R6.64]", dict(write=1)),
        ("VIMNMX R1, R24, R25, PT", dict(wait=[0])), ("VIMNMX R2, R28, R29, PT", dict(wait=[1])),
        "HMMA.16816.F32 R4, R8, R12, R4", "LDS R1, [R2]", "MUFU.TANH R1, R2",
        "STG.E.U16.STRONG.GPU desc[UR4][R8.64], R9", "STG.E.U16 desc[UR4][R8.64], R9",
    ]  # fmt: skip
    code = time_loop(step(*body)).step
    issued = tuple(float(10 * n) for n in range(len(code)))
    parts = attribute(code, issued, 10.0 * len(code))
    assert dict(zip(PARTS, parts, strict=True)) == {
        "exchange": 50, "product": 10, "reduction": 10, "cell": 10, "stores": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("left_out", "told"),
    [("HMMA", "a product"), ("LDG", "a load of what others"), ("STG", "a store for others")],
)
def test_a_step_that_lacks_a_landmark_is_refused(left_out, told):
    rest = [part for part in STEP if left_out not in str(part)]
    code = time_loop(step(*rest)).step
    with pytest.raises(ValueError, match=f"expected {told}"):
        attribute(code, tuple(map(float, range(len(code)))), len(code))


def test_accesses_of_an_unrolled_loop_repeat():
    class A:
        def __init__(self, kind, width, wavefronts):
            self.kind, self.width, self.wavefronts, self.ideal = kind, width, wavefronts, 1

    loads = [A("LDS", 4, 7), A("LDS", 4, 2), A("STS", 16, 9)]
    texts = ["LDS R1, [R2]"] * 4 + ["STS.128 [R2], R1", "STS [R2], R1"]
    code = time_loop(step(*texts)).step
    found = by_address(loads, code)
    assert list(found.values()) == [7, 2, 7, 2, 9, 1]
    # Where the numbers do not match, all get the mean.
    found = by_address(loads, time_loop(step(*["LDS R1, [R2]"] * 3)).step)
    assert list(found.values()) == [4.5, 4.5, 4.5]


def test_levels_are_the_parameters():
    assert LEVELS == ("low", "middle", "high")
