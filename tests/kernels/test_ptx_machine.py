"""The machine that executes compiled kernels: what it refuses, and threads on different paths."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_machine import (
    BadAccess,
    Diverged,
    InUse,
    Machine,
    NotVisible,
    Stuck,
    UnknownInstruction,
)

KERNEL = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
\t.reg .pred \t%p<4>;
\t.reg .b32 \t%r<8>;
\t.reg .b64 \t%rd<4>;
\tld.param.b64 \t%rd1, [kernel_param_0];
\tmov.u32 \t%r1, %tid.x;  // comments go; as {braces} in them
\tmul.wide.u32 \t%rd2, %r1, 4;
\tadd.s64 \t%rd3, %rd1, %rd2;
\tBODY
\tret;
}
"""


def run(body: str, grid=(1, 1, 1), threads: int = 64, shared: int = 0) -> np.ndarray:
    """What the kernel leaves in memory, which was 0; %rd3 points at each thread's own word."""
    memory = np.zeros(4 * threads, np.uint8)
    address = 1 << 40
    ptx = KERNEL.replace("BODY", body).replace("reqntid 64", f"reqntid {threads}")
    Machine(ptx, [address], {address: memory}, grid, shared).run(turns=10_000)
    return memory.view(np.uint32)


def test_threads_take_their_own_paths_and_meet_again():
    # Thread i adds i as often as i % 4 says, in a block whose names are its own.
    block = """
    {
    .reg .pred again;
    .reg .b32 left;
    and.b32 left, %r1, 3;
    AGAIN:
    setp.eq.s32 again, left, 0;
    @again bra DONE;
    sub.s32 left, left, 1;
    add.s32 %r2, %r2, %r1;
    bra AGAIN;
    DONE:
    }
    """
    body = f"mov.b32 %r2, 0; {block} {block} bar.sync 0; st.global.b32 [%rd3 + 0], %r2;"
    thread = np.arange(64)
    assert (run(body) == 2 * thread * (thread % 4)).all()


def test_small_numbers_are_flushed_where_the_instruction_says_so():
    # 2^-100 * 2^-30 and 2^-130 * 2^100.
    numbers = "mul{0}.f32 %r2, 0f0D800000, 0f30800000; mul{0}.f32 %r3, 0f00080000, 0f71800000;"
    store = "add.f32 %r4, %r2, %r3; st.global.b32 [%rd3 + 0], %r4;"
    exact = run(numbers.format("") + store.replace("%r4, %r2, %r3", "%r4, %r2, 0f00000000"))
    assert (exact.view(np.float32) == 2.0**-130).all()
    assert (run(numbers.format(".ftz") + store).view(np.float32) == 0).all()


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("mul.hi.u32 %r2, 0xFFFFFFFF, 0xFFFFFFFE", np.uint32(0xFFFFFFFD)),
        ("mul.hi.s32 %r2, -3, 0x40000000", np.int32(-1)),
        ("rcp.approx.f32 %r2, 0f40800000", np.float32(0.25)),
        ("tanh.approx.f32 %r2, 0f41A00000", np.float32(1)),
    ],
)
def test_arithmetic(instruction, result):
    assert (
        run(f"{instruction}; st.global.b32 [%rd3 + 0], %r2;").view(result.dtype) == result
    ).all()


def test_programs_take_turns():
    """Every program waits until all four have counted themselves."""
    body = """
    prefetch.global.L2 [%rd1 + 0];
    fence.acq_rel.gpu;
    setp.eq.s32 %p1, %r1, 0;
    @%p1 atom.global.gpu.release.add.u32 %r2, [%rd1 + 0], 1;
    $WAIT:
    ld.global.gpu.acquire.b32 %r3, [%rd1 + 0];
    setp.lt.s32 %p2, %r3, 4;
    @%p2 bra $WAIT;
    """
    assert run(body, grid=(2, 2, 1))[0] == 4
    with pytest.raises(Stuck, match="3 of 3"):
        run(body, grid=(3, 1, 1))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("frobnicate.b32 %r2, %r1;", UnknownInstruction, "frobnicate.b32 %r2, %r1"),
        ("shl.f32 %r2, %r1, frob;", UnknownInstruction, "frob"),
        ("cvt.rz.f16.f32 %r2, %r1;", UnknownInstruction, "cvt.rz"),
        ("st.global.b32 [%rd3 + 4], %r1;", BadAccess, "4 bytes at"),
        ("st.global.b32 [%rd3 + -4], %r1;", BadAccess, "4 bytes at"),
        ("ld.global.b32 %r2, [%rd3 + 2];", BadAccess, "not aligned"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd3 + 0];", BadAccess, "not aligned"),
        ("mov.b32 %r2, 0; ld.shared.b32 %r3, [%r2];", BadAccess, "4 bytes at"),
        ("setp.lt.s32 %p1, %r1, 3; @%p1 bar.sync 0;", Diverged, "bar.sync"),
        ("setp.lt.s32 %p1, %r1, 3; @%p1 shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;", Diverged, "shfl"),
    ],
)
def test_refuses(body, error, message):
    with pytest.raises(error, match=message):
        run(body)


# A product of 64 x 16 ones and 16 x 8 numbers that lie in 256 bytes, nothing swizzled: the two
# halves of K are 128 bytes apart. What its operands are is for the tests to say.
ONES = "mov.b32 %r6, 0x3C003C00; mov.b64 %rd2, 0x80000;"
PRODUCT = """wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
    {%r2, %r3, %r4, %r5}, {%r6, %r6, %r6, %r6}, %rd2, 0, 1, 1, 0;"""
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def test_one_of_two_warp_groups_multiplies():
    body = f"""
    {ONES}
    shl.b32 %r3, %r1, 2;
    setp.lt.s32 %p1, %r1, 64;
    cvt.rn.f16x2.f32 %r4, 0f00000000, 0f3F800000;
    @%p1 st.shared.b32 [%r3], %r4;
    setp.eq.s32 %p1, %r1, 37;
    cvt.rn.f16x2.f32 %r4, 0f40A00000, 0f40400000;
    @%p1 st.shared.b32 [%r3], %r4;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.lt.s32 %p1, %r1, 128;
    @%p1 bra TOGETHER;
    {PRODUCT}
    TOGETHER:
    @%p1 mov.b32 %r3, 0;
    @%p1 bra END;
    {DONE}
    END:
    st.global.b32 [%rd3 + 0], %r3;
    """
    # A lane stores its second sum, of column 2 * (lane % 4) + 1. Word 37 is of the second half of
    # K, of column 1: 5 and 3 instead of 0 and 1. The other group may use the same registers.
    found = run(body, threads=256, shared=256).view(np.float32).reshape(2, 32, 4)
    assert (found[0] == 0).all()
    assert (found[1] == [15, 8, 8, 8]).all()


def edited(old: str, new: str) -> str:
    assert old in PRODUCT
    return PRODUCT.replace(old, new)


UNFENCED = edited("wgmma.fence.sync.aligned;", "")


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (edited("1, 1, 0", "-1, 1, 0"), UnknownInstruction, "wgmma.mma_async"),
        (edited("1, 1, 0", "1, 1, 1"), UnknownInstruction, "wgmma.mma_async"),
        (edited("f32.f16.f16", "f16.f16.f16"), UnknownInstruction, "wgmma.mma_async"),
        (edited("n8k16", "n16k16"), UnknownInstruction, "wgmma.mma_async"),
        (f"mov.b64 %rd2, 0x2000000080000; {PRODUCT}", UnknownInstruction, "descriptor 0x2"),
        (f"mov.b64 %rd2, 0x80001; {PRODUCT}", BadAccess, "8 rows, descriptor 0x80001"),
        (f"cvt.u64.u32 %rd2, %r1; {PRODUCT}", Diverged, "%rd2 differs"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 wgmma.fence.sync.aligned;", Diverged, "wgmma.fence"),
        ("setp.lt.s32 %p1, %r1, 64; @%p1 fence.proxy.async;", Diverged, "fence.proxy"),
        (f"{PRODUCT} add.u32 %r7, %r6, 1;", InUse, "add.u32"),
        (f"{PRODUCT} mov.b32 %r6, 1; {DONE}", InUse, "mov.b32"),
        (f"{PRODUCT} wgmma.wait_group.sync.aligned 0; mov.b32 %r7, %r2;", InUse, "mov.b32"),
        (f"{PRODUCT} {DONE.replace('aligned 0', 'aligned 1')} mov.b32 %r7, %r2;", InUse, "mov.b32"),
        (f"{PRODUCT} mov.b32 %r7, 0; st.shared.b32 [%r7], %r7;", InUse, "st.shared"),
        (f"mov.b32 %r7, 0; st.shared.b32 [%r7], %r7; {PRODUCT}", NotVisible, "mma_async.*proxy"),
        (f"{PRODUCT} {DONE} mov.b32 %r6, 1; {UNFENCED}", NotVisible, "no wgmma.fence"),
        (f"{PRODUCT} {DONE} add.f32 %r7, %r2, %r2; {UNFENCED}", NotVisible, "no wgmma.fence"),
        (UNFENCED, NotVisible, "mma_async.*no wgmma.fence"),
    ],
)
def test_products_refuse(body, error, message):
    assert run(f"{ONES} {PRODUCT} {DONE}", threads=128, shared=256).size == 128
    with pytest.raises(error, match=message):
        run(f"{ONES} {body}", threads=128, shared=256)


TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
CASES = (
    *TYPES,
    "fp16, 64 bytes",
    "fp16, 32 bytes",
    "bf16, both from shared memory",
)


@pytest.fixture(scope="module")
def gluon(tmp_path_factory):
    """Kernels that two warp groups execute, as Triton compiles them for compute capability 9.0."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("compile_wgmma.py")
    done = subprocess.run(
        [sys.executable, script, *CASES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def largest_share(case: str, ptx: str, kernel: dict) -> float:
    """The largest error of the product as a share of what is allowed."""
    rows, columns, k = kernel["shape"]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, k, generator=generator) for n in (rows, columns))
    dtype = TYPES[case.split(",")[0]]
    left, right, result = left.to(dtype), right.to(dtype), torch.full((rows, columns), torch.nan)
    tensors = (left, right, result)
    memory = {t.data_ptr(): t.view(torch.uint8).numpy().reshape(-1) for t in tensors}
    Machine(ptx, [*memory, 0, 0], memory, (1, 1, 1), kernel["shared"]).run()
    if case == "tf32":  # the bits that tensor cores look at
        left, right = ((t.view(torch.int32) & -(1 << 13)).view(dtype) for t in (left, right))
    left, right = left.double(), right.double()
    # Products are exact; a sum is rounded to float32 once for each 32 bytes of K, by at most
    # 2^-24 of what it is then, which is no more than the sum of all magnitudes.
    roundings = k * dtype.itemsize / 32
    allowed = roundings * 2**-24 * (left.abs() @ right.abs().T)
    return float(((result - left @ right.T).abs() / allowed).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("case", CASES)
def test_warp_groups_multiply(case, gluon):
    assert largest_share(case, gluon[case]["ptx"], gluon[case]) <= 1


def without(ptx: str, line: str, which: int) -> str:
    """One occurrence of an instruction less."""
    before = [m.start() for m in re.finditer(rf"{re.escape(line)}[^;]*;", ptx)][which]
    return ptx[:before] + ptx[ptx.index(";", before) + 1 :]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("line", "which", "error", "message"),
    [
        ("fence.proxy.async", 0, NotVisible, "wgmma.mma_async.*fence.proxy.async"),
        ("fence.proxy.async", 1, NotVisible, "wgmma.mma_async.*fence.proxy.async"),
        ("wgmma.fence", 0, NotVisible, "wgmma.mma_async.*wgmma.fence"),
        ("wgmma.commit_group", 0, InUse, "st.shared"),
        ("wgmma.wait_group", 0, InUse, "st.shared"),
        ("wgmma.wait_group", -1, InUse, "%r"),
    ],
)
def test_a_missing_line_is_noticed(line, which, error, message, case, gluon):
    with pytest.raises(error, match=message):
        largest_share(case, without(gluon[case]["ptx"], line, which), gluon[case])


@pytest.mark.parametrize("case", CASES)
def test_pieces_of_k_in_another_order_are_noticed(case, gluon):
    ptx = gluon[case]["ptx"]
    first, second = list(re.finditer(r"wgmma\.mma_async[^;]*?(%rd\d+), %p\d+,", ptx))[-2:]
    a, b = first[1], second[1]
    assert a != b
    ptx = ptx[: first.start(1)] + b + ptx[first.end(1) : second.start(1)] + a + ptx[second.end(1) :]
    assert largest_share(case, ptx, gluon[case]) > 1000
