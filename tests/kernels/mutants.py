"""Mistakes in the exchange between programs, each of which a test must catch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from races import Race
from scheduler import Deadlock


class WrongResult(Exception):
    """A run ended well, with other numbers than it should."""


class Change(NamedTuple):
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A mistake, and what gives it away.

    Attributes:
        sync: changes to kernels/sync.py.
        kernel: changes to the kernel that uses it.
        caught: how it may show.
        always: in every interleaving, not only in some.
    """

    name: str
    protocol: str
    caught: tuple[type[Exception], ...]
    sync: tuple[Change, ...] = ()
    kernel: tuple[Change, ...] = ()
    always: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return f"{self.protocol}: {self.name}"


_RELEASE_RELAXED = Change('sem="release"', 'sem="relaxed"')
_ACQUIRE_RELAXED = Change('sem="acquire"', 'sem="relaxed"')
_RELEASE_IN_BLOCK = Change('sem="release", scope="gpu"', 'sem="release", scope="cta"')
_ACQUIRE_IN_BLOCK = Change('sem="acquire", scope="gpu"', 'sem="acquire", scope="cta"')
_ONE_SLOT = Change("index = step & 1", "index = step & 0")
_THROUGH_L1 = Change('other=0.0, cache_modifier=".cg"', "other=0.0")
_BARRIER = "        tl.debug_barrier()\n"
_ADD = "        tl.atomic_add(signal_ptr, alive"
_MAX = "        tl.atomic_max(signal_ptr + program, step"
_COUNTER_VERDICT = "        alive = _verdict(arrived >= target"
_FLAGS_VERDICT = "        arrived = tl.min(tl.where(mask, flags, step))"
_FLAGS_POLL = "tl.load(signal_ptr + offs, mask=mask, other=step, volatile=True)"
_NO_POLL = (
    Change("while (late != 0) &", "while (late < 0) &"),
    Change("_verdict(late == 0", "_verdict(late >= 0"),
)
_POLL_PAST_L1_ONLY = Change("other=0, volatile=True", 'other=0, cache_modifier=".cg"')

COUNTER = (
    Mutant(
        "no wait",
        "counter",
        (Race,),
        (
            Change("(arrived < target) &", "(arrived < 0) &"),
            Change("_verdict(arrived >= target", "_verdict(arrived >= 0"),
        ),
    ),
    Mutant("no arrive", "counter", (Deadlock,), (Change(_ADD, _ADD + " * 0"),), always=True),
    Mutant("arrive twice", "counter", (Race,), (Change(_ADD, _ADD + " * 2"),)),
    Mutant(
        "waits for the step before",
        "counter",
        (Race,),
        (Change("target = step * n_programs", "target = (step - 1) * n_programs"),),
    ),
    Mutant(
        "waits for the step after",
        "counter",
        (Deadlock,),
        (Change("target = step * n_programs", "target = (step + 1) * n_programs"),),
        always=True,
    ),
    Mutant(
        "waits for all but one",
        "counter",
        (Race,),
        (Change("target = step * n_programs", "target = step * n_programs - 1"),),
    ),
    Mutant("release relaxed", "counter", (Race,), (_RELEASE_RELAXED,), always=True),
    Mutant("acquire relaxed", "counter", (Race,), (_ACQUIRE_RELAXED,), always=True),
    Mutant("release in its block", "counter", (Race,), (_RELEASE_IN_BLOCK,), always=True),
    Mutant("acquire in its block", "counter", (Race,), (_ACQUIRE_IN_BLOCK,), always=True),
    Mutant(
        "no barrier before the release",
        "counter",
        (Race,),
        (Change(_BARRIER + _ADD, _ADD),),
        always=True,
    ),
    Mutant(
        "no barrier after the acquire",
        "counter",
        (Race,),
        (Change(_BARRIER + _COUNTER_VERDICT, _COUNTER_VERDICT),),
        always=True,
    ),
    Mutant("reads through L1", "counter", (Race,), (_THROUGH_L1,), always=True),
    Mutant("one slot", "counter", (Race,), (_ONE_SLOT,)),
)

FLAGS = (
    Mutant(
        "no wait",
        "flags",
        (Race,),
        (Change("(seen < step) &", "(seen < 0) &"), Change("arrived >= step", "arrived >= 0")),
    ),
    Mutant("no arrive", "flags", (Deadlock,), (Change(_MAX, _MAX + " * 0"),), always=True),
    Mutant(
        "waits for the step before",
        "flags",
        (Race,),
        (
            Change("(seen < step) &", "(seen < step - 1) &"),
            Change("arrived >= step", "arrived >= step - 1"),
        ),
    ),
    Mutant(
        "forgets one flag",
        "flags",
        (Race,),
        (Change("mask = offs < n_programs", "mask = offs < n_programs - 1"),),
    ),
    Mutant("release relaxed", "flags", (Race,), (_RELEASE_RELAXED,), always=True),
    Mutant("acquire relaxed", "flags", (Race,), (_ACQUIRE_RELAXED,), always=True),
    Mutant("release in its block", "flags", (Race,), (_RELEASE_IN_BLOCK,), always=True),
    Mutant("acquire in its block", "flags", (Race,), (_ACQUIRE_IN_BLOCK,), always=True),
    Mutant(
        "no barrier before the release",
        "flags",
        (Race,),
        (Change(_BARRIER + _MAX, _MAX),),
        always=True,
    ),
    Mutant(
        "no barrier after the acquire",
        "flags",
        (Race,),
        (Change(_BARRIER + _FLAGS_VERDICT, _FLAGS_VERDICT),),
        always=True,
    ),
    Mutant(
        "polls through L1",  # where nothing invalidates it, it never sees what it waits for
        "flags",
        (Race, RuntimeError),
        (Change(_FLAGS_POLL, _FLAGS_POLL.replace(", volatile=True", "")),),
    ),
    Mutant("reads through L1", "flags", (Race,), (_THROUGH_L1,), always=True),
    Mutant("one slot", "flags", (Race,), (_ONE_SLOT,)),
)

_LL_BARRIER = "            tl.debug_barrier()\n    else:"
LL = (
    Mutant("no poll", "ll", (WrongResult, Race), _NO_POLL),
    Mutant(
        "no barrier after the poll",
        "ll",
        (Race,),
        (Change(_LL_BARRIER, "            pass\n    else:"),),
    ),
    Mutant(
        "expects the step before",
        "ll",
        (WrongResult, Race, Deadlock),
        (Change("words.to(tl.int32) != step", "words.to(tl.int32) != step - 1"),),
    ),
    Mutant(
        "expects the step after",
        "ll",
        (Deadlock,),
        (Change("words.to(tl.int32) != step", "words.to(tl.int32) != step + 1"),),
        always=True,
    ),
    Mutant(
        "stores another step",
        "ll",
        (Deadlock,),
        (Change("word = (bits << 32) | step", "word = (bits << 32) | (step + 1)"),),
        always=True,
    ),
    Mutant("polls without volatile", "ll", (Race,), (_POLL_PAST_L1_ONLY,), always=True),
    Mutant("one slot", "ll", (Race, Deadlock), (_ONE_SLOT,)),
    Mutant(
        "ring not cleared",
        "ll",
        (WrongResult, Race),
        (Change("ring = torch.zeros(shape", "ring = torch.ones(shape"),),
    ),
)

SENTINEL = (
    Mutant("no poll", "sentinel", (WrongResult, Race), _NO_POLL),
    Mutant("polls without volatile", "sentinel", (Race,), (_POLL_PAST_L1_ONLY,), always=True),
    Mutant(
        "slots used again",
        "sentinel",
        (WrongResult, Race),
        (Change("        index = step\n", "        index = step & 1\n"),),
    ),
    Mutant(
        "ring not filled",
        "sentinel",
        (WrongResult, Race),
        (Change("ring = torch.full(shape, -1", "ring = torch.full(shape, 0"),),
    ),
)

# Mistakes of a caller, made in bench/roundtrip.py.
_STORE = "sync.store(slot_ptr, rows * H + units, h, own_mask, t + 2, PROTOCOL)"
_ARRIVE = "sync.arrive(signal_ptr, program, t + 2, alive, PROTOCOL)"
_LOAD_MASK = "masks = masks + ((batch < B) & (others < H),)"
CALLER = (
    *(
        Mutant(
            "arrives before it has stored",
            protocol,
            (Race,),
            kernel=(Change(f"{_STORE}\n        {_ARRIVE}", f"{_ARRIVE}\n        {_STORE}"),),
            always=True,
        )
        for protocol in ("counter", "flags")
    ),
    *(
        mutant
        for protocol in ("ll", "sentinel")
        for mutant in (
            Mutant(
                "polls what is not stored",
                protocol,
                (Deadlock,),
                kernel=(Change(_LOAD_MASK, _LOAD_MASK.replace("batch < B", "rows < BLOCK_B")),),
                always=True,
            ),
            Mutant(
                "polls less than is stored",
                protocol,
                (WrongResult,),
                kernel=(Change(_LOAD_MASK, _LOAD_MASK.replace("< H)", "< H) & (others != 1)")),),
                always=True,
            ),
            Mutant(
                "stores less than is polled",
                protocol,
                (Deadlock,),
                kernel=(Change(_STORE, _STORE.replace("own_mask", "own_mask & (units != 1)")),),
                always=True,
            ),
        )
    ),
    *(
        Mutant(
            "waits for the step before",
            protocol,
            (Race,),
            kernel=(Change("signal_ptr, t + 1, n_programs", "signal_ptr, t, n_programs"),),
        )
        for protocol in ("counter", "flags")
    ),
    *(
        Mutant(
            "reads the slot of the step after",
            protocol,
            caught,
            kernel=(Change("sync.slot(t + 1, PROTOCOL)", "sync.slot(t + 2, PROTOCOL)"),),
            always=True,
        )
        for protocol, caught in (
            ("counter", (Race, WrongResult)),
            ("flags", (Race, WrongResult)),
            ("ll", (Deadlock,)),
            ("sentinel", (Deadlock,)),
        )
    ),
)

# Mistakes of the time loops, made in kernels/scan_forward.py and kernels/scan_backward.py.
_FORWARD_STORE = "sync.store(slot_ptr, offs_own, h, mask_h, step + 2, PROTOCOL)"
_FORWARD_ARRIVE = "sync.arrive(signal_ptr, tl.program_id(0), step + 2, alive, PROTOCOL)"
_BACKWARD_STORE = "sync.store(slot_ptr, offs_gate, rounded[g], mask_h, step + 1, PROTOCOL)"
_BACKWARD_ARRIVE = "sync.arrive(signal_ptr, tl.program_id(0), step + 1, alive, PROTOCOL)"
_LOOP_WAIT = "signal_ptr,\n                step + 1,\n"
FORWARD = (
    Mutant(
        "forward waits for the step before",
        "counter",
        (Race,),
        kernel=(Change(_LOOP_WAIT, _LOOP_WAIT.replace("step + 1", "step")),),
    ),
    Mutant(
        "forward arrives with the step before",
        "flags",
        (Deadlock,),
        kernel=(Change(_FORWARD_ARRIVE, _FORWARD_ARRIVE.replace("step + 2", "step + 1")),),
        always=True,
    ),
    Mutant(
        "forward stores less than is polled",
        "ll",
        (Deadlock,),
        kernel=(Change(_FORWARD_STORE, _FORWARD_STORE.replace("mask_h", "mask_h & (own_h != 1)")),),
        always=True,
    ),
    Mutant(
        "forward reads the slot of the step after",
        "sentinel",
        (Deadlock,),
        kernel=(Change("sync.slot(step + 1, PROTOCOL)", "sync.slot(step + 2, PROTOCOL)"),),
        always=True,
    ),
)
BACKWARD = (
    Mutant(
        "backward waits for the step before",
        "counter",
        (Race,),
        kernel=(Change(_LOOP_WAIT, _LOOP_WAIT.replace("step + 1", "step")),),
    ),
    Mutant(
        "backward arrives before it has stored",
        "flags",
        (Race,),
        kernel=(
            Change(f"            {_BACKWARD_ARRIVE}\n", ""),
            Change(
                f"            for g in tl.static_range(G):\n"
                f"                offs_gate = offs_own + g * H\n"
                f"                {_BACKWARD_STORE}",
                f"            {_BACKWARD_ARRIVE}\n"
                f"            for g in tl.static_range(G):\n"
                f"                offs_gate = offs_own + g * H\n"
                f"                {_BACKWARD_STORE}",
            ),
        ),
        always=True,
    ),
    Mutant(
        "backward stores less than is polled",
        "ll",
        (Deadlock,),
        kernel=(
            Change(_BACKWARD_STORE, _BACKWARD_STORE.replace("mask_h", "mask_h & (own_h != 1)")),
        ),
        always=True,
    ),
    Mutant(
        "backward stores another step",
        "ll",
        (Deadlock,),
        kernel=(Change(_BACKWARD_STORE, _BACKWARD_STORE.replace("step + 1", "step + 2")),),
        always=True,
    ),
)

SYNC = (*COUNTER, *LL, *FLAGS, *SENTINEL)
