"""Code made by hand: bank conflicts that can be worked out on paper; order, waits, counts."""

import pytest
from made_sass import line, program, step

from bench.machine_code import (
    Instruction,
    Jump,
    Registers,
    Unknown,
    accesses,
    early_consumers,
    near,
    parse_ptx,
    parse_sass,
    sass_step,
    serial_waits,
)  # fmt: skip


def ptx_step(*statements: str) -> str:
    """A time loop around the statements; %r1 is the number of the thread."""
    lines = ["mov.u32 %r1, %tid.x;", "mov.u32 %r2, global_smem;"]
    lines += ["$L__BB0_2:", *statements, "setp.ne.s32 %p1, %r90, 7;", "@%p1 bra $L__BB0_2;"]
    return "\n".join([*lines, "ret;"])


def waves(*statements: str, threads: int = 32) -> list[tuple]:
    found = accesses(ptx_step(*statements), threads)
    return [(a.name, a.width, a.wavefronts, a.ideal) for a in found]


@pytest.mark.parametrize("degree", [1, 2, 4, 8, 16, 32])
def test_a_stride_of_so_many_words_is_so_many_conflicts(degree):
    found = waves(
        f"mul.lo.s32 %r3, %r1, {4 * degree};",
        "add.s32 %r4, %r2, %r3;",
        "ld.shared.b32 %r5, [%r4];",
        "st.shared.b32 [ %r4 + 256 ], %r5;",
    )
    assert found == [("LDS", 4, degree, 1), ("STS", 4, degree, 1)]


def test_an_odd_stride_has_no_conflict():
    assert waves("mul.lo.s32 %r3, %r1, 132;", "ld.shared.b32 %r5, [%r3];") == [("LDS", 4, 1, 1)]


def test_words_that_many_threads_read_are_handed_to_all():
    assert waves("and.b32 %r3, %r1, 16;", "ld.shared.b32 %r5, [%r3];") == [("LDS", 4, 1, 1)]
    # Two halves of one word are one word.
    assert waves("shl.b32 %r3, %r1, 1;", "ld.shared.b16 %rs5, [%r3];") == [("LDS", 2, 1, 1)]


@pytest.mark.parametrize(
    ("kind", "width", "ideal"),
    [("v2.b32", 8, 2), ("b64", 8, 2), ("v4.b32", 16, 4), ("v2.b64", 16, 4)],
)
def test_wide_accesses_serve_fewer_threads_at_once(kind, width, ideal):
    dense = waves(f"mul.lo.s32 %r3, %r1, {width};", f"st.shared.{kind} [%r3], {{%r5, %r6}};")
    assert dense == [("STS", width, ideal, ideal)]
    # A row of 128 bytes apart, each group's words start in the same bank.
    rows = waves("shl.b32 %r3, %r1, 7;", f"st.shared.{kind} [%r3], {{%r5, %r6}};")
    assert rows == [("STS", width, 32, ideal)]


@pytest.mark.parametrize(
    "statement",
    [
        "ld.param.b32 %r3, [kernel_param_4];",
        "mov.u32 %r3, %clock;",
        "add.s32 %r3, %r3, 4;",
        "mul.hi.u32 %r3, %r1, 12345;",
        "@%p9 mov.u32 %r3, 0;",
        "mul.wide.u32 %r3, %r1, 4;",
        "shr.s32 %r3, %r1, 1;",
    ],
)
def test_an_address_that_cannot_be_computed_is_reported(statement):
    assert waves(statement, "ld.shared.v4.b32 {%r5}, [%r3];") == [("LDS", 16, None, 4)]


def test_an_access_of_another_kind_is_reported():
    load = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r5}, [%r1];"
    assert waves(load) == [("ldmatrix", 4, None, 1)]
    assert waves("atom.shared.add.u32 %r5, [%r1], 1;") == [("atom", 4, None, 1)]


@pytest.mark.parametrize(("pitch", "found"), [(16, 4), (128, 32), (144, 4), (0, 4)])
def test_rows_of_matrices(pitch, found):
    """Eight lanes are served together; a lane's row is a quarter of the banks."""
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];"
    assert waves(f"mul.lo.s32 %r3, %r1, {pitch};", load) == [("LDSM", 16, found, 4)]


@pytest.mark.parametrize(("swizzle", "found"), [(1, 1), (2, None), (0, None)])
def test_what_warp_groups_read(swizzle, found):
    """16 columns of 32 bytes, a quarter of which is a warp's; without conflicts where the
    descriptor says that 128 bytes are swizzled."""
    product = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%r5}, {%r6}, %rd3, 1, 1, 1, 0;"
    lines = ["cvt.u64.u32 %rd2, %r1;", f"or.b64 %rd3, %rd2, {swizzle << 62};"]
    assert waves(*lines, product, threads=128) == [("HGMMA", 4, found, 1)]
    fence = "wgmma.fence.sync.aligned;"
    assert waves(*lines, fence, product, fence, threads=128) == [("HGMMA", 4, found, 1)]


def test_a_number_from_another_lane():
    shuffle = "shfl.sync.idx.b32 %r3, %r1, 2, 31, -1;"
    move = "shl.b32 %r4, %r3, 2;"
    assert waves(shuffle, move, "st.shared.b32 [%r4], %r5;") == [("STS", 4, 1, 1)]
    assert waves(shuffle.replace("idx", "bfly"), move, "st.shared.b32 [%r4], %r5;") == [
        ("STS", 4, None, 1)
    ]


SPIN = [
    "setp.eq.s32 %p3, %r80, 0;",
    "@%p3 bra $L__BB0_5;",
    "$L__BB0_4:",
    "ld.shared.b32 %r80, [global_smem];",
    "setp.lt.s32 %p4, %r80, %r81;",
    "@%p4 bra $L__BB0_4;",
    "$L__BB0_5:",
]


def test_a_spin_loop_is_left_out():
    assert [a.name for a in accesses(ptx_step(*SPIN, "st.shared.b32 [%r1], %r6;"), 32)] == ["STS"]


def test_a_product_in_a_loop_within_a_step_is_an_error():
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6}, {%r7}, {%r8}, {%r6};"
    with pytest.raises(ValueError, match="products outside of inner loops"):
        accesses(ptx_step(*SPIN[:3], product, *SPIN[3:]), 32)


def test_what_is_done_once_in_many_steps_is_no_part_of_a_step():
    arrive = [
        "@%p3 bra $L__BB0_5;",
        "bar.sync 0;",
        "st.shared.b32 [%r1], %r6;",
        "atom.global.gpu.release.add.u32 %r80, [%rd1], 1;",
        "$L__BB0_5:",
    ]
    wait = ["{", "@late bra READ;", "WAIT:", "ld.acquire.gpu.global.b32 x, [%rd1];"]
    wait += ["st.shared.b32 [%r1], %r6;", "@more bra WAIT;", "READ:", "}"]
    reduce = ["bar.sync 0;", "ld.shared.b32 %r5, [%r1];"]
    found = accesses(ptx_step(*arrive, *wait, *reduce), 32)
    assert [a.name for a in found] == ["LDS"]
    # Without a way past it, it is done in every step.
    found = accesses(ptx_step(*arrive[1:-1], *wait, *reduce), 32)
    assert [a.name for a in found] == ["STS", "LDS"]


def test_labels_of_asm_blocks_may_come_again():
    asm = ["{", ".reg .pred late;", "AGAIN:", "@!late bra DONE;", "ld.shared.b32 x, [%r1];"]
    asm += ["@late bra AGAIN;", "DONE:", "}"]
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6}, {%r7}, {%r8}, {%r6};"
    text = ptx_step("mov.u32 %r70, 0;", *asm, product, *asm, product, "st.shared.b32 [%r1], %r6;")
    found = accesses(text, 32)
    assert [a.name for a in found] == ["STS"]
    _, jumps = parse_ptx(text)
    back = [n for n, jump in jumps.items() if jump.target is not None and jump.target < n]
    assert len(back) == 3  # two blocks, and the time loop


def test_code_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="loop over the steps"):
        accesses("mov.u32 %r1, %tid.x;\nret;", 32)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("shl.b32 %r3, %r1, 30;", lambda t: (t << 30) & 0xFFFFFFFF),
        ("sub.s32 %r3, 0, %r1;", lambda t: -t & 0xFFFFFFFF),
        ("neg.s32 %r3, %r1;", lambda t: -t & 0xFFFFFFFF),
        ("not.b32 %r3, %r1;", lambda t: ~t & 0xFFFFFFFF),
        ("bfe.u32 %r3, %r1, 2, 3;", lambda t: t >> 2 & 7),
        ("bfe.s32 %r3, %r1, 4, 1;", lambda t: -(t >> 4 & 1) & 0xFFFFFFFF),
        ("shr.u32 %r3, %r1, 2;", lambda t: t >> 2),
        ("mad.lo.s32 %r3, %r1, 12, 5;", lambda t: 12 * t + 5),
        ("xor.b32 %r3, %r1, 0x15;", lambda t: t ^ 0x15),
    ],
)
def test_operations(statement, expected):
    statements, _ = parse_ptx("mov.u32 %r1, %tid.x;\n" + statement)
    name = statements[-1].operands[0]
    values = Registers(statements, 64).value(name).flatten().tolist()
    assert values == [expected(t) for t in range(64)]


def test_registers_with_two_values_are_unknown_unless_they_agree():
    same = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, 5;\nmov.u32 %r2, 5;"
    assert set(Registers(parse_ptx(same)[0], 32).value("%r2").flatten().tolist()) == {5}
    with pytest.raises(Unknown):
        Registers(parse_ptx(same.replace("5;", "6;", 1))[0], 32).value("%r2")


# SASS.

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
    return sass_step(step(*parts))[0][:-1]


def test_control_bits_of_real_lines():
    code, jumps = parse_sass(REAL)
    load, store, branch = code
    assert (load.stall, load.write, load.read, load.wait) == (4, 2, 7, 0)
    assert (store.stall, store.write, store.read, store.wait) == (4, 7, 7, 0b100)
    assert (load.address, load.op, load.width) == (0x1960, "LDG.E.128.STRONG.GPU", 16)
    assert branch.predicate == "!P0"
    assert jumps[2] == Jump(0, True)


def test_made_lines_are_read_back():
    text = line(0x70, "@P1 LDS.64 R4, [R5+0x10]", stall=9, write=3, read=1, wait=[0, 5])
    (i,), _ = parse_sass(text)
    assert (i.address, i.predicate, i.text) == (0x70, "P1", "LDS.64 R4, [R5+0x10]")
    assert (i.stall, i.write, i.read, i.wait) == (9, 3, 1, 0b100001)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="nvdisasm -hex -c"):
        parse_sass("nothing of the kind")
    with pytest.raises(ValueError, match="1 instructions and 0 upper halves"):
        parse_sass(line(0, "NOP").splitlines()[0])


@pytest.mark.parametrize(
    ("op", "width"),
    [("LDG.E", 4), ("LDG.E.U16", 2), ("LDS.U8", 1), ("LDG.E.64", 8), ("STS.128", 16),
     ("LDG.E.128.STRONG.GPU", 16), ("STG.E.U16.STRONG.GPU", 2)],
)  # fmt: skip
def test_width(op, width):
    assert Instruction(0, None, op + " R1").width == width


def test_the_ring_is_read_and_a_counter_acquired():
    acquire, invalidate, load, plain, store, output = run(
        *ACQUIRE, ring(1), "LDG.E.U16 R1, desc[UR4][R2.64]",
        "STG.E.STRONG.GPU desc[UR4][R2.64], R1", "STG.E desc[UR4][R2.64], R1",
    )  # fmt: skip
    assert [i.acquires for i in (acquire, invalidate, load)] == [True, False, False]
    assert [i.is_ring_load for i in (acquire, load, plain)] == [False, True, False]
    assert [i.is_plain_load for i in (load, plain)] == [False, True]
    assert [i.is_publication for i in (store, output)] == [True, False]


@pytest.mark.parametrize(
    ("text", "orders"),
    [("MEMBAR.ALL.CTA", False), ("MEMBAR.SC.GPU", True), ("MEMBAR.ALL.SYS", True),
     ("REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5", True), (ring(0)[0], False), (STORE, False)],
)  # fmt: skip
def test_what_orders_accesses_of_the_gpu(text, orders):
    assert Instruction(0, None, text).orders == orders


@pytest.mark.parametrize("rare", [ARRIVE, WAIT, [*WAIT, *ARRIVE]])
def test_arrivals_are_no_part_of_a_step(rare):
    # The barrier of a reduction, which every step comes to.
    found = run(*rare, ring(0), uses(0), BARRIER, HMMA, STORE)
    assert [i.name for i in found if i.name != "BRA"] == ["LDG", "STS", "BAR", "HMMA", "STG"]
    assert not any(i.orders for i in found)


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
    code, _ = sass_step(step(ring(0), *AGAIN, HMMA))
    assert sum(i.is_ring_load for i in code) == 1
    assert "ISETP" not in {i.name for i in code}
    assert serial_waits(code) == 0


def test_polled_data_are_run_once():
    polled = ["L_x_4:", ring(0), ring(1), ("ISETP.NE.AND P5, PT, R24, R25, PT", dict(wait=[0, 1]))]
    code, _ = sass_step(step(*polled, "@P5 BRA `(.L_x_4)", STORE))
    assert sum(i.is_ring_load for i in code) == 2
    assert serial_waits(code) == 0


@pytest.mark.parametrize("spin", [WAIT, AGAIN])
def test_a_barrier_in_a_spin_is_reported(spin):
    parts = [uses(0), BARRIER, HMMA]
    within = [*spin[:-2], BARRIER, *spin[-2:]]
    assert sass_step(step(ring(0), *spin, *parts))[1] == 0
    assert sass_step(step(ring(0), *within, *parts))[1] == 1


def test_products_in_a_loop_within_a_step_are_an_error():
    inner = [ADD, "L_x_4:", ring(0), uses(0), HMMA, "@P5 BRA `(.L_x_4)"]
    with pytest.raises(ValueError, match="products outside of inner loops"):
        sass_step(step(*inner, STORE))


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
    code, _ = sass_step(step(ring(0), *[weights, into] * 3, STORE, X))
    assert early_consumers(code) == []
    loads = {i.address for i in code if i.text == weights[0]}
    assert len(loads) == 3
    assert near(code) == loads


def test_the_first_function_is_read():
    two = step(ring(0)) + "\n" + program("L_x_7:", HMMA, "@P0 BRA `(.L_x_7)")
    assert "HMMA" not in {i.name for i in sass_step(two)[0]}
