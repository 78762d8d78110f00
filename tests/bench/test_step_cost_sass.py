"""The time loop of machine code made by hand: order, waits, counts."""

import pytest
from made_sass import line, program, step

from bench.step_cost import sass
from bench.step_cost.sass import early_consumers, serial_waits, time_loop

# Lines of a kernel, as nvdisasm prints them: a load that releases barrier 2 four clocks before the
# next instruction, and the store that waits for it.
REAL = """
.L_x_0:
    /*1960*/           LDG.E.128.STRONG.GPU R24, desc[UR12][R24.64] ; /* 0x0000000c18187981 */
                                        /* 0x000ea8000c1efd00 */
    /*1a00*/           STS.128 [R147], R24 ; /* 0x0000001893007388 */
                                        /* 0x004fe80000000c00 */
    /*1a10*/      @!P0 BRA P5, `(.L_x_0) ; /* 0xfffffffc00c48947 */
                                        /* 0x000fea000283ffff */
"""

POLL = [
    ("@!P3 LDG.E.STRONG.GPU R20, desc[UR4][R2.64]", dict(write=0)),
    ("@!P3 CCTL.IVALL", dict(wait=[0])),
]
SIGNAL = [
    ("STG.E.U16.STRONG.GPU desc[UR4][R8.64], R9", {}),
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P1 BRA `(.L_x_9)",
    "@P2 MEMBAR.ALL.GPU",
    "@P2 REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5",
    "L_x_9:",
]


HMMA = "HMMA.16816.F32 R4, R8, R12, R4"


def ring(barrier, register=24):
    return (f"LDG.E.128.STRONG.GPU R{register}, desc[UR4][R6.64]", dict(write=barrier))


def uses(*barriers):
    return ("STS.128 [R7], R24", dict(wait=barriers))


def leader(*parts, protocol="counter"):
    return time_loop(step(*parts), protocol).leader


def test_control_bits_of_real_lines():
    code, jumps = sass.parse(REAL)
    load, store, branch = code
    assert (load.stall, load.write, load.read, load.wait) == (4, 2, 7, 0)
    assert (store.stall, store.write, store.read, store.wait) == (4, 7, 7, 0b100)
    assert (load.address, load.op, load.width) == (0x1960, "LDG.E.128.STRONG.GPU", 16)
    assert branch.predicate == "!P0"
    assert jumps[2] == sass.flow.Jump(0, True)


def test_made_lines_are_read_back():
    text = line(0x70, "@P1 LDS.64 R4, [R5+0x10]", stall=9, write=3, read=1, wait=[0, 5])
    (i,), _ = sass.parse(text)
    assert (i.address, i.predicate, i.text) == (0x70, "P1", "LDS.64 R4, [R5+0x10]")
    assert (i.stall, i.write, i.read, i.wait) == (9, 3, 1, 0b100001)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="nvdisasm -hex -c"):
        sass.parse("nothing of the kind")
    with pytest.raises(ValueError, match="1 instructions and 0 upper halves"):
        sass.parse(line(0, "NOP").splitlines()[0])


@pytest.mark.parametrize(
    ("op", "width"),
    [("LDG.E", 4), ("LDG.E.U16", 2), ("LDS.U8", 1), ("LDG.E.64", 8), ("STS.128", 16),
     ("LDG.E.128.STRONG.GPU", 16), ("STG.E.U16.STRONG.GPU", 2)],
)  # fmt: skip
def test_width(op, width):
    assert sass.Instruction(0, None, op + " R1").width == width


def test_a_counter_is_polled_and_the_ring_is_read():
    poll, invalidate, load, plain, store, output = leader(
        *POLL, ring(1), "LDG.E.U16 R1, desc[UR4][R2.64]",
        "STG.E.STRONG.GPU desc[UR4][R2.64], R1", "STG.E desc[UR4][R2.64], R1",
    )[:6]  # fmt: skip
    assert [i.poll for i in (poll, invalidate, load)] == [True, False, False]
    assert [i.is_ring_load for i in (poll, load, plain)] == [False, True, False]
    assert [i.is_plain_load for i in (load, plain)] == [False, True]
    assert [i.is_publication for i in (store, output)] == [True, False]


def test_a_plain_load_with_an_invalidation_behind_it_is_no_poll():
    parts = [("LDG.E R20, desc[UR4][R2.64]", dict(write=0)), "CCTL.IVALL"]
    assert not any(i.poll for i in leader(*parts))


def test_only_the_leader_signals():
    loop = time_loop(step(*POLL, *SIGNAL), "counter")
    assert sum(i.name == "REDG" for i in loop.leader) == 1
    assert sum(i.name == "REDG" for i in loop.other) == 0
    assert sum(i.is_fence for i in loop.leader) == 1
    assert loop.counts()["BAR"] == 1


def test_fences_of_the_block_are_none():
    assert not sass.Instruction(0, None, "MEMBAR.ALL.CTA").is_fence
    assert sass.Instruction(0, None, "MEMBAR.SC.GPU").is_fence


SPIN = [
    "@P4 BRA `(.L_x_5)",
    "L_x_4:",
    *POLL,
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P5 BRA `(.L_x_4)",
    "L_x_5:",
]


def test_spin_loops_are_not_counted_where_they_can_be_left_out():
    loop = time_loop(step(*POLL, *SPIN, ring(1), *SIGNAL), "counter")
    assert sum(i.poll for i in loop.leader) == 1
    assert loop.spin_barriers == 1
    assert loop.counts()["BAR"] == 1


def test_a_spin_loop_with_the_only_poll_is_run_once():
    loop = time_loop(step(*SPIN, ring(1), *SIGNAL), "counter")
    assert sum(i.poll for i in loop.leader) == 1
    # The other warps go round it.
    assert sum(i.poll for i in loop.other) == 0


def test_polled_data_are_run_once():
    polled = ["L_x_4:", ring(0), ring(1), ("ISETP.NE.AND P5, PT, R24, R25, PT", dict(wait=[0, 1]))]
    publish = "STG.E.128.STRONG.GPU desc[UR4][R8.64], R9"
    loop = time_loop(step(*polled, "@P5 BRA `(.L_x_4)", publish), "sentinel")
    assert [sum(i.is_ring_load for i in way) for way in (loop.leader, loop.other)] == [2, 2]
    assert serial_waits(loop.once) == 0


RARE = [
    "@P1 BRA `(.L_x_9)",
    *["IADD3 R1, R1, R2, RZ"] * 99,
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    *SPIN,
    "@P3 BRA `(.L_x_8)",
    "MEMBAR.SC.GPU",
    "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5",
    "L_x_8:",
    "IADD3 R1, R1, R2, RZ",
    "L_x_9:",
]


def test_a_counter_barrier_once_in_many_steps_is_no_part_of_a_step_of_polled_data():
    meeting = "BAR.SYNC.DEFER_BLOCKING 0x0"  # of the reduction: in every step
    loop = time_loop(step(*RARE, ring(0), uses(0), meeting, HMMA), "sentinel")
    for way in (loop.leader, loop.other):
        assert not any(i.is_fence or i.poll for i in way)
        assert [i.name for i in way if i.name != "BRA"] == ["LDG", "STS", "BAR", "HMMA"]
    assert loop.spin_barriers == 0


def test_a_poll_of_data_is_left_before_it_asks_again():
    asm = [ring(0), "L_x_4:", ("VIMNMX R1, R2, R3, PT", dict(wait=[0])), "@P5 BRA `(.L_x_5)"]
    again = ["ISETP.EQ.AND P6, PT, R1, RZ, PT", ring(0), "@P6 BRA `(.L_x_4)", "L_x_5:"]
    loop = time_loop(step(*asm, *again, HMMA), "sentinel")
    assert sum(i.is_ring_load for i in loop.leader) == 1
    assert "ISETP" not in loop.counts()
    assert serial_waits(loop.once) == 0


K_LOOP = ["L_x_4:", ring(0), uses(0), "HMMA.16816.F32 R4, R8, R12, R4", "@P5 BRA `(.L_x_4)"]


def test_the_inner_loop_over_k_turns_as_often_as_planned():
    loop = time_loop(step(*POLL, *K_LOOP, *SIGNAL), "counter", trips=6, k_products=1)
    assert loop.counts()["HMMA"] == 6
    assert sum(i.name == "HMMA" for i in loop.once) == 1
    # One load of each turn, by design after those of the turn before.
    assert serial_waits(loop.once) == 0


def test_an_unrolled_inner_loop_turns_less_often():
    unrolled = K_LOOP[:-1] + K_LOOP[1:]
    loop = time_loop(step(*POLL, *unrolled, *SIGNAL), "counter", trips=6, k_products=1)
    assert loop.counts()["HMMA"] == 6


def test_loads_in_flight_together_do_not_wait_for_one_another():
    together = [ring(0), ring(1), ring(2), ring(2), uses(0), uses(1), uses(2)]
    assert serial_waits(leader(*POLL, *together)) == 0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_loads_one_after_the_other_wait_for_each_before(count):
    assert serial_waits(leader(*POLL, *[ring(0), uses(0)] * count)) == count - 1


def test_two_groups_of_loads_are_one_wait():
    assert serial_waits(leader(*POLL, ring(0), ring(1), uses(0), uses(1), ring(0), uses(0))) == 1


def test_a_wait_counts_once():
    assert serial_waits(leader(*POLL, ring(0), uses(0), ring(1), ring(2), uses(1, 2))) == 1
    # A barrier that was waited for is free again.
    assert serial_waits(leader(*POLL, ring(0), uses(0), ring(1), uses(0), ring(2))) == 1


def test_a_wait_for_a_barrier_that_a_load_shares_is_a_wait_for_the_load():
    other = ("LDC R1, c[0x0][0x210]", dict(write=0))
    assert (
        serial_waits(
            leader(*POLL, ring(0), other, ("IADD3 R1, R1, R2, RZ", dict(wait=[0])), ring(1))
        )
        == 1
    )


def test_a_wait_for_another_barrier_is_none():
    assert (
        serial_waits(leader(*POLL, ring(0), ("IADD3 R1, R1, R2, RZ", dict(wait=[3])), ring(1))) == 0
    )


X = ("LDG.E.U16 R140, desc[UR4][R24.64]", dict(write=4))
PACK = ("PRMT R140, R23, 0x5410, R140", dict(wait=[4]))


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([*POLL, ring(0), uses(0), HMMA, PACK, *SIGNAL, X], 0),  # used in the cell of the next step
        ([*POLL, ring(0), uses(0), HMMA, *SIGNAL, X, PACK], 1),  # before the back edge
        ([PACK, *POLL, ring(0), uses(0), HMMA, *SIGNAL, X], 1),  # behind it, before the poll
        ([X, *POLL, ring(0), uses(0), HMMA, PACK, *SIGNAL], 0),  # fetched at the top of the step
        ([*POLL, X, ring(0), uses(0), HMMA, PACK, *SIGNAL], 0),  # the product hides it
        ([*POLL, ring(0), uses(0), HMMA, X, PACK, *SIGNAL], 1),  # nothing hides it
    ],
)
def test_early_consumers(parts, found):
    early = early_consumers(leader(*parts))
    assert [i.text for i in early] == [X[0]] * found


def test_early_consumers_of_polled_data():
    publish = "STG.E.128.STRONG.GPU desc[UR4][R8.64], R9"
    late = leader(ring(0), uses(0), HMMA, PACK, publish, X, protocol="sentinel")
    early = leader(ring(0), uses(0), HMMA, publish, X, PACK, protocol="sentinel")
    assert [len(early_consumers(way)) for way in (late, early)] == [0, 1]


def test_weights_are_not_fetched_ahead():
    weights = ("LDG.E.64 R140, desc[UR4][R24.64]", dict(write=4))
    into = ("HMMA.16816.F32 R4, R8, R12, R4", dict(wait=[4]))
    # In an inner loop over K, and one after the other.
    looped = time_loop(
        step(*POLL, ring(0), "L_x_4:", weights, into, "@P5 BRA `(.L_x_4)", *SIGNAL), "counter"
    )
    unrolled = time_loop(step(*POLL, ring(0), *[weights, into] * 3, *SIGNAL, X), "counter")
    for loop in (looped, unrolled):
        assert early_consumers(loop.once) == []
    near = {i.address for i in unrolled.once if i.text == weights[0]}
    assert unrolled.near == near
    assert len(near) == 3
    assert looped.near >= looped.in_k


def test_each_of_two_tiles_has_its_own_early_consumers():
    publish = "STG.E.128.STRONG.GPU desc[UR4][R8.64], R9"
    tile = [ring(0), uses(0), HMMA, publish]
    good = leader(*tile, X, *tile, PACK, protocol="sentinel")
    bad = leader(*tile, X, PACK, *tile, protocol="sentinel")
    assert [len(early_consumers(way)) for way in (good, bad)] == [0, 1]


def test_the_first_function_is_read():
    two = step(*POLL) + "\n" + program("L_x_7:", HMMA, "@P0 BRA `(.L_x_7)")
    assert "HMMA" not in time_loop(two, "counter").counts()
