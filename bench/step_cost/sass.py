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
ARRIVALS = ("RED", "REDG", "ATOM", "ATOMG")


@dataclass(frozen=True)
class Instruction:
    """Attributes:
    text: without its predicate.
    stall: clocks until the warp's next instruction.
    write, read: the barrier that its result, or its reading, releases; 7 for none.
    wait: bits of the barriers that it waits for.
    poll: it reads a counter with acquire: a strong load with an invalidation of L1 behind it.
    """

    address: int
    predicate: str | None
    text: str
    stall: int = 1
    write: int = NO_BARRIER
    read: int = NO_BARRIER
    wait: int = 0
    poll: bool = False

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
    def is_fence(self) -> bool:
        """Orders what other programs see."""
        return self.name == "MEMBAR" and re.search("GPU|SYS", self.op) is not None

    @property
    def is_strong(self) -> bool:
        return ".STRONG." in self.op + "."

    @property
    def is_ring_load(self) -> bool:
        """Of what other programs have stored: past L1, and not the counter."""
        return self.name in ("LDG", "LD") and self.is_strong and not self.poll

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
        leader: of the warp whose thread signals and polls for all.
        other: of the other warps.
        once: `leader` with one turn of the inner loop over K.
        in_k: addresses of the instructions of that loop.
    near: of the loads of weights, which L2 has, as every step reads them.
        spin_barriers: block barriers inside of loops that wait for other programs.
    """

    leader: tuple[Instruction, ...]
    other: tuple[Instruction, ...]
    once: tuple[Instruction, ...]
    in_k: frozenset[int]
    near: frozenset[int]
    spin_barriers: int

    def counts(self) -> Counter[str]:
        return Counter(i.name for i in self.leader)


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
            poll=code[n].name in ("LDG", "LD")
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


def time_loop(text: str, protocol: str | None, trips: int = 1, k_products: int = 0) -> TimeLoop:
    """The longest loop.

    A spin loop is left as soon as it can be: what it costs depends on the other programs. It is
    run once where nothing else reads what they say.

    Args:
        protocol: of the exchange; None where nothing is exchanged.
        trips: turns of the inner loop over K.
        k_products: products in one of these turns, before the assembler unrolled the loop.
    """
    code, jumps = parse(text)
    shape = flow.graph(len(code), jumps)
    loop = flow.longest(shape)

    def inside(blocks) -> list[Instruction]:
        return [code[n] for b in sorted(blocks) for n in shape.blocks[b]]

    def products(blocks) -> int:
        names = (*PRODUCTS, "FFMA", "FFMA2")
        return sum(i.name in names for i in inside(blocks))

    waits = [inner for inner in loop.inner if not products(inner.blocks)]
    if protocol not in (None, "counter"):
        # With polled data, a counter is waited for once in many steps.
        waits = [w for w in waits if not any(i.poll for i in inside(w.blocks))]
    spins = {b for inner in waits for b in inner.blocks}
    signals = {b for b in loop.blocks if any(i.name in ARRIVALS or i.is_fence for i in inside([b]))}
    polled = protocol not in (None, "counter")
    meetings = {b: sum(i.name == "BAR" or i.poll for i in inside([b])) for b in loop.blocks}

    def turns(inner: flow.Loop) -> int:
        found = products(inner.blocks)
        return 0 if not found else max(1, round(trips * (k_products or found) / found))

    def way(leads: bool, times) -> list[Instruction]:
        # Only the leader signals. With polled data nobody does, nor do warps meet for it, except
        # once in many steps.
        shunned = set() if leads and protocol == "counter" else signals

        def worth(spin: float):
            def of(block: int) -> float:
                if block in spins:
                    return spin
                if block in shunned:
                    return -1e6
                return len(shape.blocks[block]) - 1e6 * meetings[block] * polled

            return of

        found = [code[n] for n in flow.path(shape, loop, worth(-1e6), times)]
        polls = [i for i in found if i.poll or (protocol != "counter" and i.is_ring_load)]
        if leads and protocol is not None and not polls:
            found = [code[n] for n in flow.path(shape, loop, worth(1e9), times)]
        return found

    k_loops = [inner for inner in loop.inner if products(inner.blocks)]
    in_k = frozenset(i.address for inner in k_loops for i in inside(inner.blocks))
    once = tuple(way(True, lambda inner: bool(products(inner.blocks))))
    return TimeLoop(
        leader=tuple(way(True, turns)),
        # Polled data are read by every warp; a counter is polled by one.
        other=tuple(way(protocol != "counter", turns)),
        once=once,
        in_k=in_k,
        near=near(once, in_k),
        spin_barriers=sum(i.name == "BAR" for i in inside(spins)),
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


def near(step: tuple[Instruction, ...], in_k: frozenset[int]) -> frozenset[int]:
    """Loads in the inner loop over K, or between the loads of the ring and the last product."""
    found, since = set(in_k), None
    for i in step:
        if i.is_ring_load and since is None:
            since = set()
        elif i.poll or i.is_publication:
            since = None
        elif i.is_plain_load and since is not None:
            since.add(i.address)
        elif i.name in PRODUCTS and since is not None:
            found |= since
    return frozenset(found)


def early_consumers(step: tuple[Instruction, ...]) -> list[Instruction]:
    """The loads from global memory, other than of the exchange, that are issued behind a product
    and waited for before the step waits for other programs again: nothing hides how long they take.

    A step begins again where it ends, so a load may be waited for in the next one.
    """
    polls = [n for n, i in enumerate(step) if i.poll or i.is_ring_load]
    if not polls:
        return []
    found, fixed, outstanding = [], [], {}
    behind_a_product = False
    # From behind the first wait round to it again.
    for i in step[polls[0] + 1 :] + step[: polls[0]]:
        for barrier in [b for b in outstanding if i.wait >> b & 1]:
            found += outstanding.pop(barrier)
        if i.name in PRODUCTS:
            # What was fetched until here belongs to the product: weights.
            behind_a_product, outstanding, found = True, {}, [f for f in found if f in fixed]
        elif i.poll or i.is_ring_load:
            behind_a_product, outstanding = False, {}
            fixed = list(found)
        if behind_a_product and i.is_plain_load and i.write != NO_BARRIER:
            outstanding.setdefault(i.write, []).append(i)
    return found
