"""Mistakes in the exchange between programs, each of which a test must catch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
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
        lap: steps of a lap of the sentinel's ring.
        dtype, pairwise: where only they run the changed line.
    """

    name: str
    protocol: str
    caught: tuple[type[Exception], ...]
    sync: tuple[Change, ...] = ()
    kernel: tuple[Change, ...] = ()
    always: bool = field(default=False, kw_only=True)
    lap: int = field(default=2, kw_only=True)
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    pairwise: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return f"{self.protocol}: {self.name}"


# Of the counter, in every step or once a lap.
_ADD = "    tl.atomic_add(signal_ptr, 1"
_BARRIER = "    tl.debug_barrier()\n"
_VERDICT = "    if arrived < target:"
_ORDER = {
    "release relaxed": (Change('sem="release"', 'sem="relaxed"'),),
    "acquire relaxed": (Change('sem="acquire"', 'sem="relaxed"'),),
    "release in its block": (Change('sem="release", scope="gpu"', 'sem="release", scope="cta"'),),
    "acquire in its block": (Change('sem="acquire", scope="gpu"', 'sem="acquire", scope="cta"'),),
    "no barrier before the release": (Change(_BARRIER + _ADD, _ADD),),
    "no barrier after the acquire": (Change(_BARRIER + _VERDICT, _VERDICT),),
}
_NO_WAIT = (
    Change("while (arrived < target) &", "while (arrived < 0) &"),
    Change(_VERDICT, "    if arrived < 0:"),
    Change("return arrived >= target", "return arrived >= 0"),
)
_TARGET = {"counter": "step * n_programs", "sentinel": "step // LAP * n_programs"}
_BEFORE = {"counter": "(step - 1) * n_programs", "sentinel": "(step // LAP - 1) * n_programs"}
_AFTER = {"counter": "(step + 1) * n_programs", "sentinel": "(step // LAP + 1) * n_programs"}
BARRIERS = tuple(
    mutant
    for protocol in ("counter", "sentinel")
    for mutant in (
        Mutant("no wait", protocol, (Race,), _NO_WAIT),
        Mutant("no arrival", protocol, (Deadlock,), (Change(_ADD, _ADD[:-1] + "0"),), always=True),
        Mutant("arrives twice", protocol, (Race,), (Change(_ADD, _ADD[:-1] + "2"),)),
        Mutant(
            "waits for those before",
            protocol,
            (Race,),
            (
                Change(
                    f"_wait(signal_ptr, {_TARGET[protocol]},",
                    f"_wait(signal_ptr, {_BEFORE[protocol]},",
                ),
            ),
        ),
        Mutant(
            "waits for those after",
            protocol,
            (Deadlock,),
            (
                Change(
                    f"_wait(signal_ptr, {_TARGET[protocol]},",
                    f"_wait(signal_ptr, {_AFTER[protocol]},",
                ),
            ),
            always=True,
        ),
        Mutant(
            "waits for all but one",
            protocol,
            (Race,),
            (Change(f"{_TARGET[protocol]},", f"{_TARGET[protocol]} - 1,"),),
        ),
        *(
            Mutant(name, protocol, (Race,), changes, always=True)
            for name, changes in _ORDER.items()
        ),
    )
)

COUNTER = (Mutant("one slot", "counter", (Race,), (Change("index = step % 2\n", "index = 0\n"),)),)

_AGAIN = "if (step > LAP) & (step + LAP <= last):"
_AGAIN_SLOT = "slot(step + LAP, PROTOCOL)"
_AGAIN_VALUE = "_store(again_ptr + offs, tl.zeros_like(bits) + minus_zero)"
_VALUE = "ring_ptr + slot(step, PROTOCOL) * slot_size + offs, bits)\n        step ="
_LAST_VECTOR = "for n in vectors[1:]:"
SLOTS = (
    Mutant(
        "minus zero is not remapped",
        "sentinel",
        (Race, Deadlock),
        (Change("tl.where(bits == minus_zero, tl.zeros_like(bits), bits)", "bits"),),
        always=True,
    ),
    Mutant(
        "publishes a part",
        "sentinel",
        (Race, Deadlock),
        (Change(_VALUE, _VALUE.replace("+ offs", "+ offs // 2 * 2")),),
        always=True,
    ),
    Mutant("a ring of one lap", "sentinel", (Race, Deadlock), (Change("% (2 * LAP)", "% LAP"),)),
    Mutant("laps of one step", "sentinel", (Race, Deadlock), lap=1),
    Mutant(
        "takes nothing back", "sentinel", (Race,), (Change(_AGAIN, "if step > last:"),), always=True
    ),
    Mutant(
        "takes a part back",
        "sentinel",
        (Race,),
        (Change(_AGAIN_VALUE, _AGAIN_VALUE.replace("+ offs", "+ offs // 2 * 2")),),
        always=True,
    ),
    Mutant(
        "takes back with plus zero",
        "sentinel",
        (Race,),
        (Change(_AGAIN_VALUE, _AGAIN_VALUE.replace(" + minus_zero", "")),),
        always=True,
    ),
    Mutant(
        "takes back the slot after",
        "sentinel",
        (Race, Deadlock),
        (Change(_AGAIN_SLOT, "slot(step + LAP + 1, PROTOCOL)"),),
        always=True,
    ),
    Mutant(
        "takes back what may be read",
        "sentinel",
        (Race, Deadlock),
        (Change(_AGAIN, "if step > 1:"), Change(_AGAIN_SLOT, "slot(step - 1, PROTOCOL)")),
    ),
    Mutant(
        "takes back right before it is polled",
        "sentinel",
        (Race, Deadlock),
        (
            Change(_AGAIN, "if step >= 2 * LAP:"),
            Change(_AGAIN_SLOT, "slot(step + 1, PROTOCOL)"),
        ),
        always=True,
        lap=3,  # in a lap of two steps a barrier would lie between
    ),
    Mutant(
        "no lap is waited for",
        "sentinel",
        (Race,),
        (Change("elif step % LAP == 0:", "elif step < 0:"),),
        always=True,
    ),
    Mutant(
        "the first lap is not waited for",
        "sentinel",
        (Race,),
        (Change("elif step % LAP == 0:", "elif (step % LAP == 0) & (step > 2 * LAP):"),),
        always=True,
    ),
    Mutant(
        "arrives at no lap",
        "sentinel",
        (Deadlock,),
        (Change("elif tl.cast(step, tl.int32) % LAP == 0:", "elif tl.cast(step, tl.int32) < 0:"),),
        always=True,
    ),
    Mutant(
        "the ring is not filled",
        "sentinel",
        (Race, WrongResult),
        (Change("torch.full((*blocks, *elements), -0.0", "torch.full((*blocks, *elements), 0.0"),),
        always=True,
    ),
    Mutant(
        "units that nobody owns are polled",
        "sentinel",
        (Deadlock,),
        (
            Change("*half)] = 0.0", "*half)] = -0.0"),
            Change("block + (rest > 0) :] = 0.0", "block + (rest > 0) :] = -0.0"),
        ),
        always=True,
    ),
)

_PAIRS = {"dtype": torch.float16, "pairwise": True}
_HALVES = {"dtype": torch.bfloat16, "pairwise": False}
POLLS = (
    Mutant(
        "no poll",
        "sentinel",
        (WrongResult, Race),
        (Change("@!missing bra DONE;", "bra DONE;"),),
    ),
    Mutant(
        "looks at one vector",
        "sentinel",
        (WrongResult, Race),
        (Change(_LAST_VECTOR, "for n in vectors[:0]:"),),
    ),
    Mutant(
        "asks for all but one again",
        "sentinel",
        (Deadlock,),
        (Change('{load(n)}" for n in vectors]', '{load(n)}" for n in vectors[1:]]'),),
    ),
    Mutant(
        "asks for what is there",
        "sentinel",
        (Deadlock,),
        (Change('f"@late{n} {load(n)}"', 'f"@!late{n} {load(n)}"'),),
    ),
    Mutant(
        "looks at three words of four",
        "sentinel",
        (WrongResult, Race),
        (Change('"min.s32 x, {3}, {4};"', '"min.s32 x, {3}, {3};"'),),
    ),
    Mutant(
        "looks at three pairs of four",
        "sentinel",
        (WrongResult, Race),
        (Change('"min.s16x2 x, {3}, {4};"', '"min.s16x2 x, {3}, {3};"'),),
        **_PAIRS,
    ),
    Mutant(
        "waits only for what lacks both halves",
        "sentinel",
        (WrongResult, Race),
        (Change('"min.s16x2 x, x, {0};"', '"mov.b32 x, {0};"'),),
        **_PAIRS,
    ),
    Mutant(
        "looks at three words of four, bit by bit",
        "sentinel",
        (WrongResult, Race),
        (Change("for i in range(1, 5):", "for i in range(1, 4):"),),
        **_HALVES,
    ),
    *(
        Mutant(
            f"forgets the {name} half",
            "sentinel",
            (WrongResult, Race),
            (Change('"and.b32 x, {0}, 0x80008000;"', f'"and.b32 x, {{0}}, {bits};"'),),
            **_HALVES,
        )
        for name, bits in (("upper", "0x00008000"), ("lower", "0x80000000"))
    ),
)

# What a time-out needs. These show only where there is one.
TIME_OUTS = (
    Mutant(
        "forgets NaN",
        "sentinel",
        (),
        (Change('*(f"mov.b32 {word}, {nan};" for vector in words for word in vector)', "*()"),),
    ),
    Mutant(
        "tells nobody",
        "sentinel",
        (),
        (Change('f"st.relaxed.gpu.global.b32 [${gave_up}], ${step};",', ""),),
    ),
    Mutant(
        "listens to nobody",
        "sentinel",
        (),
        (Change('"setp.eq.s32 missing, told, 0;"', '"setp.eq.s32 missing, 0, 0;"'),),
    ),
    Mutant("forgets NaN", "counter", (), (Change('tl.where(ok, 0.0, float("nan"))', "0.0"),)),
    Mutant(
        "tells nobody",
        "counter",
        (),
        (
            Change(
                "tl.atomic_max(signal_ptr + _GAVE_UP, step",
                "tl.atomic_max(signal_ptr + _GAVE_UP, 0",
            ),
        ),
    ),
    Mutant(
        "listens to nobody",
        "counter",
        (),
        (Change("tl.where(gave_up != 0,", "tl.where(spins < 0,"),),
    ),
    Mutant(
        "tells the last step that was missed",
        "counter",
        (),
        (Change("        if gave_up == 0:", "        if gave_up >= 0:"),),
    ),
    Mutant(
        "lets those who go on stand for the missing",
        "counter",
        (),
        (Change("tl.atomic_min(signal_ptr, -(2**31)", "tl.atomic_min(signal_ptr, 2**30"),),
    ),
    *(
        Mutant(
            "reports nothing",
            protocol,
            (),
            (Change("tl.store(error_ptr, step, mask=step != 0)", "pass"),),
        )
        for protocol in ("counter", "sentinel")
    ),
)

# Mistakes of a caller, made in bench/roundtrip.py.
_PUBLISH = "sync.publish(ring_ptr, SLOT, own, h, t + 2, T + 1, PROTOCOL)"
_ARRIVE = "sync.arrive(signal_ptr, t + 2, PROTOCOL)"
_WAIT = "sync.wait(signal_ptr, t + 1, "
CALLER = (
    Mutant(
        "arrives before it has published",
        "counter",
        (Race,),
        kernel=(Change(f"{_PUBLISH}\n        {_ARRIVE}", f"{_ARRIVE}\n        {_PUBLISH}"),),
        always=True,
    ),
    Mutant(
        "waits for the step before",
        "counter",
        (Race,),
        kernel=(Change(_WAIT, "sync.wait(signal_ptr, tl.maximum(t, 1), "),),
    ),
    Mutant(
        "waits for the lap after a poll that needs it",
        "sentinel",
        (Race,),
        kernel=(Change(_WAIT, "sync.wait(signal_ptr, tl.maximum(t - 1, 1), "),),
        always=True,
    ),
    Mutant(
        "the last step is not taken back",
        "sentinel",
        (Race,),
        kernel=(Change(_PUBLISH, _PUBLISH.replace("T + 1", "T")),),
        always=True,
    ),
    *(
        mutant
        for protocol in ("counter", "sentinel")
        for mutant in (
            Mutant(
                "publishes less than is read",
                protocol,
                (WrongResult, Deadlock, Race),
                kernel=(Change(_PUBLISH, _PUBLISH.replace("own,", "own // 2 * 2,")),),
                always=True,
            ),
            Mutant(
                "publishes another step",
                protocol,
                (WrongResult, Deadlock, Race),
                kernel=(Change(_PUBLISH, _PUBLISH.replace("t + 2", "t + 3")),),
                always=True,
            ),
            Mutant(
                "reads the slot of the step after",
                protocol,
                (WrongResult, Deadlock, Race),
                kernel=(Change("sync.slot(t + 1, PROTOCOL)", "sync.slot(t + 2, PROTOCOL)"),),
                always=True,
            ),
        )
    ),
)

# Mistakes of the time loops, made in kernels/product.py, scan_forward.py and scan_backward.py.
_LOOP_WAIT = "sync.wait(signal_ptr, step,"
PRODUCT = (
    Mutant(
        "waits for the step before",
        "counter",
        (Race,),
        kernel=(Change(_LOOP_WAIT, "sync.wait(signal_ptr, tl.maximum(step - 1, 1),"),),
    ),
    Mutant(
        "waits for the lap after a poll that needs it",
        "sentinel",
        (Race,),
        kernel=(Change(_LOOP_WAIT, "sync.wait(signal_ptr, tl.maximum(step - 2, 1),"),),
        always=True,
    ),
    Mutant(
        "reads the slot of the step after",
        "sentinel",
        (Deadlock,),
        kernel=(Change("sync.slot(step, PROTOCOL)", "sync.slot(step + 1, PROTOCOL)"),),
        always=True,
    ),
)
_FORWARD_PUBLISH = "sync.publish(ring_ptr, SLOT, offs_own, h, step + 2, T + 1, PROTOCOL)"
_FORWARD_ARRIVE = "sync.arrive(signal_ptr, step + 2, PROTOCOL)"
FORWARD = (
    Mutant(
        "forward arrives before it has published",
        "counter",
        (Race,),
        kernel=(
            Change(_FORWARD_ARRIVE, "pass"),
            Change(_FORWARD_PUBLISH, f"{_FORWARD_ARRIVE}; {_FORWARD_PUBLISH}"),
        ),
        always=True,
    ),
    Mutant(
        "forward arrives with the step before",
        "sentinel",
        (Deadlock,),
        kernel=(Change(_FORWARD_ARRIVE, _FORWARD_ARRIVE.replace("step + 2", "step + 1")),),
        always=True,
    ),
    Mutant(
        "forward publishes less than is polled",
        "sentinel",
        (Race, Deadlock),
        kernel=(
            Change(_FORWARD_PUBLISH, _FORWARD_PUBLISH.replace("offs_own", "offs_own // 2 * 2")),
        ),
        always=True,
    ),
    Mutant(
        "forward does not take the last steps back",
        "sentinel",
        (Race,),
        kernel=(Change(_FORWARD_PUBLISH, _FORWARD_PUBLISH.replace("T + 1", "T - 1")),),
        always=True,
    ),
)
_BACKWARD_PUBLISH = "for g in tl.static_range(len(rounded)):"
_BACKWARD_ARRIVE = "    sync.arrive(signal_ptr, step, PROTOCOL)\n"
BACKWARD = (
    Mutant(
        "backward arrives before it has published",
        "counter",
        (Race,),
        kernel=(
            Change(_BACKWARD_ARRIVE, ""),
            Change(
                f"    {_BACKWARD_PUBLISH}\n        offs = ",
                f"{_BACKWARD_ARRIVE}    {_BACKWARD_PUBLISH}\n        offs = ",
            ),
        ),
        always=True,
    ),
    Mutant(
        "backward publishes less than is polled",
        "sentinel",
        (Deadlock,),
        kernel=(
            Change(
                f"{_BACKWARD_PUBLISH}\n        offs = ",
                f"{_BACKWARD_PUBLISH.replace(')):', ') - 1):')}\n        offs = ",
            ),
        ),
        always=True,
    ),
    Mutant(
        "backward does not take the last step back",
        "sentinel",
        (Race,),
        kernel=(Change("rounded, step + 2, T + 1,", "rounded, step + 2, T,"),),
        always=True,
    ),
)

SYNC = (*BARRIERS, *COUNTER, *SLOTS, *POLLS)
