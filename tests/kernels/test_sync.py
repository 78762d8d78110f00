"""The waits of one launch: right results under every interleaving, timeouts that end it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from exchange import BENCH, expected, roundtrip
from mutation import mutated
from races import Detector
from scheduler import Deadlock, cooperative

from fusedrnn.kernels import sync

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # T, B, H; three programs a group, masked rows, units and chunks; interleavings
    "one group": ((5, 3, 6), 16),
    "two groups": ((4, 6, 5), 6),
}
BLOCKS = {"block_b": 4, "block_h": 2, "chunk": 4}


@pytest.fixture
def inputs():
    def make(shape, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        T, B, H = shape
        values = torch.randint(-16, 16, (T + 1, B, H), generator=generator) / 8
        return values[1:].to(dtype), values[0].to(dtype)

    return make


@pytest.mark.parametrize(("shape", "seeds"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_interleavings_agree(protocol, shape, seeds, inputs):
    x, h0 = inputs(shape)
    for seed in range(seeds):
        with cooperative(seed, detector=Detector()):
            output = roundtrip.exchange(protocol, x, h0, **BLOCKS)
        torch.testing.assert_close(output, expected(x, h0), msg=lambda m, s=seed: f"{s}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_dtypes_are_exchanged_bit_for_bit(protocol, dtype, inputs):
    x, h0 = inputs((4, 2, 4), dtype)
    with cooperative(1, detector=Detector()):
        output = roundtrip.exchange(protocol, x, h0, **BLOCKS)
    torch.testing.assert_close(output, expected(x, h0), rtol=0, atol=0)


@triton.jit
def relay_kernel(
    x_ptr,  # [2, N]
    output_ptr,  # [2, N]
    ring_ptr,
    signal_ptr,
    error_ptr,
    spin_limit,
    DTYPE: tl.constexpr,
    PROTOCOL: tl.constexpr,
    FLAGS_BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    """Two programs tell each other their half of x, in one step."""
    program = tl.program_id(0)
    own = program * N + tl.arange(0, N)
    other = (1 - program) * N + tl.arange(0, N)
    mask = own < 2 * N
    slot_ptr = ring_ptr + sync.slot(1, PROTOCOL) * 2 * N
    sync.store(slot_ptr, own, tl.load(x_ptr + own), mask, 1, PROTOCOL)
    sync.arrive(signal_ptr, program, 1, 1, PROTOCOL)
    alive = sync.wait(signal_ptr, 1, 2, error_ptr, spin_limit, 1, PROTOCOL, FLAGS_BLOCK)
    tiles, alive = sync.load(
        slot_ptr, (other,), (mask,), 1, error_ptr, spin_limit, alive, DTYPE, PROTOCOL
    )
    tl.store(output_ptr + other, tiles[0])


def relay(protocol, bits, dtype, tl_dtype):
    x = bits.view(dtype)
    output = torch.zeros_like(x)
    with cooperative(0, detector=Detector()):
        space = sync.workspace(
            protocol,
            groups=1,
            programs=2,
            steps=1,
            slot_size=x.numel(),
            dtype=dtype,
            device="cpu",
            num_warps=1,
        )
        relay_kernel[(2,)](
            x_ptr=x,
            output_ptr=output,
            ring_ptr=space.ring,
            signal_ptr=space.signal,
            error_ptr=space.error,
            spin_limit=100,
            DTYPE=tl_dtype,
            PROTOCOL=protocol,
            FLAGS_BLOCK=space.flags_block,
            N=x.numel() // 2,
        )
    sync.raise_if_timed_out(space.error)
    return output.view(bits.dtype)


@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
@pytest.mark.parametrize(
    ("dtype", "tl_dtype"),
    [
        (torch.float32, tl.float32),
        (torch.bfloat16, tl.bfloat16),
        (torch.float16, tl.float16),
    ],
    ids=str,
)
def test_every_bit_pattern_arrives(protocol, dtype, tl_dtype):
    """Of 16 bits, every one; of 32, random ones and those at the edges. Only the sentinel's own
    pattern, one of the NaNs, becomes another NaN."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
        bits[:8] = torch.tensor([-1, 0, 1, -2, 2**31 - 1, -(2**31), 0x7F800000, 0xFFFF])
        remapped = 0x7FFFFFFF
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        remapped = 0x7FFF
    expect = bits.clone()
    if protocol == "sentinel":
        expect[bits == -1] = remapped
        assert torch.tensor(remapped, dtype=bits.dtype).view(dtype).isnan()
    assert torch.equal(relay(protocol, bits, dtype, tl_dtype), expect)


def test_a_sentinel_that_is_not_remapped_is_waited_for_in_vain(monkeypatch, tmp_path):
    mutant = mutated(
        Path(sync.__file__),
        tmp_path,
        ("tl.where(bits == -1, 0x7FFF, bits)", "bits"),
    )
    monkeypatch.setattr(sync, "store", mutant.store)
    bits = torch.arange(-4, 4).to(torch.int16)
    with pytest.raises(Deadlock):
        relay("sentinel", bits, torch.bfloat16, tl.bfloat16)


@pytest.mark.parametrize("protocol", ["ll", "flags"])
def test_steps_beyond_16_bits(protocol, inputs, tmp_path):
    """The tag of a 16-bit LL word wraps round; a flag goes on."""
    x, h0 = inputs((6, 2, 4), torch.bfloat16)
    kernel = mutated(
        BENCH / "roundtrip.py",
        tmp_path,
        ("sync.slot(1,", "sync.slot(0xFFFD,"),
        ("own_mask, 1, PROTOCOL", "own_mask, 0xFFFD, PROTOCOL"),
        ("program, 1, alive", "program, 0xFFFD, alive"),
        ("t + 1", "t + 0xFFFD"),
        ("t + 2", "t + 0xFFFE"),
    )
    with cooperative(3, detector=Detector()):
        output = kernel.exchange(protocol, x, h0, **BLOCKS)
    torch.testing.assert_close(output, expected(x, h0), rtol=0, atol=0)


ABSENT = (  # program 1 leaves after two steps, where waits are short
    "for t in range(T):",
    "for t in range(tl.where((program == 1) & (spin_limit < 99), 2, T)):",
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_timeout_ends_the_launch(protocol, seed, inputs, tmp_path):
    x, h0 = inputs((6, 3, 6))
    kernel = mutated(BENCH / "roundtrip.py", tmp_path, ABSENT)
    outputs = []
    kernel.torch = FullLike(outputs)
    with (
        cooperative(seed, on_deadlock="spin", detector=Detector()),
        pytest.raises(RuntimeError, match=r"timed out at step 4: its results are NaN") as caught,
    ):
        kernel.exchange(protocol, x, h0, spin_limit=30, **BLOCKS)
    assert type(caught.value) is RuntimeError
    (output,) = outputs
    torch.testing.assert_close(output[:2], expected(x, h0)[:2])
    others = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(output[2][:, others], expected(x, h0)[2][:, others])
    assert output[3:].isnan().all()

    # The next call finds nothing of it.
    with cooperative(seed, detector=Detector()):
        output = kernel.exchange(protocol, x, h0, spin_limit=5000, **BLOCKS)
    torch.testing.assert_close(output, expected(x, h0))


class FullLike:
    """torch, which keeps what `full_like` returns: the outputs of a launch that raises."""

    def __init__(self, kept):
        self.kept = kept

    def __getattr__(self, name):
        return getattr(torch, name)

    def full_like(self, *args):
        self.kept.append(torch.full_like(*args))
        return self.kept[-1]


@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_after_a_timeout_nobody_spins(protocol, inputs, tmp_path):
    """A dead program polls once a step: the launch costs one limit, not one for every step."""
    polls = []
    for steps in (10, 30):
        x, h0 = inputs((steps, 2, 6))
        kernel = mutated(BENCH / "roundtrip.py", tmp_path, ABSENT)
        counter = Counting()
        with (
            cooperative(0, on_deadlock="spin", detector=counter),
            pytest.raises(RuntimeError, match="timed out"),
        ):
            kernel.exchange(protocol, x, h0, spin_limit=90, **BLOCKS)
        polls.append(counter.polls)
    # Two programs, two chunks or one counter, some accesses a step; one more limit would be 180.
    assert polls[0] > 150
    assert polls[1] - polls[0] < 20 * 2 * 6


class Counting(Detector):
    """Counts polls."""

    def __init__(self):
        super().__init__()
        self.polls = 0

    def load(self, access):
        self.polls += access.bypass
        super().load(access)

    def atomic(self, access, sem, scope):
        self.polls += 1
        super().atomic(access, sem, scope)


def test_ring_dtypes():
    assert sync.ring_dtype(torch.bfloat16, "counter") == torch.bfloat16
    assert sync.ring_dtype(torch.float16, "ll") == torch.int32
    assert sync.ring_dtype(torch.float32, "ll") == torch.int64
    assert sync.ring_dtype(torch.float16, "sentinel") == torch.int16
    assert sync.ring_dtype(torch.float32, "flags") == torch.float32


@pytest.mark.parametrize(
    ("protocol", "dtype", "message"),
    [
        ("mutex", torch.float32, r"protocol must be one of \('counter'.*got 'mutex'"),
        ("ll", torch.float64, r"dtype must be one of .*float16.* got torch.float64"),
    ],
)
def test_ring_dtype_refuses(protocol, dtype, message):
    with pytest.raises(ValueError, match=message):
        sync.ring_dtype(dtype, protocol)


SIZES = {
    "groups": 3,
    "programs": 5,
    "steps": 7,
    "slot_size": 12,
    "dtype": torch.float32,
    "device": "cpu",
    "num_warps": 4,
}


@pytest.mark.parametrize("protocol", sync.PROTOCOLS)
def test_workspace(protocol):
    space = sync.workspace(protocol, **SIZES)
    assert space.ring.shape == (3, 8 if protocol == "sentinel" else 2, 12)
    assert space.ring.dtype == sync.ring_dtype(torch.float32, protocol)
    assert space.ring_stride == space.ring[0].numel()
    assert space.signal_stride == (128 if protocol == "flags" else 32)
    assert space.flags_block == 128
    assert not space.signal.any()
    assert not space.error.any()
    if protocol == "ll":
        assert not space.ring.any()
    if protocol == "sentinel":
        assert (space.ring == -1).all()


def test_workspace_takes_the_error_word():
    error = torch.zeros(1, dtype=torch.int32)
    assert sync.workspace("counter", **SIZES, error=error).error is error


def test_workspace_refuses_what_a_counter_cannot_count():
    with pytest.raises(ValueError, match=r"below 2\*\*31, got 1000000000 \* 5"):
        sync.workspace("counter", **{**SIZES, "steps": 10**9})


def test_raise_if_timed_out():
    sync.raise_if_timed_out(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="timed out at step 7"):
        sync.raise_if_timed_out(torch.tensor([7], dtype=torch.int32))


def test_roundtrip_needs_a_gpu():
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        roundtrip.roundtrip("counter", 4, "cpu", 10)
