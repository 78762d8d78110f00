"""The waits of one launch: right results under every interleaving, time-outs that end it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import roundtrip
import torch
import triton
import triton.language as tl
from exchange import expected
from mutants import TIME_OUTS
from mutation import mutated
from races import Detector, Race
from scheduler import cooperative

from fusedrnn.kernels import sync
from fusedrnn.kernels.fragments import offset_in_slot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # T, B, H; three programs a group, masked rows and units, two chunks; interleavings
    "one group": ((7, 3, 20), 8),
    "two groups": ((5, 18, 20), 4),
}
BLOCKS = {"split": 1, "ahead": 2}


@pytest.fixture
def lap(monkeypatch):
    """Lets the ring come round within few steps."""
    return lambda steps: monkeypatch.setattr(sync, "LAP", tl.constexpr(steps))


@pytest.fixture
def inputs():
    def make(shape, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        T, B, H = shape
        values = torch.randint(-16, 16, (T + 1, B, H), generator=generator) / 8
        values[0, :, ::5] = -0.0  # the sentinel
        return values[1:].to(dtype), values[0].to(dtype)

    return make


@pytest.mark.parametrize(("shape", "seeds"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("steps", [2, 3])
def test_interleavings_agree(steps, shape, seeds, inputs, lap):
    lap(steps)
    x, h0 = inputs(shape)
    for seed in range(seeds):
        with cooperative(seed, detector=Detector()):
            output = roundtrip.exchange(x, h0, **BLOCKS)
        torch.testing.assert_close(output, expected(x, h0), msg=lambda m, s=seed: f"{s}: {m}")


@pytest.mark.parametrize(("split", "ahead"), [(1, 1), (2, 1), (4, 1)])
def test_chunks_and_warps(split, ahead, inputs, lap):
    lap(2)
    x, h0 = inputs((5, 3, 20))
    with cooperative(split, detector=Detector()):
        output = roundtrip.exchange(x, h0, split=split, ahead=ahead)
    torch.testing.assert_close(output, expected(x, h0))


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_exchanged_bit_for_bit(dtype, pairwise, inputs, lap):
    """Sums of 16 values of few bits are exact in float32, in any order."""
    lap(2)
    x, h0 = inputs((2 if dtype == torch.float32 else 6, 2, 16), dtype)
    with cooperative(1, detector=Detector()):
        output = roundtrip.exchange(x, h0, pairwise=pairwise, **BLOCKS)
    torch.testing.assert_close(output, expected(x, h0), rtol=0, atol=0)


def test_laps_of_full_length(inputs):
    """Past the end of the ring, where the first slots are used again."""
    x, h0 = inputs((2 * sync.LAP.value + 12, 1, 9))
    with cooperative(1, detector=Detector()):
        output = roundtrip.exchange(x, h0, **BLOCKS)
    torch.testing.assert_close(output, expected(x, h0))


@triton.jit
def relay_kernel(
    x_ptr,  # [2, N]
    output_ptr,  # [2, N]
    exchange,
    PAIRWISE: tl.constexpr,
    LENGTH: tl.constexpr,
    N: tl.constexpr,
):
    """Two programs tell each other their half of x, in one step."""
    own = tl.program_id(0) * N + tl.arange(0, N)
    other = (1 - tl.program_id(0)) * N + tl.arange(0, N // LENGTH)[:, None] * LENGTH
    at = other + tl.arange(0, LENGTH)[None, :]
    ring, signal, error, _, _, spin_limit = exchange
    anchor = sync.layout_of_loads(ring, at)
    channel = sync.Channel(ring, signal, error, spin_limit, (own,), at, anchor)
    sync.publish(channel, (tl.load(x_ptr + own),), 1, 1, SLOT=2 * N, BLOCK_K=0)
    slot_ptr = ring + sync.slot(1) * 2 * N
    WARPS: tl.constexpr = N // LENGTH // 32
    tiles = sync.load(channel, slot_ptr, 1, 0, COUNT=1, STRIDE=0, WARPS=WARPS, PAIRWISE=PAIRWISE)
    tl.store(output_ptr + at, tiles[0])
    sync.report(channel)


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_arrives(dtype, pairwise):
    """Of 16 bits, every one; of 32, random ones and those at the edges. Only -0.0 becomes 0.0."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
        bits[:8] = torch.tensor([-1, 0, 1, -2, 2**31 - 1, -(2**31), 0x7F800000, 0xFFFF])
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype)
    output = torch.zeros_like(x)
    with cooperative(0, detector=Detector()):
        [space] = sync.workspaces(
            1,
            groups=1,
            programs=2,
            steps=1,
            chunks=1,
            planes=(1,),
            block_b=16,
            block_h=len(x) // 32,
            block_k=len(x) // 16,
            dtype=dtype,
            device="cpu",
        )
        relay_kernel[(2,)](
            x_ptr=x,
            output_ptr=output,
            exchange=space._replace(spin_limit=100),
            PAIRWISE=pairwise,
            LENGTH=16 // dtype.itemsize,
            N=len(x) // 2,
        )
    sync.raise_if_timed_out(space.error)
    minus_zero = torch.iinfo(bits.dtype).min
    assert (bits == minus_zero).sum() == 1
    bits = torch.where(bits == minus_zero, 0, bits)
    assert torch.equal(output.view(bits.dtype), bits)


ABSENT = (  # program 1 leaves after two steps, where waits are short
    "for t in range(T):",
    "for t in range(tl.where((tl.program_id(0) == 1) & (exchange.spin_limit < 99), 2, T)):",
)


def refusal(run) -> str:
    try:
        run()
    except RuntimeError as error:  # or a subclass: Triton has one of its own
        return f"{type(error).__name__}: {error}"
    return ""


def absent(x, h0, seed, folder, monkeypatch, limit=60) -> None:
    """Checks what a launch leaves behind in which program 1 of 3 leaves after two steps."""
    module = mutated(Path(roundtrip.__file__), folder, ABSENT)
    outputs, counter = [], Counting()
    monkeypatch.setattr(module, "torch", FullLike(outputs))
    with cooperative(seed, on_deadlock="spin", detector=counter):
        told = refusal(lambda: module.exchange(x, h0, spin_limit=limit, **BLOCKS))
    (output,) = outputs
    assert re.match("RuntimeError: .* timed out at step 4: its results are NaN", told)
    # The steps before it are right, and those of the others in which it was missed first.
    right = expected(x, h0)
    torch.testing.assert_close(output[:2], right[:2])
    others = [n for n in range(x.shape[2]) if n // 8 != 1]
    torch.testing.assert_close(output[2][:, others], right[2][:, others])
    assert output[3:, :, others].isnan().all()
    # Two programs wait once for so long, and in other steps look once at everything: at four
    # vectors, at whether somebody gave up, and at the missing ones again.
    assert limit < counter.polls < 2 * (limit + len(x)) * 10
    # The next call finds nothing of it.
    with cooperative(seed, detector=Detector()):
        output = module.exchange(x, h0, spin_limit=5000, **BLOCKS)
    torch.testing.assert_close(output, right)


@pytest.mark.parametrize("seed", range(4))
def test_timeout_ends_the_launch(seed, inputs, lap, tmp_path, monkeypatch):
    lap(2)
    x, h0 = inputs((20, 3, 20))
    absent(x, h0, seed, tmp_path, monkeypatch)


@pytest.mark.parametrize("mutant", TIME_OUTS, ids=str)
def test_mistakes_in_time_outs(mutant, inputs, tmp_path, monkeypatch):
    module = mutated(Path(sync.__file__), tmp_path, *mutant.sync)
    module.LAP = tl.constexpr(mutant.lap)
    for name in ("load", "report"):
        monkeypatch.setattr(sync, name, getattr(module, name))
    x, h0 = inputs((20, 3, 20))

    def some_interleavings():
        for seed in range(4):
            absent(x, h0, seed, tmp_path, monkeypatch)

    with pytest.raises((AssertionError, Race)):
        some_interleavings()


class FullLike:
    """torch, which keeps what `full_like` returns: the outputs of a launch that raises."""

    def __init__(self, kept):
        self.kept = kept

    def __getattr__(self, name):
        return getattr(torch, name)

    def full_like(self, *args):
        self.kept.append(torch.full_like(*args))
        return self.kept[-1]


class Counting(Detector):
    """Counts polls."""

    def __init__(self):
        super().__init__()
        self.polls = 0

    def load(self, access):
        self.polls += access.volatile
        super().load(access)

    def atomic(self, access, sem, scope):
        self.polls += 1
        super().atomic(access, sem, scope)


SIZES = {
    "groups": 3,
    "programs": 5,
    "steps": 7,
    "chunks": 2,
    "planes": (3,),
    "block_b": 16,
    "block_h": 8,
    "block_k": 32,
    "dtype": torch.float32,
    "device": "cpu",
}


def test_workspace():
    [space] = sync.workspaces(1, **SIZES)
    assert space.ring.shape == (3, 8, 16 * 3 * 2 * 32)
    assert space.ring.dtype == torch.float32
    assert space.ring_stride == space.ring[0].numel()
    assert space.signal_stride == space.signal[0].numel()
    assert space.signal_stride * 4 % 256 == 0  # the counter and the word beside it, in lines of 128
    assert not space.signal.any()
    assert not space.error.any()
    [many] = sync.workspaces(1, **{**SIZES, "steps": 1000})
    assert many.ring.shape[1] == 2 * sync.LAP.value


def test_launches_that_follow_each_other_share_only_what_is_filled_at_once(monkeypatch):
    [alone] = sync.workspaces(1, **SIZES)
    monkeypatch.setattr(sync, "_FILLED_BYTES", 2 * alone.ring.numel() * alone.ring.element_size())
    spaces = list(sync.workspaces(3, **SIZES))
    storages = [space.ring.untyped_storage().data_ptr() for space in spaces]
    assert storages[0] == storages[1] != storages[2]
    for space in spaces:
        assert space.ring_stride == space.ring.stride(0)
        assert torch.equal(space.ring.signbit(), alone.ring.signbit())
        assert not space.ring.any()
        assert not space.signal.any()
        space.ring.fill_(1.0)
        space.signal.fill_(1)


@triton.jit
def own_kernel(
    slot_ptr,
    PLANES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes 1 where a program publishes."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    rows = tl.arange(0, 16)[:, None]
    offs = offset_in_slot(rows, units, BLOCK_K=BLOCK_K, PLANES=PLANES, WIDE=WIDE)
    for plane in range(PLANES):
        tl.store(slot_ptr + offs + plane * 16 * BLOCK_K, tl.full(offs.shape, 1, tl.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("programs", "block_h", "chunks", "block_k"),
    [
        (3, 8, 2, 16),  # half a block of the last chunk has no owner
        (4, 8, 2, 16),  # every unit has one
        (5, 8, 1, 64),  # half a block, and one more
        (1, 8, 1, 128),
        (6, 8, 1, 64),  # one block
        (5, 16, 2, 64),
        (3, 32, 1, 128),
    ],
)
def test_units_without_an_owner_are_zero(programs, block_h, chunks, block_k, dtype):
    sizes = {"programs": programs, "block_h": block_h, "chunks": chunks, "block_k": block_k}
    [space] = sync.workspaces(1, **{**SIZES, **sizes, "dtype": dtype})
    ring = space.ring
    owned = torch.zeros(ring.shape[2], dtype=torch.int32)
    own_kernel[(programs,)](
        owned, PLANES=3, BLOCK_H=block_h, BLOCK_K=block_k, WIDE=dtype == torch.float32
    )
    assert owned.sum() == 3 * 16 * programs * block_h
    assert not ring.any()
    assert torch.equal(ring.signbit(), (owned == 1).expand_as(ring))


def test_workspace_takes_the_error_word():
    error = torch.zeros(1, dtype=torch.int32)
    [space] = sync.workspaces(1, **SIZES, error=error)
    assert space.error is error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, r"dtype must be float16, .* got torch.float64"),
        ({"steps": 10**9}, r"below 2\*\*31, got 1000000000 \* 5"),
    ],
)
def test_workspace_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        next(sync.workspaces(1, **{**SIZES, **changes}))


def test_raise_if_timed_out():
    sync.raise_if_timed_out(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="timed out at step 7"):
        sync.raise_if_timed_out(torch.tensor([7], dtype=torch.int32))
