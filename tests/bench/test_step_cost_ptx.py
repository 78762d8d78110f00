"""Bank conflicts of PTX made by hand, where the answer can be worked out on paper."""

import pytest

from bench.step_cost.ptx import Registers, Unknown, accesses, parse


def step(*statements: str) -> str:
    """A time loop around the statements; %r1 is the number of the thread."""
    lines = ["mov.u32 %r1, %tid.x;", "mov.u32 %r2, global_smem;"]
    lines += ["$L__BB0_2:", *statements, "setp.ne.s32 %p1, %r90, 7;", "@%p1 bra $L__BB0_2;"]
    return "\n".join([*lines, "ret;"])


def waves(*statements: str, threads: int = 32) -> list[tuple]:
    found = accesses(step(*statements), threads)
    return [(a.kind, a.width, a.wavefronts, a.ideal) for a in found]


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


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("form", ["", ".trans"])
@pytest.mark.parametrize(("op", "kind"), [("ldmatrix", "LDSM"), ("stmatrix", "STSM")])
def test_matrices_are_eight_rows_of_sixteen_bytes(op, kind, form, matrices):
    def of(stride):
        address, registers = "[%r3]", "{%r5, %r6}"
        operands = [registers, address] if op == "ldmatrix" else [address, registers]
        return waves(
            f"mul.lo.s32 %r3, %r1, {stride};",
            f"{op}.sync.aligned.m8n8.x{matrices}{form}.shared.b16 {', '.join(operands)};",
        )

    assert of(16) == [(kind, 16 * matrices, matrices, matrices)]
    assert of(128) == [(kind, 16 * matrices, 8 * matrices, matrices)]
    assert of(64) == [(kind, 16 * matrices, 4 * matrices, matrices)]
    assert of(144) == [(kind, 16 * matrices, matrices, matrices)]


def test_a_swizzle_takes_the_conflicts_away():
    plain = ["shl.b32 %r3, %r1, 7;", "and.b32 %r4, %r1, 7;", "shl.b32 %r5, %r4, 4;"]
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11, %r12, %r13, %r14}, [%r6];"
    assert waves(*plain, "xor.b32 %r6, %r3, %r5;", load) == [("LDSM", 64, 4, 4)]
    assert waves(*plain, "or.b32 %r6, %r3, 0;", load) == [("LDSM", 64, 32, 4)]


def test_only_threads_whose_predicate_holds_count():
    address = "shl.b32 %r3, %r1, 7;"
    first_eight = "setp.lt.u32 %p2, %r1, 8;"
    assert waves(address, first_eight, "@%p2 ld.shared.b32 %r5, [%r3];") == [("LDS", 4, 8, 1)]
    assert waves(address, first_eight, "@!%p2 ld.shared.b32 %r5, [%r3];") == [("LDS", 4, 24, 1)]
    # A vector of 16 bytes takes four groups of eight threads; three of them do nothing.
    wide = "mul.lo.s32 %r3, %r1, 16;"
    assert waves(wide, first_eight, "@%p2 st.shared.v4.b32 [%r3], {%r5};") == [("STS", 16, 1, 1)]
    # Who knows: all.
    unknown = "setp.lt.u32 %p2, %r77, 8;"
    assert waves(address, unknown, "@%p2 ld.shared.b32 %r5, [%r3];") == [("LDS", 4, 32, 1)]


def test_the_worst_warp_counts():
    # Warp 1 reads with a stride of 4 words, warp 0 without one.
    found = waves(
        "setp.ge.u32 %p2, %r1, 32;",
        "selp.b32 %r4, 16, 4, %p2;",
        "mul.lo.s32 %r3, %r1, %r4;",
        "ld.shared.b32 %r5, [%r3];",
        threads=64,
    )
    assert found == [("LDS", 4, 4, 1)]


@pytest.mark.parametrize(
    "statement",
    [
        "ld.param.b32 %r3, [kernel_param_4];",
        "mov.u32 %r3, %clock;",
        "add.s32 %r3, %r3, 4;",
        "mul.hi.u32 %r3, %r1, 12345;",
        "@%p9 mov.u32 %r3, 0;",
    ],
)
def test_an_address_that_cannot_be_computed_is_reported(statement):
    assert waves(statement, "ld.shared.v4.b32 {%r5}, [%r3];") == [("LDS", 16, None, 4)]


def test_an_access_of_another_kind_is_reported():
    assert waves("atom.shared.add.u32 %r5, [%r1], 1;") == [("atom", 4, None, 1)]


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
    assert [a.kind for a in accesses(step(*SPIN, "st.shared.b32 [%r1], %r6;"), 32)] == ["STS"]


def test_a_product_in_a_loop_within_a_step_is_an_error():
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6}, {%r7}, {%r8}, {%r6};"
    with pytest.raises(ValueError, match="products outside of inner loops"):
        accesses(step(*SPIN[:3], product, *SPIN[3:]), 32)


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
    found = accesses(step(*arrive, *wait, *reduce), 32)
    assert [a.kind for a in found] == ["LDS"]
    # Without a way past it, it is done in every step.
    found = accesses(step(*arrive[1:-1], *wait, *reduce), 32)
    assert [a.kind for a in found] == ["STS", "LDS"]


def test_labels_of_asm_blocks_may_come_again():
    asm = ["{", ".reg .pred late;", "AGAIN:", "@!late bra DONE;", "ld.shared.b32 x, [%r1];"]
    asm += ["@late bra AGAIN;", "DONE:", "}"]
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6}, {%r7}, {%r8}, {%r6};"
    text = step("mov.u32 %r70, 0;", *asm, product, *asm, product, "st.shared.b32 [%r1], %r6;")
    found = accesses(text, 32)
    assert [a.kind for a in found] == ["STS"]
    _, jumps = parse(text)
    back = [n for n, jump in jumps.items() if jump.target is not None and jump.target < n]
    assert len(back) == 3  # two blocks, and the time loop


def test_wgmma_reads_each_operand_once_for_its_four_warps():
    op = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    both = waves(f"{op} {{%f1,%f2}}, %rd1, %rd2, 1, 1, 1, 0, 0;")
    own = waves(f"{op} {{%f1,%f2}}, {{%r1,%r2}}, %rd2, 1, 1, 1, 0;")
    # (64 + 16) rows of 32 bytes, or 16 rows, at 128 bytes a clock.
    assert both == [("HGMMA", 0, 80 * 32 / 128 / 4, 80 * 32 / 128 / 4)]
    assert own == [("HGMMA", 0, 16 * 32 / 128 / 4, 16 * 32 / 128 / 4)]


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
        ("bfi.b32 %r3, %r1, 0, 8, 5;", lambda t: (t & 31) << 8),
        ("mad.lo.s32 %r3, %r1, 12, 5;", lambda t: 12 * t + 5),
        ("mul.wide.u32 %rd3, %r1, 2147483648;", lambda t: t * 2147483648),
        ("div.u32 %r3, %r1, 5;", lambda t: t // 5),
        ("rem.u32 %r3, %r1, 5;", lambda t: t % 5),
        ("shfl.sync.idx.b32 %r3, %r1, 3, 31, -1;", lambda t: t // 32 * 32 + 3),
        ("cvt.u64.u32 %rd3, %r1;", lambda t: t),
        ("xor.b32 %r3, %r1, 0x15;", lambda t: t ^ 0x15),
    ],
)
def test_operations(statement, expected):
    statements, _ = parse("mov.u32 %r1, %tid.x;\n" + statement)
    name = statements[-1].operands[0]
    values = Registers(statements, 64).value(name).flatten().tolist()
    assert values == [expected(t) for t in range(64)]


def test_a_negative_number_stays_one_where_it_is_compared_and_shifted():
    text = "mov.u32 %r1, %tid.x;\nsub.s32 %r2, %r1, 16;\nsetp.lt.s32 %p1, %r2, 0;\n"
    text += "shr.s32 %r3, %r2, 31;\nshr.u32 %r4, %r2, 31;"
    registers = Registers(parse(text)[0], 32)
    assert registers.value("%p1").flatten().tolist() == [int(t < 16) for t in range(32)]
    assert registers.value("%r3").flatten().tolist() == [0xFFFFFFFF * (t < 16) for t in range(32)]
    assert registers.value("%r4").flatten().tolist() == [int(t < 16) for t in range(32)]


def test_registers_with_two_values_are_unknown_unless_they_agree():
    same = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, 5;\nmov.u32 %r2, 5;"
    assert set(Registers(parse(same)[0], 32).value("%r2").flatten().tolist()) == {5}
    with pytest.raises(Unknown):
        Registers(parse(same.replace("5;", "6;", 1))[0], 32).value("%r2")
