"""Triton kernels that measure one resource of a GPU each. CUDA only; see bench/limits.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bench.device import Device


@triton.jit
def read_kernel(
    x_ptr,  # [blocks * BLOCK]
    out_ptr,  # [programs * BLOCK]
    blocks,
    repeats,
    BLOCK: tl.constexpr,
):
    """Reads `repeats` blocks past L1, each program beginning elsewhere."""
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    block = program * 37 % blocks
    for _ in range(repeats):
        total += tl.load(x_ptr + block * BLOCK + offs, cache_modifier=".cg")
        block += 1
        block = tl.where(block == blocks, 0, block)
    tl.store(out_ptr + program * BLOCK + offs, total)


@triton.jit
def dot_kernel(
    h_ptr,  # [ROWS, K]
    w_ptr,  # [K, N]
    out_ptr,  # [programs, ROWS, N]
    repeats,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
):
    """+-h @ W, over and over, with W in shared memory: as a time loop reads it."""
    rows = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, K)
    n = tl.arange(0, N)[None, :]
    w = tl.load(w_ptr + k[:, None] * N + n)
    h = tl.load(h_ptr + rows * K + k[None, :])
    out_offs = tl.program_id(0) * ROWS * N + rows * N + n
    total = tl.zeros((ROWS, N), tl.float32)
    for _ in range(repeats):
        total = tl.dot(h, w, total)
        h = -h  # so that no product is the same as the last, and none can be left out
    tl.store(out_ptr + out_offs, total)


@triton.jit
def empty_kernel(x_ptr):
    pass


def _best(device: Device, call, repeats: int = 7) -> float:
    call()
    return min(device.time_calls([call] * repeats))


def l2_rate(device: Device, size: int = 16 << 20, block: int = 8192, repeats: int = 256) -> float:
    """Bytes/s of reads that hit L2 and miss L1, all multiprocessors together."""
    programs = 2 * torch.cuda.get_device_properties(device.torch).multi_processor_count
    x = torch.randint(1 << 20, (size // 4,), dtype=torch.int32, device=device.torch)
    out = torch.empty(programs * block, dtype=torch.int32, device=device.torch)

    def seconds(count: int) -> float:
        return _best(
            device,
            lambda: read_kernel[(programs,)](
                x_ptr=x, out_ptr=out, blocks=size // 4 // block, repeats=count, BLOCK=block,
                num_warps=16,
            ),
        )  # fmt: skip

    # A long run less a short one: launch and the first touch do not count.
    return programs * repeats * block * 4 / (seconds(2 * repeats) - seconds(repeats))


def shared_rate(device: Device, K: int = 512, N: int = 128, repeats: int = 2000) -> float:
    """Bytes/s at which the products of one multiprocessor read shared memory, 16 rows at a time.

    Every warp reads its own columns of W and all of h (seen in the compiled kernel for sm_90:
    96 ldmatrix of 512 bytes for each of 4 warps, 192 KiB a product at these sizes).
    """
    warps = 4
    programs = torch.cuda.get_device_properties(device.torch).multi_processor_count
    options = {"dtype": torch.bfloat16, "device": device.torch}
    h, w = torch.randn(16, K, **options), torch.randn(K, N, **options) / K
    out = torch.empty(programs, 16, N, device=device.torch)

    def seconds(count: int) -> float:
        return _best(
            device,
            lambda: dot_kernel[(programs,)](
                h_ptr=h, w_ptr=w, out_ptr=out, repeats=count, ROWS=16, K=K, N=N,
                num_warps=warps, num_stages=1,
            ),
        )  # fmt: skip

    moved = w.nbytes + warps * h.nbytes
    return repeats * moved / (seconds(2 * repeats) - seconds(repeats))


def launch_seconds(device: Device, count: int = 200) -> float:
    """From one launch to the next, of a kernel that does nothing, replayed from a graph."""
    x = torch.empty(1, device=device.torch)

    def several():
        for _ in range(count):
            empty_kernel[(1,)](x_ptr=x, num_warps=1)
        return (x,)

    return _best(device, device.graph(several)) / count


def shared_bytes(device: Device) -> int:
    """Of one program."""
    properties = torch.cuda.get_device_properties(device.torch)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))


# Clocks of single operations. A probe is a loop in PTX between two readings of the clock: what it
# repeats is either one chain, each operation waiting for the last (a latency), or enough chains
# side by side to keep the unit busy (an issue interval). That a loop compiles to what it says is
# read off the machine code in tests/bench/test_limits_kernels.py.


@dataclass(frozen=True)
class Probe:
    """A loop to be timed.

    Attributes:
        step: what is repeated; v is a 32-bit and p a 64-bit register of the chain.
        each: operations in a repeat, which its clocks are divided by.
        registers, setup, finish: declarations; what comes before the first reading of the clock,
            with p the address of the memory; what comes after the last one, so that v depends on
            all chains. v is reported, for tests and for what can fail.
        warps, programs: of the launch; programs 0 stands for one on every multiprocessor.
        repeats: of the short run; the long one has twice as many.
        cycle: bytes of memory, in which every 128 bytes begin with the address of others, in
            random order; 0 for words that are zero.
        cold: whether caches are flushed before every run.
    """

    step: str
    each: int
    registers: str = ""
    setup: str = ""
    finish: str = ""
    warps: int = 1
    programs: int = 1
    repeats: int = 1000
    cycle: int = 0
    cold: bool = False

    @property
    def code(self) -> str:
        """PTX; $0 to $2 are clocks, nanoseconds and v, $3 to $5 memory, repeats and program."""
        return f"""{{
            .reg .b32 v, left; .reg .b64 p, clock, began, time, since; .reg .pred more;
            {self.registers}
            mov.b32 v, 0; mov.b64 p, $3; mov.b32 left, $4;
            {self.setup}
            mov.u64 since, %globaltimer; mov.u64 began, %clock64;
        again:
            {self.step}
            sub.s32 left, left, 1; setp.gt.s32 more, left, 0; @more bra again;
        done:
            mov.u64 clock, %clock64; mov.u64 time, %globaltimer;
            {self.finish}
            sub.s64 $0, clock, began; sub.s64 $1, time, since; mov.b32 $2, v;
        }}"""


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}}}, {{v,v,v,v}}, {{v,v}}, {{{0}}};"
CHAINS = 8
UNROLL = 32


def _tile(n: int) -> str:
    """The registers of an accumulator."""
    return ", ".join(f"c{n}_{i}" for i in range(4))


# One poll after the other of a word until it reaches `turn`, at most `patience` times.
WAIT = """
        {label}:
            ld.relaxed.gpu.global.b32 seen, [{word}]; sub.s32 patience, patience, 1;
            setp.lt.s32 late, seen, turn; setp.gt.and.s32 spin, patience, 0, late;
            @spin bra {label};
"""
WAIT_REGISTERS = ".reg .b32 seen, turn, patience; .reg .pred late, spin;"

PROBES = {
    "l2_load": Probe(
        "ld.global.cg.b64 p, [p];" * UNROLL, UNROLL, cycle=4 << 20,
        finish="cvt.u32.u64 v, p;",
    ),
    # Every line of the cycle is read once at most, by the long run too.
    "dram_load": Probe(
        "ld.global.cg.b64 p, [p];" * UNROLL, UNROLL, cycle=64 << 20, cold=True, repeats=200,
        finish="cvt.u32.u64 v, p;",
    ),
    "poll": Probe(
        f"mov.b32 patience, {UNROLL};" + WAIT.format(label="poll", word="p"), UNROLL,
        WAIT_REGISTERS, "mov.b32 turn, 1;", "mov.b32 v, seen;",
    ),
    # Programs in pairs hand a number back and forth: a repeat is two trips. All pairs play at
    # once, each on lines of its own, so that the phases of the polls differ.
    "hand_over": Probe(
        "add.s32 turn, turn, 1;" + WAIT.format(label="wait", word="other")
        + "@late bra done; add.s32 answer, answer, 1; st.relaxed.gpu.global.b32 [own], answer;",
        2,
        WAIT_REGISTERS + ".reg .b32 side, answer; .reg .b64 own, other; .reg .pred begins;",
        """
            mul.wide.s32 own, $5, 256; add.s64 own, own, p;
            xor.b32 side, $5, 1; mul.wide.s32 other, side, 256; add.s64 other, other, p;
            and.b32 side, $5, 1; setp.eq.s32 begins, side, 0;
            mov.b32 turn, 1; mov.b32 answer, 1; mov.b32 patience, 0x1000000;
            @begins st.relaxed.gpu.global.b32 [own], answer; @begins add.s32 answer, answer, 1;
        """ + WAIT.format(label="both", word="other")
        + "st.relaxed.gpu.global.b32 [own], answer;",
        "selp.b32 v, 1, 0, late;", programs=0,
    ),
    # A word of shared memory that holds its own address.
    "shared_load": Probe(
        "ld.volatile.shared.b32 v, [v];" * UNROLL, UNROLL, ".shared .align 16 .b32 word[4];",
        "mov.u32 v, word; st.volatile.shared.b32 [v], v;",
    ),
    # 32 rows of 16 bytes, no two in the same banks at once. Word i holds the address of row i, and
    # lane i gets word i.
    "ldmatrix": Probe(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {v, c0, c1, c2}, [v];" * UNROLL, UNROLL,
        ".shared .align 128 .b32 rows[128]; .reg .b32 lane, word, c0, c1, c2;",
        """
            mov.u32 lane, %laneid; mov.u32 v, rows;
            mad.lo.u32 word, lane, 4, v; mad.lo.u32 v, lane, 16, v;
            st.volatile.shared.b32 [word], v; bar.warp.sync 0xffffffff;
        """,
    ),
    # Lane i asks lane i, which no compiler knows.
    "shuffle": Probe(
        "shfl.sync.idx.b32 v, v, v, 31, 0xffffffff;" * UNROLL, UNROLL, setup="mov.u32 v, %laneid;"
    ),
    "special": Probe("ex2.approx.ftz.f32 v, v;" * UNROLL, UNROLL),
    "mma": Probe(
        MMA.format(_tile(0)) * UNROLL, UNROLL, f".reg .b32 {_tile(0)};",
        "mov.u32 v, %laneid;" + "".join(f"mov.b32 c0_{i}, 0;" for i in range(4)),
        "mov.b32 v, c0_0;",
    ),
    "barrier": Probe("bar.sync 0;" * UNROLL, UNROLL, warps=8),
    # A warp for every scheduler.
    "special_clocks": Probe(
        "".join(f"ex2.approx.ftz.f32 s{n}, s{n};" for n in range(CHAINS)) * 4, 4 * CHAINS,
        f".reg .b32 s<{CHAINS}>;",
        "".join(f"mov.b32 s{n}, $4;" for n in range(CHAINS)),
        "".join(f"xor.b32 v, v, s{n};" for n in range(CHAINS)), warps=4,
    ),
    "mma_clocks": Probe(
        "".join(MMA.format(_tile(n)) for n in range(CHAINS)) * 4, 4 * CHAINS,
        "".join(f".reg .b32 {_tile(n)};" for n in range(CHAINS)),
        "mov.u32 v, %laneid;"
        + "".join(f"mov.b32 c{n}_{i}, 0;" for n in range(CHAINS) for i in range(4)),
        "".join(f"xor.b32 v, v, c{n}_0;" for n in range(CHAINS)), warps=4,
    ),
}  # fmt: skip


@triton.jit
def clocks_kernel(
    memory_ptr,
    out_ptr,  # [programs, 3, THREADS]: clocks, nanoseconds, what the chain came to
    repeats,
    CODE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Every thread runs CODE once."""
    program = tl.program_id(0)
    zeros = tl.zeros((THREADS,), tl.int32)
    clocks, nanoseconds, value = tl.inline_asm_elementwise(
        CODE,
        "=l,=l,=r,l,r,r",
        [zeros + memory_ptr.to(tl.int64), zeros + repeats, zeros + program],
        dtype=(tl.int64, tl.int64, tl.int32),
        is_pure=False,
        pack=1,
    )
    out_ptr += program * 3 * THREADS + tl.arange(0, THREADS)
    tl.store(out_ptr, clocks)
    tl.store(out_ptr + THREADS, nanoseconds)
    tl.store(out_ptr + 2 * THREADS, value.to(tl.int64))


def cycle(size: int, address: int, seed: int = 0) -> torch.Tensor:
    """Words for `size` bytes of memory at `address`: one 64-bit word in every 128 bytes, the
    address of another such line; following them from the first visits all lines, in random order.
    """
    lines = size // 128
    order = torch.randperm(lines, generator=torch.Generator().manual_seed(seed))
    words = torch.zeros(lines, 16, dtype=torch.int64)
    words[order, 0] = address + 128 * order.roll(-1)
    return words.flatten()


def run_probe(device: Device, probe: Probe, repeats: int) -> tuple[float, float]:
    """Clocks and nanoseconds of a run, the mean over its programs.

    Raises:
        RuntimeError: programs did not find each other.
    """
    sms = torch.cuda.get_device_properties(device.torch).multi_processor_count
    programs = probe.programs or sms // 2 * 2
    memory = torch.zeros(max(probe.cycle, 256 * programs) // 8, dtype=torch.int64)
    memory = memory.to(device.torch)
    if probe.cycle:
        memory.copy_(cycle(probe.cycle, memory.data_ptr()))
    threads = 32 * probe.warps
    out = torch.zeros(programs, 3, threads, dtype=torch.int64, device=device.torch)
    if probe.cold:
        device.flush()
    clocks_kernel[(programs,)](
        memory_ptr=memory, out_ptr=out, repeats=repeats, CODE=probe.code, THREADS=threads,
        num_warps=probe.warps, launch_cooperative_grid=programs > 1,
    )  # fmt: skip
    clocks, nanoseconds, value = out.cpu().unbind(1)
    if probe is PROBES["hand_over"] and value.any():
        raise RuntimeError("a program waited in vain for its partner")
    return clocks.double().mean().item(), nanoseconds.double().mean().item()
