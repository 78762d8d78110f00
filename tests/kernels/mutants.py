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
    caught: tuple[type[Exception], ...]
    sync: tuple[Change, ...] = ()
    kernel: tuple[Change, ...] = ()
    always: bool = field(default=False, kw_only=True)
    lap: int = field(default=2, kw_only=True)
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    pairwise: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return self.name


_ADD = "        tl.atomic_add(channel.signal, 1"
_BARRIER = "        tl.debug_barrier()\n"
_ENOUGH = 'f"setp.lt.s32 missing, x, ${arrived};"'
_LOAD = "ld.acquire.gpu.global"
_TARGET = "step // LAP * n_programs"
ARRIVALS = (
    Mutant("waits for no arrival", (Race,), (Change(_ENOUGH, '"setp.lt.s32 missing, 0, 0;"'),)),
    Mutant("does not arrive", (Deadlock,), (Change(_ADD, _ADD[:-1] + "0"),), always=True),
    Mutant(
        "arrives with the step before",
        (Deadlock,),
        (Change("arrive(channel, step)\n\n", "arrive(channel, tl.maximum(step - 1, 1))\n\n"),),
        always=True,
    ),
    Mutant("arrives twice", (Race,), (Change(_ADD, _ADD[:-1] + "2"),)),
    Mutant(
        "waits for those before",
        (Race,),
        (Change(_TARGET, "(step // LAP - 1) * n_programs"),),
    ),
    Mutant(
        "waits for those after",
        (Deadlock,),
        (Change(_TARGET, "(step // LAP + 1) * n_programs"),),
        always=True,
    ),
    Mutant("waits for all but one", (Race,), (Change(_TARGET, f"{_TARGET} - 1"),)),
    *(
        Mutant(name, (Race,), changes, always=True)
        for name, changes in {
            "release relaxed": (Change('sem="release"', 'sem="relaxed"'),),
            "acquire relaxed": (Change(_LOAD, "ld.relaxed.gpu.global"),),
            "release in its block": (Change('"release", scope="gpu"', '"release", scope="cta"'),),
            "acquire in its block": (Change(_LOAD, "ld.acquire.cta.global"),),
            "no barrier before the release": (Change(_BARRIER + _ADD, _ADD),),
        }.items()
    ),
)

_AGAIN = "if (step > LAP) & (step + LAP <= last):"
_AGAIN_SLOT = "slot(step + LAP)"
_AGAIN_VALUE = "_store(again_ptr + offs, (bits & 0) | minus_zero)"
_VALUE = "ring_ptr + slot(step) * SLOT + offs, bits)\n    step ="
_LAST_VECTOR = "for n in vectors[1:]:"
SLOTS = (
    Mutant(
        "minus zero is not remapped",
        (Race, Deadlock),
        (Change("tl.where(bits == minus_zero, bits & 0, bits)", "bits"),),
        always=True,
    ),
    Mutant(
        "publishes a part",
        (Race, Deadlock),
        (Change(_VALUE, _VALUE.replace("+ offs", "+ offs // 2 * 2")),),
        always=True,
    ),
    Mutant("a ring of one lap", (Race, Deadlock), (Change("% (2 * LAP)", "% LAP"),)),
    Mutant("laps of one step", (Race, Deadlock), lap=1),
    Mutant("takes nothing back", (Race,), (Change(_AGAIN, "if step > last:"),), always=True),
    Mutant(
        "takes a part back",
        (Race,),
        (Change(_AGAIN_VALUE, _AGAIN_VALUE.replace("+ offs", "+ offs // 2 * 2")),),
        always=True,
    ),
    Mutant(
        "takes back with plus zero",
        (Race,),
        (Change(_AGAIN_VALUE, _AGAIN_VALUE.replace(" | minus_zero", "")),),
        always=True,
    ),
    Mutant(
        "takes back the slot after",
        (Race, Deadlock),
        (Change(_AGAIN_SLOT, "slot(step + LAP + 1)"),),
        always=True,
    ),
    Mutant(
        "takes back what may be read",
        (Race, Deadlock),
        (Change(_AGAIN, "if step > 1:"), Change(_AGAIN_SLOT, "slot(step - 1)")),
    ),
    Mutant(
        "takes back right before it is polled",
        (Race, Deadlock),
        (
            Change(_AGAIN, "if step >= 2 * LAP:"),
            Change(_AGAIN_SLOT, "slot(step + 1)"),
        ),
        always=True,
        lap=3,  # in a lap of two steps a barrier would lie between
    ),
    Mutant(
        "no lap is waited for",
        (Race,),
        (Change("tl.where(step % LAP == 0,", "tl.where(step < 0,"),),
        always=True,
    ),
    Mutant(
        "the first lap is not waited for",
        (Race,),
        (Change("step % LAP == 0,", "(step % LAP == 0) & (step > 2 * LAP),"),),
        always=True,
    ),
    Mutant(
        "arrives at no lap",
        (Deadlock,),
        (Change("if tl.cast(step, tl.int32) % LAP == 0:", "if tl.cast(step, tl.int32) < 0:"),),
        always=True,
    ),
    Mutant(
        "the ring is not filled",
        (Race, WrongResult),
        (
            Change(
                "torch.full((count, groups, *ring_shape), fill",
                "torch.zeros((count, groups, *ring_shape)",
            ),
        ),
        always=True,
    ),
    Mutant(
        "units that nobody owns are polled",
        (Deadlock,),
        (Change("ring.as_strided(shape, stride, offset).zero_()", "pass"),),
        always=True,
    ),
)

_PAIRS = {"dtype": torch.float16, "pairwise": True}
_HALVES = {"dtype": torch.bfloat16, "pairwise": False}
POLLS = (
    Mutant(
        "no poll",
        (WrongResult, Race),
        (Change("@!missing bra DONE;", "bra DONE;"),),
    ),
    Mutant(
        "looks at one vector",
        (WrongResult, Race, Deadlock),
        (Change(_LAST_VECTOR, "for n in vectors[:0]:"),),
    ),
    Mutant(
        "asks for all but one again",
        (Deadlock,),
        (Change('{load(n)}" for n in vectors]', '{load(n)}" for n in vectors[1:]]'),),
    ),
    Mutant(
        "asks for what is there",
        (Deadlock,),
        (Change('f"@late{n} {load(n)}"', 'f"@!late{n} {load(n)}"'),),
    ),
    Mutant(
        "looks at three words of four",
        (WrongResult, Race),
        (Change('"min.s32 x, {3}, {4};"', '"min.s32 x, {3}, {3};"'),),
    ),
    Mutant(
        "looks at three pairs of four",
        (WrongResult, Race),
        (Change('"min.s16x2 x, {3}, {4};"', '"min.s16x2 x, {3}, {3};"'),),
        **_PAIRS,
    ),
    Mutant(
        "waits only for what lacks both halves",
        (WrongResult, Race),
        (Change('"min.s16x2 x, x, {0};"', '"mov.b32 x, {0};"'),),
        **_PAIRS,
    ),
    Mutant(
        "looks at three words of four, bit by bit",
        (WrongResult, Race),
        (Change("for i in range(1, 5):", "for i in range(1, 4):"),),
        **_HALVES,
    ),
    *(
        Mutant(
            f"forgets the {name} half",
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
        (),
        (Change('*(f"mov.b32 {word}, {nan};" for vector in words for word in vector)', "*()"),),
    ),
    Mutant(
        "tells nobody",
        (),
        (Change('f"st.relaxed.gpu.global.b32 {gave_up}, ${step};",', ""),),
    ),
    Mutant(
        "listens to nobody",
        (),
        (Change('"setp.ne.s32 missing, told, 0;"', '"setp.ne.s32 missing, 0, 0;"'),),
    ),
    Mutant(
        "reports nothing", (), (Change("tl.store(channel.error, step, mask=step != 0)", "pass"),)
    ),
)

# Mistakes of a caller, made in roundtrip.py.
_PUBLISH = "sync.publish(channel, (h,), t + 2, T + 1, SLOT=SLOT"
_ARRIVALS = "sync.arrivals(t + 1, "
_HALF = "channel._replace(stored=(channel.stored[0] // 2 * 2,) + channel.stored[1:])"
CALLER = (
    Mutant(
        "waits for the lap after a poll that needs it",
        (Race,),
        kernel=(Change(_ARRIVALS, "sync.arrivals(tl.maximum(t - 1, 1), "),),
        always=True,
    ),
    Mutant(
        "the last step is not taken back",
        (Race,),
        kernel=(Change(_PUBLISH, _PUBLISH.replace("T + 1", "T")),),
        always=True,
    ),
    Mutant(
        "publishes less than is read",
        (WrongResult, Deadlock, Race),
        kernel=(Change(_PUBLISH, f"channel = {_HALF}\n        {_PUBLISH}"),),
        always=True,
    ),
    Mutant(
        "publishes another step",
        (WrongResult, Deadlock, Race),
        kernel=(Change(_PUBLISH, _PUBLISH.replace("t + 2", "t + 3")),),
        always=True,
    ),
    Mutant(
        "reads the slot of the step after",
        (WrongResult, Deadlock, Race),
        kernel=(Change("sync.slot(t + 1)", "sync.slot(t + 2)"),),
        always=True,
    ),
)

# Mistakes of the time loops, made in kernels/matmul.py, scan_forward.py and scan_backward.py.
MATMUL = (
    Mutant(
        "waits for the lap after a poll that needs it",
        (Race,),
        kernel=(Change("sync.arrivals(step,", "sync.arrivals(tl.maximum(step - 2, 1),"),),
        always=True,
    ),
    Mutant(
        "reads the slot of the step after",
        (Deadlock,),
        kernel=(Change("sync.slot(step)", "sync.slot(step + 1)"),),
        always=True,
    ),
)
_LAST = "    last = T * ROUND + FIRST\n"
FORWARD = (
    Mutant(
        "forward publishes less than is polled",
        (Race, Deadlock),
        kernel=(Change("channel, found, step", f"{_HALF}, found, step"),),
        always=True,
    ),
    Mutant(
        "forward does not take the last steps back",
        (Race,),
        kernel=(Change(_LAST, _LAST.replace("+ FIRST", "- 1")),),
        always=True,
    ),
)
_GIVEN = "channel, given, weights[s], exchanged + (ROUND if s == 0 else COUNT - s), last"
BACKWARD = (
    Mutant(
        "backward publishes less than is polled",
        (Deadlock,),
        kernel=(Change(_GIVEN, _GIVEN.replace("given", "given[1:]")),),
        always=True,
    ),
    Mutant(
        "backward does not take the last step back",
        (Race,),
        kernel=(Change(_LAST, _LAST.replace(" + FIRST", "")),),
        always=True,
    ),
)

# Mistakes between the stages of a cell.
_PUBLISHED = "channel, planes, tile, exchanged + s, last"
_RECEIVED = "tile,\n                exchanged + s, BODY"
_PASSED = "exchanged + (COUNT - 1 - s),"
STAGES = {
    "scan_forward": (
        Mutant(
            "a stage publishes nothing",
            (Deadlock,),
            kernel=(
                Change(
                    "if PLAN.exchanged:\n                    publish_tiles(",
                    "if not PLAN.exchanged:\n                    publish_tiles(",
                ),
            ),
            always=True,
        ),
        Mutant(
            "a stage publishes as the one before",
            (Race, Deadlock),
            kernel=(Change(_PUBLISHED, _PUBLISHED.replace("+ s", "")),),
            always=True,
        ),
        Mutant(
            "a stage receives what was published for the one before",
            (Race, WrongResult),
            kernel=(Change(_RECEIVED, _RECEIVED.replace("+ s", "")),),
            always=True,
        ),
        Mutant(
            "a stage publishes its values without a product's",
            (WrongResult,),
            kernel=(Change("planes = to_exchange(new,", "planes = to_exchange(state,"),),
            always=True,
        ),
    ),
    "scan_backward": (
        Mutant(
            "a stage's planes lie as those of another",
            (Race, Deadlock),
            kernel=(Change("block_k, STAGE=STAGE)", "block_k, STAGE=0)"),),
            always=True,
        ),
        Mutant(
            "a stage passes back what another was given",
            (Race, Deadlock, WrongResult),
            kernel=(Change(_PASSED, "exchanged,"),),
            always=True,
        ),
        Mutant(
            "a stage's product passes nothing back",
            (WrongResult,),
            kernel=(Change("(d_values[i] + x,)", "(d_values[i],)"),),
            always=True,
        ),
    ),
    "launch": (
        Mutant(
            "the ring is laid out for the stages in another order",
            (Race, Deadlock),
            kernel=(Change("(stages[0], *stages[:0:-1])", "stages[::-1]"),),
            always=True,
        ),
    ),
}

# Mistakes with the means that a stage receives.
MEANS = {
    "scan_forward": (
        Mutant(
            "a stage publishes one plane of two",
            (Deadlock,),
            kernel=(Change("for i in tl.static_range(PLANES):", "for i in tl.static_range(1):"),),
            always=True,
        ),
        Mutant(
            "the planes lie as those of the first stage",
            (Race, Deadlock, WrongResult),
            kernel=(
                Change(
                    "exchanged + s, last, STAGE=s, STAGES", "exchanged + s, last, STAGE=0, STAGES"
                ),
            ),
            always=True,
        ),
    ),
    "scan_backward": (
        Mutant(
            "only the first mean passes back",
            (WrongResult,),
            kernel=(Change("COUNT: tl.constexpr = len(product)", "COUNT: tl.constexpr = 1"),),
            always=True,
        ),
    ),
    "matmul": (
        Mutant(
            "the sum of a chunk replaces those before",
            (WrongResult,),
            kernel=(Change("total = totals[PLANE]", "total = totals[PLANE] * 0"),),
            always=True,
        ),
        Mutant(
            "a sum is not divided",
            (WrongResult,),
            kernel=(Change("(sums[i] * (1.0 / STAGE.k),)", "(sums[i],)"),),
            always=True,
        ),
    ),
}

SYNC = (*ARRIVALS, *SLOTS, *POLLS)
