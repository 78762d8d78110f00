"""The time loop of machine code (SASS), read from `nvdisasm -hex -c`.

An instruction of sm_80 and later has 128 bits. Bits 105 to 121 say how it is scheduled: clocks
until its warp issues the next instruction (stall), a barrier that its result (write) or its reading
of sources (read) releases, and the barriers that it waits for first (wait), of six for each warp.
A load is waited for where an instruction waits for the barrier that the load releases.
(Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
arXiv:1804.06826, section 2.1.)
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from bench.step_cost import flow

NO_BARRIER = 7
PRODUCTS = ("HMMA", "HGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA")
ATOMICS = ("RED", "REDG", "ATOM", "ATOMG")


@dataclass(frozen=True)
class Instruction:
    """Attributes:
    text: without its predicate.
    stall: clocks until the warp's next instruction.
    write, read: the barrier that its result, or its reading, releases; 7 for none.
    wait: bits of the barriers that it waits for.
    acquires: it is a strong load with an invalidation of L1 behind it.
    """

    address: int
    predicate: str | None
    text: str
    stall: int = 1
    write: int = NO_BARRIER
    read: int = NO_BARRIER
    wait: int = 0
    acquires: bool = False

    @property
    def op(self) -> str:
        return self.text.split()[0]

    @property
    def name(self) -> str:
        """The operation without its modifiers."""
        return self.op.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes of each thread that a load or store moves."""
        m = re.search(r"\.(?:[US](8|16)|(64|128|256))(?:\.|$)", self.op)
        return int(m[1] or m[2]) // 8 if m else 4

    @property
    def shared_width(self) -> int:
        """As `ptx.Access.width`."""
        if self.name in ("LDSM", "STSM"):
            m = re.search(r"\.([24])$", self.op)
            return 16 * int(m[1] if m else 1)
        return 0 if self.name == "HGMMA" else self.width

    @property
    def orders(self) -> bool:
        """What programs arrive and wait for arrivals with: fences, acquires and atomics."""
        fence = self.name == "MEMBAR" and re.search("GPU|SYS", self.op) is not None
        return fence or self.acquires or self.name in ATOMICS

    @property
    def is_strong(self) -> bool:
        return ".STRONG." in self.op + "."

    @property
    def is_ring_load(self) -> bool:
        """Of what other programs have stored: past L1, and no counter."""
        return self.name in ("LDG", "LD") and self.is_strong and not self.acquires

    @property
    def is_publication(self) -> bool:
        """A store for other programs."""
        return self.name in ("STG", "ST") and self.is_strong

    @property
    def is_plain_load(self) -> bool:
        return self.name in ("LDG", "LD") and not self.is_strong


@dataclass(frozen=True)
class TimeLoop:
    """One step of a warp: the instructions in the order in which they are run.

    Attributes:
        step: all of them.
        near: addresses of the loads of weights, which L2 has, as every step reads them.
        spin_barriers: block barriers inside of loops that wait for other programs.
    """

    step: tuple[Instruction, ...]
    near: frozenset[int]
    spin_barriers: int

    def counts(self) -> Counter[str]:
        return Counter(i.name for i in self.step)


def parse(text: str) -> tuple[list[Instruction], dict[int, flow.Jump]]:
    """Instructions and jumps of the first function in the text.

    Raises:
        ValueError: not what nvdisasm -hex -c prints.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    upper: list[int] = []
    line_of = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
    for line in text.splitlines():
        label = re.match(r"^(\.L_\w+):", line.strip())
        m = line_of.match(line)
        bits = re.match(r"^\s*/\* 0x([0-9a-f]{16}) \*/", line)
        if label:
            labels[label[1]] = len(code)
        elif m:
            address = int(m[1], 16)
            if code and address <= code[-1].address:
                break  # another function
            p = re.match(r"^(?:@(!?U?P\w+)\s+)?(.*)$", m[2].rstrip(" ;"))
            assert p
            code.append(Instruction(address, p[1], p[2]))
        elif bits and code:
            upper.append(int(bits[1], 16))
    if not code or len(upper) < len(code):
        raise ValueError(
            f"expected what `nvdisasm -hex -c` prints, got {len(code)} instructions and "
            f"{len(upper)} upper halves"
        )
    for n, high in enumerate(upper[: len(code)]):
        control = high >> 41
        follows = code[n + 1] if n + 1 < len(code) else None
        code[n] = replace(
            code[n],
            stall=control & 15,
            write=control >> 5 & 7,
            read=control >> 8 & 7,
            wait=control >> 11 & 63,
            acquires=code[n].name in ("LDG", "LD")
            and code[n].is_strong
            and follows is not None
            and follows.op == "CCTL.IVALL",
        )
    jumps = {}
    for n, i in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", i.text)
        if i.name == "BRA" and target:
            operands = i.text.split("`")[0].split()[1:]
            conditional = i.predicate is not None or any(re.match(r"!?U?P\d", o) for o in operands)
            jumps[n] = flow.Jump(labels[target[1]], conditional)
        elif i.name in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            jumps[n] = flow.Jump(None, i.predicate is not None)
    return code, jumps


def time_loop(text: str) -> TimeLoop:
    """The longest loop, without what it does once in many steps only: programs arrive, and wait for
    arrivals. The barriers of all other steps cannot be passed by."""
    code, jumps = parse(text)
    loop = flow.TimeLoop(
        flow.graph(len(code), jumps),
        [n for n, i in enumerate(code) if i.name in (*PRODUCTS, "FFMA", "FFMA2")],
        [n for n, i in enumerate(code) if i.name == "BAR" or i.orders],
    )

    step = tuple(code[n] for n in loop.step())
    return TimeLoop(
        step=step,
        near=near(step),
        spin_barriers=sum(code[n].name == "BAR" for n in loop.spinning),
    )


def serial_waits(step: tuple[Instruction, ...]) -> int:
    """How often a load of the ring is issued only after another one's result was waited for: the
    trips to L2 that follow one another, less one."""
    waits, outstanding, waited = 0, 0, False
    for i in step:
        waited = waited or bool(outstanding & i.wait)
        outstanding &= ~i.wait
        if i.is_ring_load:
            waits += waited
            waited = False
            if i.write != NO_BARRIER:
                outstanding |= 1 << i.write
    return waits


def near(step: tuple[Instruction, ...]) -> frozenset[int]:
    """The loads that a product may wait for."""
    return frozenset(i.address for i in halves(step)[0] if i.is_plain_load)


def early_consumers(step: tuple[Instruction, ...]) -> list[Instruction]:
    """The loads from global memory, other than of the exchange, that are issued behind the last
    product and waited for before the step waits for other programs again: nothing hides how long
    they take."""
    found, outstanding = [], {}
    for i in halves(step)[1]:
        for barrier in [b for b in outstanding if i.wait >> b & 1]:
            found += outstanding.pop(barrier)
        if i.is_plain_load and i.write != NO_BARRIER:
            outstanding.setdefault(i.write, []).append(i)
    return found


def halves(step: tuple[Instruction, ...]) -> tuple[tuple[Instruction, ...], ...]:
    """From the first load of the ring to the last product, and from there to the first load of the
    next step, which begins where this one ends; nothing where nothing is exchanged."""
    loads = [n for n, i in enumerate(step) if i.is_ring_load]
    products = [n for n, i in enumerate(step) if i.name in PRODUCTS]
    if not loads or not products:
        return (), ()
    first, last = loads[0], products[-1]
    return step[first:last], step[last:] + step[:first]
