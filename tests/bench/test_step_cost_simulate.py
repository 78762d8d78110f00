"""The clock model on programs whose time can be worked out on paper."""

from types import SimpleNamespace

import pytest

from bench.step_cost.parameters import LEVELS, Parameters
from bench.step_cost.sass import Instruction, TimeLoop
from bench.step_cost.simulate import JUMP, PIPE_ENTRY, Deadlock, simulate

A = Parameters().at("middle")


def code(*texts):
    """Instructions from (text, {bits}); a text alone has a stall of one clock."""
    made = []
    for n, text in enumerate(texts):
        text, bits = text if isinstance(text, tuple) else (text, {})
        predicate, _, rest = text.partition(" ") if text.startswith("@") else (None, "", text)
        made.append(Instruction(16 * n, predicate[1:] if predicate else None, rest, **bits))
    return tuple(made)


def clocks(step, warps=1, assumed=A, waves=None, **how):
    loop = TimeLoop(step, frozenset(), 0)
    if waves is not None:
        waves = {i.address: waves for i in step if i.name in ("LDS", "STS", "LDSM")}
    found = simulate(loop, waves or {}, assumed, warps=warps, **how)
    assert len(found.issued) == len(step)
    return found.clocks


def load(barrier=0, op="LDG.E.STRONG.GPU"):
    return (f"{op} R1, desc[UR4][R2.64]", dict(write=barrier))


def use(*barriers):
    return ("IADD3 R1, R1, R2, RZ", dict(wait=sum(1 << b for b in barriers)))


ADD = "IADD3 R1, R1, R2, RZ"


def test_stalls_add_up():
    assert clocks(code(("IADD3 R1, R1, R2, RZ", dict(stall=6)), ADD)) == 6 + 1 + JUMP


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


def test_latencies_of_shared_memory():
    pairs = [("LDS R1, [R2]", A.shared_load), ("LDSM.16.M88.4 R1, [R2]", A.ldmatrix)]
    for text, latency in pairs:
        assert clocks(code((text, dict(write=0)), use(0)), waves=1) == latency + 1 + JUMP
    assert (
        clocks(code(("SHFL.BFLY R1, R2, 0x1, 0x1f", dict(write=0)), use(0))) == A.shuffle + 1 + JUMP
    )


def test_the_bandwidth_of_l2():
    n, warps = 50, 8
    body = code(*[load(op="LDG.E.128.STRONG.GPU")] * n, use(0), "BAR.SYNC 0x0")
    found = clocks(body, warps=warps)
    transfer = n * warps * 32 * 16 / A.l2_bytes_per_clock
    assert transfer <= found <= transfer + A.l2_load + A.barrier + JUMP + 8


def test_waiting_for_all_but_the_last_loads():
    few = ("DEPBAR.LE SB0, 0x1", {})
    two = code(load(0), ("IADD3 R1, R1, R2, RZ", dict(stall=15)), load(0), few)
    one_left = clocks(two)
    none_left = clocks(
        code(*[(i.text, dict(write=i.write, stall=i.stall)) for i in two[:3]], use(0))
    )
    assert none_left - one_left == 1 + 15  # the second load was issued so much later


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


def test_steps_are_alike():
    body = code(*READS, "BAR.SYNC 0x0", STORE)
    assert clocks(body, warps=4, steps=4) == pytest.approx(clocks(body, warps=4, steps=9))


@pytest.mark.parametrize("op", ["HGMMA.64x16x16.F32.BF16", "HGMMA.64x16x8.F32.TF32"])
def test_asynchronous_products(op):
    n = 40
    body = code(*[f"{op} R24, gdesc[UR4], R24"] * n, "WARPGROUP.DEPBAR.LE gsb0, 0x0", ADD)
    expected = n * 2 * A.mma_clocks + A.mma + 2 + JUMP
    assert clocks(body, warps=4) == pytest.approx(expected, abs=4)


def test_every_level_is_slower_than_the_one_before():
    body = code(*READS, "BAR.SYNC 0x0", STORE)
    times = [clocks(body, warps=8, assumed=Parameters().at(level)) for level in LEVELS]
    assert times == sorted(set(times))
