"""The scheduler and the detector themselves, on kernels small enough to check by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import roundtrip
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from races import Access, Detector, Race
from scheduler import BUILDER, Deadlock, cooperative
from triton._C.libtriton import ir

from fusedrnn.kernels import sync


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
    before = interpreter.GridExecutor.__call__, dict(vars(BUILDER)), roundtrip.sync.workspaces
    with cooperative(0):
        pass
    with pytest.raises(KeyError), cooperative(0):
        raise KeyError
    after = interpreter.GridExecutor.__call__, dict(vars(BUILDER)), roundtrip.sync.workspaces
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


class Ring:
    """Two programs, a ring of four elements that is polled, and a counter; event by event."""

    def __init__(self):
        self.ring = torch.full((4,), -0.0)
        self.counter = torch.zeros(1, dtype=torch.int32)
        self.detector = Detector()
        self.detector.polled(self.ring)
        self.detector.begin(2, [self.ring, self.counter])

    def access(self, program, tensor, first, count, **kind):
        addresses = np.uint64(tensor.data_ptr()) + np.arange(first, first + count, dtype="u8") * 4
        pointers = interpreter.TensorHandle(addresses, tl.pointer_type(tl.int32))
        return Access(program, pointers, None, **kind)

    def store(self, program, value, first=0, count=2):
        values = np.full(count, value, np.float32).view(np.int32)
        self.detector.store(self.access(program, self.ring, first, count, values=values))

    def poll(self, program, first=0, count=2):
        self.detector.load(
            self.access(program, self.ring, first, count, volatile=True, bypass=True)
        )

    def meet(self, *programs, barriers=True):
        """All release, then all acquire."""
        for sem in (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE):
            for program in programs:
                before = barriers and sem == ir.MEM_SEMANTIC.RELEASE
                after = barriers and sem == ir.MEM_SEMANTIC.ACQUIRE
                if before:
                    self.detector.barrier(program)
                access = self.access(program, self.counter, 0, 1)
                self.detector.atomic(access, sem, ir.MEM_SYNC_SCOPE.GPU)
                if after:
                    self.detector.barrier(program)


def test_a_polled_ring_round_once():
    """Program 0 owns the first two elements; program 1 answers in the others."""
    ring = Ring()
    ring.poll(1)
    ring.store(0, 1.0)
    ring.poll(1)
    ring.store(1, 2.0, first=2)
    ring.poll(0, first=2)
    ring.store(0, -0.0)  # program 1 has read them, for it has answered
    ring.meet(0, 1)
    ring.poll(1)
    ring.store(0, 3.0)
    ring.poll(1)


def test_a_value_over_a_value_is_a_race():
    ring = Ring()
    ring.store(0, 1.0)
    with pytest.raises(Race, match=r"program 0 stores over what was not taken back.* 2 of 2"):
        ring.store(0, 2.0)


def test_a_ring_that_was_not_filled_is_a_race():
    ring = Ring()
    ring.ring[1] = 0.0
    ring.detector.begin(2, [ring.ring, ring.counter])
    with pytest.raises(Race, match=r"stores over what was not taken back.* 1 of 2"):
        ring.store(0, 2.0)


def test_taking_back_what_is_read_is_a_race():
    ring = Ring()
    ring.store(0, 1.0)
    ring.poll(1)
    ring.store(0, -0.0)
    with pytest.raises(Race, match="program 1 was still reading what was overwritten"):
        ring.store(1, 2.0, first=2)


def test_taking_back_without_an_answer_is_a_race():
    ring = Ring()
    ring.store(0, 1.0)
    ring.poll(1)
    ring.store(1, 2.0, first=2)
    with pytest.raises(Race, match="program 0 overwrites what another may be reading"):
        ring.store(0, -0.0)


@pytest.mark.parametrize("how", ["nothing", "no barriers", "before"])
def test_polling_what_may_not_be_taken_back_yet_is_a_race(how):
    ring = Ring()
    ring.store(0, 1.0)
    if how == "before":
        ring.meet(0, 1)
    ring.store(0, -0.0)
    if how == "no barriers":
        ring.meet(0, 1, barriers=False)
    ring.poll(0)  # its own stores it knows
    with pytest.raises(Race, match="program 1 polls what may not be taken back yet"):
        ring.poll(1)


def test_a_polled_ring_is_accessed_by_relaxed_loads_and_stores():
    ring = Ring()
    ring.store(0, 1.0)
    with pytest.raises(Race, match="program 1 reads a polled ring without volatile"):
        ring.detector.load(ring.access(1, ring.ring, 0, 2, bypass=True))
    with pytest.raises(Race, match="or by a plain store"):
        ring.detector.store(ring.access(1, ring.ring, 2, 2))


@triton.jit
def two_cells_kernel(data_ptr, seen_ptr, TURNS: tl.constexpr):
    """Program 0 stores two elements at once, relaxed; program 1 looks at both, again and again."""
    offs = tl.arange(0, 2)
    if tl.program_id(0) == 0:
        sync._store(data_ptr + offs, tl.full((2,), 1, tl.int32))
    else:
        for turn in range(TURNS):
            both = tl.load(data_ptr + offs, volatile=True)
            tl.store(seen_ptr + turn, tl.sum(both * (1 + offs)))


def test_relaxed_stores_are_seen_in_parts():
    seen = set()
    for seed in range(40):
        found = torch.zeros(4, dtype=torch.int32)
        with cooperative(seed):
            two_cells_kernel[(2,)](torch.zeros(2, dtype=torch.int32), found, TURNS=4)
        assert all(a & b == a for a, b in itertools.pairwise(found.tolist()))
        seen.update(found.tolist())
    assert seen == {0, 1, 2, 3}
