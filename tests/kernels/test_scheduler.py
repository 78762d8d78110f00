"""The scheduler and the detector themselves, on kernels small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from exchange import roundtrip
from races import Detector, Race
from scheduler import BUILDER, Deadlock, cooperative


@triton.jit
def ticket_kernel(counter_ptr, order_ptr, TURNS: tl.constexpr):
    """Writes down who came when."""
    for _ in range(TURNS):
        ticket = tl.atomic_add(counter_ptr, 1)
        tl.store(order_ptr + ticket, tl.program_id(0) * 10 + tl.program_id(1))


ONE_AFTER_THE_OTHER = [10 * x + y for x in range(2) for y in range(3) for _ in range(4)]


def tickets(seed):
    counter, order = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1)
    with cooperative(seed):
        ticket_kernel[(2, 3)](counter, order, TURNS=4)
    assert counter.item() == 24
    # Every program took its turns under its own index, whoever ran in between.
    assert sorted(order.tolist()) == [
        x * 10 + y for x in range(2) for y in range(3) for _ in "1234"
    ]
    return tuple(order.tolist())


def test_a_seed_is_an_interleaving():
    orders = [tickets(seed) for seed in range(8)]
    assert orders == [tickets(seed) for seed in range(8)]
    assert len(set(orders)) > 6
    assert tickets(None) == tuple(ONE_AFTER_THE_OTHER)


@triton.jit
def failing_kernel(counter_ptr, x_ptr):
    tl.atomic_add(counter_ptr, 1)
    if tl.program_id(0) == 1:
        tl.static_assert(tl.load(x_ptr) == 1, "program 1 found no 1")
    tl.atomic_add(counter_ptr, 1)


def test_what_a_program_raises_ends_the_launch():
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match="program 1 found no 1"), cooperative(0):
        failing_kernel[(3,)](counter, torch.zeros(1))
    assert counter.item() < 6


@triton.jit
def waiting_kernel(flag_ptr, spins_ptr, LIMIT: tl.constexpr):
    spins = 0
    while (tl.atomic_add(flag_ptr, 0) == 0) & (spins < LIMIT):
        spins += 1
    tl.store(spins_ptr + tl.program_id(0), spins)


def test_a_deadlock_is_seen_or_spun_out():
    flag, spins = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(Deadlock, match=r"\(0, 0, 0\).*\(1, 0, 0\).* wait"), cooperative(0):
        waiting_kernel[(2,)](flag, spins, LIMIT=100)
    assert not spins.any()
    with cooperative(0, on_deadlock="spin"):
        waiting_kernel[(2,)](flag, spins, LIMIT=100)
    assert spins.tolist() == [100, 100]


def test_nothing_stays_behind():
    before = interpreter.GridExecutor.__call__, dict(vars(BUILDER)), roundtrip.sync.workspace
    with cooperative(0):
        pass
    with pytest.raises(KeyError), cooperative(0):
        raise KeyError
    after = interpreter.GridExecutor.__call__, dict(vars(BUILDER)), roundtrip.sync.workspace
    assert {k: v for k, v in before[1].items() if "create" in k} == {}
    assert {k: v for k, v in after[1].items() if "create" in k} == {}
    assert before[0] is after[0]
    assert before[2] == after[2]


def test_on_deadlock_is_checked():
    with (
        pytest.raises(ValueError, match="on_deadlock must be 'raise' or 'spin', got 'wait'"),
        cooperative(0, on_deadlock="wait"),
    ):
        pass


# The detector. Each kernel has a mode that is right, and some that are not.


@triton.jit
def message_kernel(data_ptr, flag_ptr, out_ptr, MODE: tl.constexpr):
    """Program 0 writes a tile and raises a flag; program 1 waits and reads."""
    offs = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + offs, offs)
        tl.debug_barrier()
        tl.atomic_xchg(flag_ptr, 1, sem="release")
    else:
        if MODE == "relaxed":
            while tl.load(flag_ptr, volatile=True) == 0:
                pass
        elif MODE == "no wait":
            tl.atomic_add(flag_ptr, 0, sem="acquire")
        else:
            while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
                pass
        if MODE != "no barrier":
            tl.debug_barrier()
        if MODE == "plain":
            tl.store(out_ptr + offs, tl.load(data_ptr + offs))
        elif MODE == "overwrite":
            tl.store(data_ptr + 7 - offs, offs)
        else:
            tl.store(out_ptr + offs, tl.load(data_ptr + offs, cache_modifier=".cg"))


def message(seed, mode):
    data, out = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with cooperative(seed, detector=Detector()):
        message_kernel[(2,)](data, torch.zeros(1, dtype=torch.int32), out, MODE=mode)
    return data.tolist(), out.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_message_is_no_race(seed):
    assert message(seed, "right")[1] == list(range(8))
    assert message(seed, "overwrite")[0] == list(range(7, -1, -1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("relaxed", "reads what another may be writing"),
        ("no barrier", "reads what another may be writing"),
        ("plain", "reads through L1 what another wrote"),
    ],
)
def test_a_broken_message_is_a_race(mode, what, seed):
    with pytest.raises(Race, match=f"program 1 {what}"):
        message(seed, mode)


def test_order_by_luck_is_a_race():
    """Program 0 runs first, and program 1 never looks whether it has."""
    data, out = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32)
    with cooperative(None, detector=Detector()):  # one after the other: an acquire that meets a 1
        message_kernel[(2,)](data, flag, out, MODE="no wait")
    assert out.tolist() == list(range(8))
    found = 0
    for seed in range(8):
        try:
            message(seed, "no wait")
        except Race:
            found += 1
    assert found


@triton.jit
def lone_kernel(data_ptr, out_ptr, MODE: tl.constexpr):
    offs = tl.arange(0, 8)
    tl.store(data_ptr + offs, offs)
    if MODE == "barrier":
        tl.debug_barrier()
    if MODE == "same tile":
        x = tl.load(data_ptr + offs)
    elif MODE == "outside":
        x = tl.load(data_ptr + 1 + offs)
    else:
        x = tl.load(data_ptr + 7 - offs)
    tl.store(out_ptr + offs, x)


@pytest.mark.parametrize("mode", ["barrier", "same tile"])
def test_reading_back_is_allowed(mode):
    data, out = torch.zeros(8), torch.zeros(8)
    with cooperative(None, detector=Detector()):
        lone_kernel[(1,)](data, out, MODE=mode)
    assert sorted(out.tolist()) == list(range(8))


def test_reading_back_across_threads_is_a_race():
    with pytest.raises(Race, match="reads back its own stores"):  # noqa: SIM117
        with cooperative(None, detector=Detector()):
            lone_kernel[(1,)](torch.zeros(8), torch.zeros(8), MODE="neither")


def test_leaving_a_tensor_is_seen():
    with pytest.raises(IndexError, match=r"program 0 leaves torch.float32 \[8\]"):  # noqa: SIM117
        with cooperative(None, detector=Detector()):
            lone_kernel[(1,)](torch.zeros(8), torch.zeros(8), MODE="outside")
