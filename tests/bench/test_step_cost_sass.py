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

HMMA = "HMMA.16816.F32 R4, R8, R12, R4"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
STORE = "STG.E.U16.STRONG.GPU desc[UR4][R8.64], R9"
ACQUIRE = [
    ("LDG.E.STRONG.GPU R20, desc[UR4][R2.64]", dict(write=0)),
    ("CCTL.IVALL", dict(wait=[0])),
]
# Once in many steps, as the kernels have it: all arrive, and each thread waits until all have.
ARRIVE = [
    "@P1 BRA `(.L_x_9)",
    BARRIER,
    "@P2 MEMBAR.ALL.GPU",
    "@P2 REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5",
    "L_x_9:",
]
ADD = "IADD3 R1, R1, R2, RZ"
WAIT = ["@P4 BRA `(.L_x_5)", "L_x_4:", *ACQUIRE, "@P5 BRA `(.L_x_4)", "L_x_5:"]


def ring(barrier, register=24):
    return (f"LDG.E.128.STRONG.GPU R{register}, desc[UR4][R6.64]", dict(write=barrier))


def uses(*barriers):
    return ("STS.128 [R7], R24", dict(wait=barriers))


def run(*parts):
    """What a step of these parts runs, without the jump back."""
    return time_loop(step(*parts)).step[:-1]


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


def test_the_ring_is_read_and_a_counter_acquired():
    acquire, invalidate, load, plain, store, output = run(
        *ACQUIRE, ring(1), "LDG.E.U16 R1, desc[UR4][R2.64]",
        "STG.E.STRONG.GPU desc[UR4][R2.64], R1", "STG.E desc[UR4][R2.64], R1",
    )  # fmt: skip
    assert [i.acquires for i in (acquire, invalidate, load)] == [True, False, False]
    assert [i.is_ring_load for i in (acquire, load, plain)] == [False, True, False]
    assert [i.is_plain_load for i in (load, plain)] == [False, True]
    assert [i.is_publication for i in (store, output)] == [True, False]


def test_a_plain_load_with_an_invalidation_behind_it_is_no_acquire():
    parts = [("LDG.E R20, desc[UR4][R2.64]", dict(write=0)), "CCTL.IVALL"]
    assert not any(i.acquires for i in run(*parts))


@pytest.mark.parametrize(
    ("text", "orders"),
    [("MEMBAR.ALL.CTA", False), ("MEMBAR.SC.GPU", True), ("MEMBAR.ALL.SYS", True),
     ("REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5", True), (ring(0)[0], False), (STORE, False)],
)  # fmt: skip
def test_what_orders_accesses_of_the_gpu(text, orders):
    assert sass.Instruction(0, None, text).orders == orders


@pytest.mark.parametrize("rare", [ARRIVE, WAIT, [*WAIT, *ARRIVE]])
def test_what_is_done_once_in_many_steps_is_no_part_of_a_step(rare):
    # The barrier of a reduction, which every step comes to.
    found = run(*rare, ring(0), uses(0), BARRIER, HMMA, STORE)
    assert [i.name for i in found if i.name != "BRA"] == ["LDG", "STS", "BAR", "HMMA", "STG"]
    assert not any(i.orders for i in found)


def test_a_long_way_to_what_is_rare_is_no_part_of_a_step_either():
    long = [ARRIVE[0], *[ADD] * 99, *ARRIVE[1:]]
    assert not any(i.name in ("IADD3", "BAR") for i in run(*long, ring(0), uses(0), HMMA))


def test_what_orders_in_every_step_is_part_of_it():
    found = run(*ACQUIRE, ring(0), uses(0), HMMA, STORE, *ARRIVE[1:-1])
    assert [i.name for i in found if i.orders] == ["LDG", "MEMBAR", "REDG"]


# Vectors that are not there yet are asked for again.
AGAIN = [
    "L_x_6:",
    ("VIMNMX R1, R2, R3, PT", dict(wait=[0])),
    "@P5 BRA `(.L_x_7)",
    "ISETP.EQ.AND P6, PT, R1, RZ, PT",
    ring(0),
    "@P6 BRA `(.L_x_6)",
    "L_x_7:",
]


def test_a_poll_of_data_is_left_before_it_asks_again():
    loop = time_loop(step(ring(0), *AGAIN, HMMA))
    assert sum(i.is_ring_load for i in loop.step) == 1
    assert "ISETP" not in loop.counts()
    assert serial_waits(loop.step) == 0


def test_polled_data_are_run_once():
    polled = ["L_x_4:", ring(0), ring(1), ("ISETP.NE.AND P5, PT, R24, R25, PT", dict(wait=[0, 1]))]
    loop = time_loop(step(*polled, "@P5 BRA `(.L_x_4)", STORE))
    assert sum(i.is_ring_load for i in loop.step) == 2
    assert serial_waits(loop.step) == 0


@pytest.mark.parametrize("spin", [WAIT, AGAIN])
def test_a_barrier_in_a_spin_is_reported(spin):
    parts = [uses(0), BARRIER, HMMA]
    within = [*spin[:-2], BARRIER, *spin[-2:]]
    assert time_loop(step(ring(0), *spin, *parts)).spin_barriers == 0
    assert time_loop(step(ring(0), *within, *parts)).spin_barriers == 1


def test_products_in_a_loop_within_a_step_are_an_error():
    inner = [ADD, "L_x_4:", ring(0), uses(0), HMMA, "@P5 BRA `(.L_x_4)"]
    with pytest.raises(ValueError, match="products outside of inner loops"):
        time_loop(step(*inner, STORE))


def test_loads_in_flight_together_do_not_wait_for_one_another():
    together = [ring(0), ring(1), ring(2), ring(2), uses(0), uses(1), uses(2)]
    assert serial_waits(run(*together)) == 0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_loads_one_after_the_other_wait_for_each_before(count):
    assert serial_waits(run(*[ring(0), uses(0)] * count)) == count - 1


def test_two_groups_of_loads_are_one_wait():
    assert serial_waits(run(ring(0), ring(1), uses(0), uses(1), ring(0), uses(0))) == 1


def test_a_wait_counts_once():
    assert serial_waits(run(ring(0), uses(0), ring(1), ring(2), uses(1, 2))) == 1
    # A barrier that was waited for is free again.
    assert serial_waits(run(ring(0), uses(0), ring(1), uses(0), ring(2))) == 1


def test_a_wait_for_a_barrier_that_a_load_shares_is_a_wait_for_the_load():
    other = ("LDC R1, c[0x0][0x210]", dict(write=0))
    assert serial_waits(run(ring(0), other, ("IADD3 R1, R1, R2, RZ", dict(wait=[0])), ring(1))) == 1


def test_a_wait_for_another_barrier_is_none():
    assert serial_waits(run(ring(0), ("IADD3 R1, R1, R2, RZ", dict(wait=[3])), ring(1))) == 0


X = ("LDG.E.U16 R140, desc[UR4][R24.64]", dict(write=4))
PACK = ("PRMT R140, R23, 0x5410, R140", dict(wait=[4]))


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([ring(0), uses(0), HMMA, PACK, STORE, X], 0),  # used in the cell of the next step
        ([ring(0), uses(0), HMMA, STORE, X, PACK], 1),  # before the back edge
        ([PACK, ring(0), uses(0), HMMA, STORE, X], 1),  # behind it, before the poll
        ([X, ring(0), uses(0), HMMA, PACK, STORE], 0),  # fetched at the top of the step
        ([ring(0), X, uses(0), PACK, HMMA, STORE], 0),  # the product hides it
        ([ring(0), uses(0), HMMA, X, PACK, STORE], 1),  # nothing hides it
    ],
)
def test_early_consumers(parts, found):
    early = early_consumers(run(*parts))
    assert [i.text for i in early] == [X[0]] * found


def test_without_an_exchange_nothing_is_early():
    assert early_consumers(run(HMMA, X, PACK)) == []


def test_weights_are_not_fetched_ahead():
    weights = ("LDG.E.64 R140, desc[UR4][R24.64]", dict(write=4))
    into = ("HMMA.16816.F32 R4, R8, R12, R4", dict(wait=[4]))
    loop = time_loop(step(ring(0), *[weights, into] * 3, STORE, X))
    assert early_consumers(loop.step) == []
    near = {i.address for i in loop.step if i.text == weights[0]}
    assert len(near) == 3
    assert loop.near == near


def test_the_first_function_is_read():
    two = step(ring(0)) + "\n" + program("L_x_7:", HMMA, "@P0 BRA `(.L_x_7)")
    assert "HMMA" not in time_loop(two).counts()
