"""The meter: the clock model and the reading on code made by hand; the command on what the Triton
that is installed compiles, in a process of its own, because tests may have put Triton into its
interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton.backends.nvidia")

from made_sass import step
from test_machine_code import ptx_step

from bench import step_cost
from bench.machine_code import Instruction, sass_step
from bench.run import SCHEMA
from bench.step_cost import (
    JUMP,
    LEVELS,
    PARTS,
    PIPE_ENTRY,
    Deadlock,
    Multiprocessor,
    Parameters,
    Range,
    attribute,
    by_address,
    load_parameters,
    read,
)  # fmt: skip
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


def test_the_table_has_a_row_for_each_pass():
    told = run("--cell", "gru", "--dtype", "bf16", "--hidden", 256, "--batch", 300)
    names = [line.split()[0] for line in told.splitlines() if line.startswith("gru_bf16_256_300-")]
    assert [name.split("-")[1] for name in names] == ["forward", "backward"]
    assert {"regs", "serial", "early", *PARTS} <= set(told.splitlines()[1].split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--target sm_99", "argument --target: invalid choice: 'sm_99'"),
        ("--cell mingru", "argument --cell: invalid choice: 'mingru'"),
        ("--hidden 0", "--hidden: expected at least 1, got 0"),
        ("--batch -3", "--batch: expected at least 1, got -3"),
        ("--hidden 300000", "no plan for forward of 'lstm' with H = 300000"),
        ("--hidden 300000 --every-plan", "no plan for forward of 'lstm' with H = 300000"),
    ],
)
def test_mistakes_are_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        step_cost.main(arguments.split())
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_nothing_is_compiled_where_triton_interprets(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        step_cost.main([])
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
    code, _ = sass_step(step(*body))
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
    code, _ = sass_step(step(*rest))
    with pytest.raises(ValueError, match=f"expected {told}"):
        attribute(code, tuple(map(float, range(len(code)))), len(code))


def test_accesses_of_an_unrolled_loop_repeat():
    class A:
        def __init__(self, name, width, wavefronts):
            self.name, self.width, self.wavefronts, self.ideal = name, width, wavefronts, 1

    loads = [A("LDS", 4, 7), A("LDS", 4, 2), A("STS", 16, 9)]
    texts = ["LDS R1, [R2]"] * 4 + ["STS.128 [R2], R1", "STS [R2], R1"]
    code, _ = sass_step(step(*texts))
    found = by_address(loads, code)
    assert list(found.values()) == [7, 2, 7, 2, 9, 1]
    # Where the numbers do not match, all get the mean.
    found = by_address(loads, sass_step(step(*["LDS R1, [R2]"] * 3))[0])
    assert list(found.values()) == [4.5, 4.5, 4.5]


# --- the clock model ----

A = Parameters().at("middle")


def code(*texts):
    """Instructions from (text, {bits}); a text alone has a stall of one clock."""
    made = []
    for n, text in enumerate(texts):
        text, bits = text if isinstance(text, tuple) else (text, {})
        predicate, _, rest = text.partition(" ") if text.startswith("@") else (None, "", text)
        made.append(Instruction(16 * n, predicate[1:] if predicate else None, rest, **bits))
    return tuple(made)


def clocks(step, warps=1, assumed=A, waves=None, together=1):
    waves = {} if waves is None else {i.address: waves for i in step if i.name in ("LDS", "STS")}
    found, issued = Multiprocessor(step, waves, assumed, warps, together).run(4 * together)
    assert len(issued) == len(step)
    return found


def load(barrier=0, op="LDG.E.STRONG.GPU"):
    return (f"{op} R1, desc[UR4][R2.64]", dict(write=barrier))


def use(*barriers):
    return ("IADD3 R1, R1, R2, RZ", dict(wait=sum(1 << b for b in barriers)))


ADD = "IADD3 R1, R1, R2, RZ"


def test_one_warp_with_one_load_from_l2():
    expected = PIPE_ENTRY + 1 + A.l2_load + 1 + JUMP
    assert clocks(code(load(), use(0))) == expected
    slow = Parameters().at("high")
    assert clocks(code(load(), use(0)), assumed=slow) - expected == slow.l2_load - A.l2_load


def test_a_load_that_is_not_of_the_exchange_comes_from_memory():
    plain = clocks(code(load(op="LDG.E"), use(0)))
    assert plain - clocks(code(load(), use(0))) == A.dram_load - A.l2_load


def test_loads_in_flight_together_take_one_trip_and_serial_ones_two():
    one = clocks(code(load(0), use(0)))
    together = clocks(code(load(0), load(1), use(0), use(1)))
    serial = clocks(code(load(0), use(0), load(1), use(1)))
    assert together - one == pytest.approx(2, abs=1)  # two instructions more
    assert serial - one == PIPE_ENTRY + 1 + A.l2_load + 1


@pytest.mark.parametrize(("warps", "each"), [(1, 1), (4, 1), (8, 2), (12, 3)])
def test_special_functions_of_a_scheduler_follow_at_an_interval(warps, each):
    n = 40
    found = clocks(code(*["MUFU.TANH R1, R2"] * n, "BAR.SYNC 0x0"), warps=warps)
    assert found == pytest.approx(n * each * A.special_clocks, abs=JUMP + A.barrier + 8)


@pytest.mark.parametrize(("warps", "each"), [(1, 1), (4, 1), (8, 2)])
def test_products_of_a_scheduler_follow_at_an_interval(warps, each):
    n = 40
    found = clocks(code(*["HMMA.16816.F32 R4, R8, R12, R4"] * n, "BAR.SYNC 0x0"), warps=warps)
    assert found == pytest.approx(n * each * A.mma_clocks, abs=JUMP + A.barrier + 8)


GROUP_PRODUCT = "HGMMA.64x16x16.F32 R24, R36, gdesc[UR8], R24"


@pytest.mark.parametrize("warps", [4, 8])
def test_products_of_warp_groups_follow_at_an_interval(warps):
    """One group waits for its own sums, two for the units that they share."""
    n = 40
    each = max(A.wgmma_chain, warps // 4 * 64 * 16 * 16 / A.wgmma_multiply_adds)
    found = clocks(code(*[GROUP_PRODUCT] * n, "BAR.SYNC 0x0"), warps=warps)
    assert found == pytest.approx(n * each, abs=JUMP + A.barrier + 16)


def test_the_sums_of_a_warp_group_are_waited_for():
    found = clocks(code(GROUP_PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert found == A.mma + 1 + JUMP


def test_the_result_of_a_product_takes_its_latency():
    found = clocks(code(("HMMA.16816.F32 R4, R8, R12, R4", dict(write=0)), use(0)))
    assert found == A.mma + 1 + JUMP


def test_a_scheduler_issues_one_instruction_a_clock():
    found = clocks(code(*[ADD] * 100, "BAR.SYNC 0x0"), warps=8)
    assert found == pytest.approx(2 * 100, abs=JUMP + A.barrier + 4)


def test_a_barrier_waits_for_the_last_warp():
    # The special functions of two warps follow one another, so the second is later at the barrier.
    n = 40
    body = code(*["MUFU.TANH R1, R2"] * n, "BAR.SYNC 0x0", ("IADD3 R1, R1, R2, RZ", dict(stall=15)))
    one, two = (clocks(body, warps=warps) for warps in (4, 8))
    assert two - one == pytest.approx(n * A.special_clocks, abs=A.special_clocks)


@pytest.mark.parametrize("waves", [1, 2, 32])
def test_bank_conflicts_of_all_warps_serialise(waves):
    n, warps = 20, 8
    body = code(*[("LDS R1, [R2]", dict(write=0))] * n, use(0), "BAR.SYNC 0x0")
    found = clocks(body, warps=warps, waves=waves)
    # Few wavefronts are bound by what the schedulers issue instead: two warps each.
    at_least = max(n * warps * waves, 2 * n)
    assert at_least <= found <= at_least + A.shared_load + A.barrier + PIPE_ENTRY + 2 * JUMP


def test_the_bandwidth_of_l2():
    n, warps = 50, 8
    body = code(*[load(op="LDG.E.128.STRONG.GPU")] * n, use(0), "BAR.SYNC 0x0")
    found = clocks(body, warps=warps)
    transfer = n * warps * 32 * 16 / A.l2_bytes_per_clock
    assert transfer <= found <= transfer + A.l2_load + A.barrier + JUMP + 8


READS = [load(0, "LDG.E.128.STRONG.GPU"), use(0)]
STORE = "STG.E.128.STRONG.GPU desc[UR4][R2.64], R1"


@pytest.mark.parametrize("own", [True, False])
def test_an_exchange(own):
    body = code(*([STORE, *READS] if own else [*READS, STORE]))
    far = SimpleNamespace(**{**vars(A), "store_visible": 1000})
    found = clocks(body, warps=8, assumed=far)
    expected = far.store_visible + A.poll_phase + A.l2_load / 2
    # Eight warps store 16 bytes a thread, 4 words at a time.
    assert found == pytest.approx(expected, abs=8 * 4 + PIPE_ENTRY + JUMP + 4)


def test_an_exchange_waits_for_the_last_warp_of_the_program():
    # Two warps of a scheduler share its unit, and what they compute is published behind it.
    n = 100
    body = code(*READS, *["MUFU.TANH R1, R2"] * n, STORE)
    one, two = (clocks(body, warps=warps) for warps in (4, 8))
    assert two - one == pytest.approx(n * A.special_clocks, abs=30)


@pytest.mark.parametrize("together", [2, 4])
def test_programs_on_one_multiprocessor_wait_at_the_same_time_and_issue_in_turn(together):
    body = code(*READS, *[ADD] * 100, STORE)
    alone = clocks(body, warps=4)
    assert alone > 2 * len(body)
    found = clocks(body, warps=4, together=together)
    assert found - alone == pytest.approx((together - 1) * len(body), abs=20 * together)


def test_a_step_that_waits_for_what_it_publishes_later():
    with pytest.raises(Deadlock, match="2 of 2 warps wait for what they publish later"):
        clocks(code(STORE, *READS, STORE), warps=2)


def test_every_level_is_slower_than_the_one_before():
    body = code(*READS, "BAR.SYNC 0x0", STORE)
    times = [clocks(body, warps=8, assumed=Parameters().at(level)) for level in LEVELS]
    assert times == sorted(set(times))


# --- parameters ----

TABLE = Parameters()
NAMES = [f.name for f in fields(Parameters)]
FASTER_WHEN_LARGER = ("l2_bytes_per_clock", "l2_bytes_of_all", "wgmma_multiply_adds")


def results(folder, name, clocks, capability="sm_90", date="2026-01-01T00:00:00"):
    environment = {"device": "Imaginary GPU", "date": date, "capability": capability}
    content = {
        "schema": SCHEMA,
        "environment": environment,
        "rows": [],
        "limits": {"clocks": clocks},
    }
    path = folder / "imaginary-gpu" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_range_a_unit_and_a_source(name):
    value = getattr(TABLE, name)
    assert isinstance(value, Range)
    numbers = [value.low, value.middle, value.high]
    assert numbers == sorted(numbers, reverse=name in FASTER_WHEN_LARGER)
    assert min(numbers) > 0
    assert value.unit in ("clocks", "GHz", "bytes a clock", "multiply-adds a clock")
    assert len(value.source) > 10


def test_a_measured_value_replaces_the_tables(tmp_path):
    results(tmp_path, "1.json", {"poll_phase": 512.0, "clock_ghz": 1.98})
    loaded = load_parameters(tmp_path, "sm_90")
    phase = loaded.poll_phase
    assert (phase.low, phase.middle, phase.high) == (512, 512, 512)
    assert phase.source.endswith("1.json")
    assert phase.unit == TABLE.poll_phase.unit
    assert loaded.clock_ghz.middle == 1.98
    assert loaded.l2_load == TABLE.l2_load


def test_another_kind_of_gpu_does_not_count(tmp_path):
    results(tmp_path, "1.json", {"poll_phase": 512.0}, capability="sm_80")
    assert load_parameters(tmp_path, "sm_90") == TABLE
    assert load_parameters(tmp_path, "sm_80") != TABLE


@pytest.mark.parametrize("clocks", [{"fence": 1.0}, {"poll_phase": 0.0}, {"at": 3.0}])
def test_what_is_no_parameter_is_an_error(tmp_path, clocks):
    results(tmp_path, "1.json", clocks)
    with pytest.raises(ValueError, match=r"1\.json: limits\.clocks: expected positive numbers of"):
        load_parameters(tmp_path, "sm_90")
