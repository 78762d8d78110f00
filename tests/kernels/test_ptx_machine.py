"""The machine that executes compiled kernels: what it refuses, and threads on different paths."""

import numpy as np
import pytest
from ptx_machine import BadAccess, Diverged, Machine, Stuck, UnknownInstruction

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


def run(body: str, grid=(1, 1, 1), words: int = 64) -> np.ndarray:
    """What the kernel leaves in memory, which was 0; %rd3 points at each thread's own word."""
    memory = np.zeros(4 * words, np.uint8)
    address = 1 << 40
    Machine(KERNEL.replace("BODY", body), [address], {address: memory}, grid, 0).run(turns=10_000)
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


def test_programs_take_turns():
    """Every program waits until all four have counted themselves."""
    body = """
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
