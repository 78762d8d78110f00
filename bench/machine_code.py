"""The time loop of a compiled kernel: what one step of it executes, read from PTX and from SASS.

From the PTX come the bank conflicts of shared memory: the address of every access is computed for
every thread of a program, by following registers back to %tid.x and constants. Shared memory has
32 banks of 4 bytes and serves one *wavefront* a clock, a word of each bank. An access of up to 4
bytes a thread serves 32 threads together, one of 8 bytes 16, one of 16 bytes 8; each such group
takes as many wavefronts as the most different words in one bank. (CUDA C++ Programming Guide,
"Shared Memory".)

From the SASS (`nvdisasm -hex -c`) come order, waits and counts. Bits 105 to 121 of an instruction
of sm_80 and later say how it is scheduled: clocks until its warp issues the next one (stall), a
barrier that its result (write) or its reading of sources (read) releases, and the barriers that it
waits for first (wait), of six for each warp. (Jia et al., arXiv:1804.06826, section 2.1.)
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

BANKS = LANES = 32


# The step: loops and paths. An instruction is known by its number. Programs have a few dozen
# blocks, so nothing here minds the cost.


@dataclass(frozen=True)
class Jump:
    """What leaves straight-line code: `target` is an instruction's number, or None at an exit."""

    target: int | None
    conditional: bool


@dataclass(frozen=True)
class Loop:
    """Blocks that reach each other; `inner` are the loops within, entered after `header`."""

    header: int
    blocks: frozenset[int]
    inner: tuple[Loop, ...]


class Graph:
    """Straight runs (`blocks`) of `count` instructions, and the `successors` of each."""

    def __init__(self, count: int, jumps: dict[int, Jump]):
        firsts = {0} | {n + 1 for n in jumps if n + 1 < count}
        firsts |= {jump.target for jump in jumps.values() if jump.target is not None}
        starts = sorted(firsts)
        number = {first: block for block, first in enumerate(starts)}
        self.blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
        self.successors: list[list[int]] = []
        for block in self.blocks:
            jump = jumps.get(block[-1])
            following = []
            if jump is not None and jump.target is not None:
                following.append(number[jump.target])
            if (jump is None or jump.conditional) and block.stop < count:
                following.append(number[block.stop])
            self.successors.append(following)

    def loops(self, inside: Iterable[int] | None = None, cut: int | None = None) -> list[Loop]:
        """The outermost loops of the blocks `inside`, when no jump to the block `cut` counts."""
        inside = set(range(len(self.blocks)) if inside is None else inside)
        after = {b: [s for s in self.successors[b] if s in inside and s != cut] for b in inside}
        reach = {b: _reached(after, b) for b in inside}
        found, seen = [], set()
        for block in sorted(inside):
            if block in seen or block not in reach[block]:
                continue
            members = frozenset(b for b in reach[block] if block in reach[b])
            seen |= members
            entered = [
                b for b in sorted(members) for p, s in enumerate(self.successors)
                if b in s and p not in members
            ]  # fmt: skip
            header = entered[0] if entered else min(members)
            found.append(Loop(header, members, tuple(self.loops(members, header))))
        return found

    def instructions(self, *loops: Loop) -> frozenset[int]:
        return frozenset(n for loop in loops for b in loop.blocks for n in self.blocks[b])


def _reached(after: dict[int, list[int]], start: int) -> set[int]:
    found, open_ = set(), list(after[start])
    while open_:
        block = open_.pop()
        if block not in found:
            found.add(block)
            open_.extend(after[block])
    return found


def find_step(
    count: int, jumps: dict[int, Jump], products: Collection[int], rare: Collection[int]
) -> tuple[list[int], frozenset[int]]:
    """The instructions of a step of the time loop, in order; and those of its spins.

    The time loop is the outermost loop with most instructions, an inner loop is a spin. It is
    passed by where that can be done, and else left where it begins, as what it costs depends on
    the other programs.

    Args:
        count: of all instructions.
        products: those that multiply.
        rare: those that mark a way which most steps do not take, where there is another.
    Raises:
        ValueError: no loop at all, or products in an inner one, which would be no spin.
    """
    code = Graph(count, jumps)
    loop = max(code.loops(), key=lambda found: len(code.instructions(found)), default=None)
    if loop is None:
        raise ValueError("expected code with a loop over the steps, got code without a loop")
    spinning = code.instructions(*loop.inner)
    if spinning.intersection(products):
        raise ValueError("expected a step's products outside of inner loops, got some within")
    rare = frozenset(rare)
    loop_of = {b: inner for inner in loop.inner for b in inner.blocks}
    best: dict[int, tuple[float, list[int]] | None] = {}

    def worth(block: int) -> float:
        here = code.blocks[block]
        return len(here) - 1e6 * (len(rare.intersection(here)) + (here[0] in spinning))

    def through(block: int) -> tuple[float, list[int]] | None:
        """The best way from this block to the end of the turn; None where it leaves the loop."""
        if block in best:
            return best[block]
        inner = loop_of.get(block)
        following = set(code.successors[block]) - (inner.blocks if inner else frozenset())
        if inner and not following:
            raise ValueError("expected a spin that can be left where it begins, got another one")
        found = None
        for successor in sorted(following & loop.blocks):
            rest = (0.0, []) if successor == loop.header else through(successor)
            if rest is not None and (found is None or worth(block) + rest[0] > found[0]):
                found = (worth(block) + rest[0], [*code.blocks[block], *rest[1]])
        best[block] = found
        return found

    whole = through(loop.header)
    assert whole is not None, "a loop leads back to its header"
    return whole[1], spinning


# PTX.

# How programs arrive and wait for arrivals, which they do once in many steps. The barriers of all
# other steps cannot be passed by.
RARE = ("bar.", "atom.", "red.", "ld.acquire.")
# Their first operand is read.
NO_RESULT = ("st.", "stmatrix.", "red.", "bar.", "bra", "prefetch")


@dataclass(frozen=True)
class Access:
    """One access to shared memory, made by every warp.

    Attributes:
        name: the machine instruction, LDS or STS; of another access, the PTX's.
        width: bytes of a thread.
        wavefronts: of the warp with most of them; None where the address cannot be computed.
        ideal: wavefronts without conflicts.
        text: the statement.
    """

    name: str
    width: int
    wavefronts: int | None
    ideal: int
    text: str


@dataclass(frozen=True)
class Statement:
    text: str
    op: str
    operands: tuple[str, ...]
    predicate: str | None = None


class Unknown(Exception):
    """A register whose value does not follow from the thread's number."""


def parse_ptx(text: str) -> tuple[list[Statement], dict[int, Jump]]:
    """Statements and jumps of the PTX of one kernel."""
    statements: list[Statement] = []
    # A label within the braces of an asm block may come again in the next one.
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    scopes: list[tuple[int, ...]] = []
    scope, opened = (), 0
    for line in text.splitlines():
        for piece in re.split(r";|(?<=:)\s", line.split("//")[0]):
            piece = piece.strip()
            if re.match(r"\{\s*([@.a-z]|$)", piece):  # no list of registers
                opened += 1
                scope, piece = (*scope, opened), piece[1:].strip()
            elif piece == "}":
                scope = scope[:-1]
            label = re.match(r"^([$\w]+):$", piece)
            m = re.match(r"^(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", piece)
            if label:
                labels[scope, label[1]] = len(statements)
            elif m:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+", m[3] or "")
                scopes.append(scope)
                statements.append(Statement(piece, m[2], tuple(operands), m[1]))
    jumps = {}
    for n, (statement, scope) in enumerate(zip(statements, scopes, strict=True)):
        name, target = statement.op.split(".")[0], None
        if name == "bra":
            around = (
                (scope[:depth], statement.operands[-1]) for depth in range(len(scope), -1, -1)
            )
            target = next(labels[label] for label in around if label in labels)
        if name in ("bra", "ret", "exit"):
            jumps[n] = Jump(target, statement.predicate is not None)
    return statements, jumps


def accesses(text: str, threads: int) -> list[Access]:
    """The accesses to shared memory of one step of a program of so many threads, in order."""
    statements, jumps = parse_ptx(text)
    # A jump beyond the last statement would have nowhere to go.
    statements.append(Statement("end", "ret", ()))

    def those(*ops: str) -> list[int]:
        return [n for n, statement in enumerate(statements) if statement.op.startswith(ops)]

    products = those("mma.", "wgmma.mma", "tcgen05.mma", "fma.")
    step, _ = find_step(len(statements), jumps, products, those(*RARE))
    registers = Registers(statements, threads)
    return [found for n in step if (found := _access(statements[n], registers))]


def _access(statement: Statement, registers: Registers) -> Access | None:
    """What a statement does to shared memory, or None."""
    name, *parts = statement.op.split(".")
    if name == "wgmma":
        return _operand_of_warp_group(statement, registers) if parts[0] == "mma_async" else None
    shared = any(part.startswith("shared") for part in parts)
    if not shared or name in ("mbarrier", "fence", "cvta", "mapa"):
        return None
    if name == "ldmatrix" and "trans" not in parts and "x4" in parts:
        return _load_of_matrices(statement, registers)
    if name not in ("ld", "st"):
        return Access(name, 4, None, 1, statement.text)
    vector = next((int(p[1:]) for p in parts if re.match(r"v\d$", p)), 1)
    width = vector * int(re.sub(r"\D", "", parts[-1])) // 8
    name = {"ld": "LDS", "st": "STS"}[name]
    try:
        where = registers.address(next(o for o in statement.operands if o.startswith("[")))
    except Unknown:
        return Access(name, width, None, max(1, width // 4), statement.text)
    group = min(LANES, LANES * 4 // width)
    waves = [
        sum(_wavefronts(lanes[k : k + group], width) for k in range(0, LANES, group))
        for lanes in where.tolist()
    ]
    return Access(name, width, max(waves), LANES // group, statement.text)


def _load_of_matrices(statement: Statement, registers: Registers) -> Access:
    """Four matrices of eight rows of 16 bytes, a row from where each lane says."""
    try:
        where = registers.address(statement.operands[-1])
    except Unknown:
        return Access("LDSM", 16, None, 4, statement.text)
    waves = [
        sum(_wavefronts(lanes[k : k + 8], 16) for k in range(0, LANES, 8))
        for lanes in where.tolist()
    ]
    return Access("LDSM", 16, max(waves), 4, statement.text)


def _operand_of_warp_group(statement: Statement, registers: Registers) -> Access:
    """The right operand, which the four warps of a group share: N columns of 32 bytes. Swizzled by
    128 bytes, eight columns touch every bank once."""
    columns = int(re.search(r"n(\d+)k", statement.op)[1])  # type: ignore[index]
    ideal = columns * 32 / 128 / 4
    try:
        swizzles = registers.value(statement.operands[2]).view(np.uint64) >> np.uint64(62)
    except Unknown:
        swizzles = np.zeros(1)
    known = bool((swizzles == 1).all())
    return Access("HGMMA", 4, ideal if known else None, ideal, statement.text)


def _wavefronts(addresses: list[int], width: int) -> int:
    """Of threads that are served together."""
    words = {w for a in addresses for w in range(a // 4, (a + width - 1) // 4 + 1)}
    banks = [word % BANKS for word in words]
    return max(map(banks.count, banks))


class Registers:
    """Values of registers, for all threads of a program: int64 arrays [warps, 32]."""

    def __init__(self, statements: list[Statement], threads: int):
        self.definitions: dict[str, list[Statement]] = defaultdict(list)
        for statement in statements:
            if statement.operands and not statement.op.startswith(NO_RESULT):
                for name in re.findall(r"[%\w.]+", statement.operands[0]):
                    self.definitions[name].append(statement)
        # All of a program's shared memory starts at 0.
        lanes = np.arange(threads).reshape(-1, LANES)
        self.known = {"%tid.x": lanes, "global_smem": np.zeros_like(lanes)}
        self.open: set[str] = set()

    def address(self, operand: str) -> np.ndarray:
        """Of `[register + offset]`, for each lane of each warp."""
        return sum(self.value(term.strip()) for term in operand.strip("[] ").split("+"))

    def value(self, name: str) -> np.ndarray:
        """Raises Unknown where it does not follow from the thread's number."""
        if re.match(r"^-?(0[xX][0-9a-fA-F]+|\d+)$", name):
            number = (int(name, 0) + (1 << 63)) % (1 << 64) - (1 << 63)  # as a signed one
            return np.full_like(self.known["%tid.x"], number)
        if name not in self.known:
            if name in self.open or not self.definitions[name]:
                raise Unknown(name)
            self.open.add(name)
            try:
                values = [self._define(statement) for statement in self.definitions[name]]
            finally:
                self.open.discard(name)
            if any((other != values[0]).any() for other in values[1:]):
                raise Unknown(name)
            self.known[name] = values[0]
        return self.known[name]

    def _define(self, statement: Statement) -> np.ndarray:
        name, *parts = statement.op.split(".")
        if name in ("shr", "bfe", "cvt"):  # of the others, the low bits do not depend on the sign
            name += parts[-1][0]
        operation = OPERATIONS.get(name)
        other = {"hi", "wide", "bfly"} & {*parts}
        if operation is None or statement.predicate is not None or other:
            raise Unknown(statement.text)
        bits = int(re.sub(r"\D", "", parts[-1]))
        result = operation(*(self.value(o) for o in statement.operands[1:]))
        return result & ((1 << bits) - 1) if bits < 64 else result


OPERATIONS = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shru": lambda a, b: a >> b,
    "cvtu": lambda a: a,
    "shfl": lambda a, lane, *_: np.take_along_axis(a, lane % LANES, axis=1),
    "bfeu": lambda a, position, length: (a >> position) & ((1 << length) - 1),
    "bfes": lambda a, position, length: (a << (64 - position - length)) >> (64 - length),
}


# SASS.

NO_BARRIER = 7
PRODUCTS = ("HMMA", "HGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA")
ATOMICS = ("RED", "REDG", "ATOM", "ATOMG")
LOADS, STORES = ("LDG", "LD"), ("STG", "ST")


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
        return self.name in LOADS and self.is_strong and not self.acquires

    @property
    def is_publication(self) -> bool:
        """A store for other programs."""
        return self.name in STORES and self.is_strong

    @property
    def is_plain_load(self) -> bool:
        return self.name in LOADS and not self.is_strong


def parse_sass(text: str) -> tuple[list[Instruction], dict[int, Jump]]:
    """Instructions and jumps of the first function in the text.

    Raises:
        ValueError: not what nvdisasm -hex -c prints.
    """
    lines: list[tuple[int, str | None, str]] = []  # address, predicate, text
    labels: dict[str, int] = {}
    upper: list[int] = []
    line_of = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)[ ;]*/\* 0x[0-9a-f]{16} \*/"
    )
    for line in text.splitlines():
        label = re.match(r"^(\.L_\w+):", line.strip())
        m = line_of.match(line)
        bits = re.match(r"^\s*/\* 0x([0-9a-f]{16}) \*/", line)
        if label:
            labels[label[1]] = len(lines)
        elif m:
            if lines and int(m[1], 16) <= lines[-1][0]:
                break  # another function
            lines.append((int(m[1], 16), m[2], m[3]))
        elif bits and lines:
            upper.append(int(bits[1], 16) >> 41)
    if not lines or len(upper) < len(lines):
        raise ValueError(
            f"expected what `nvdisasm -hex -c` prints, got {len(lines)} instructions and "
            f"{len(upper)} upper halves"
        )
    code = []
    for n, (line, control) in enumerate(zip(lines, upper, strict=False)):
        invalidates = n + 1 < len(lines) and lines[n + 1][2].startswith("CCTL.IVALL")
        strong_load = re.match(r"LDG?\b.*\.STRONG\.", line[2].split()[0]) is not None
        code.append(
            Instruction(
                *line, stall=control & 15, write=control >> 5 & 7, read=control >> 8 & 7,
                wait=control >> 11 & 63, acquires=strong_load and invalidates,
            )
        )  # fmt: skip
    jumps = {}
    for n, i in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", i.text)
        if i.name == "BRA" and target:
            operands = i.text.split("`")[0].split()[1:]
            conditional = i.predicate is not None or any(re.match(r"!?U?P\d", o) for o in operands)
            jumps[n] = Jump(labels[target[1]], conditional)
        elif i.name in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            jumps[n] = Jump(None, i.predicate is not None)
    return code, jumps


Step = tuple[Instruction, ...]


def sass_step(text: str) -> tuple[Step, int]:
    """The instructions of a step in the order in which a warp runs them; and how many block
    barriers there are inside of spins."""
    code, jumps = parse_sass(text)
    products = [n for n, i in enumerate(code) if i.name in (*PRODUCTS, "FFMA", "FFMA2")]
    rare = [n for n, i in enumerate(code) if i.name == "BAR" or i.orders]
    step, spinning = find_step(len(code), jumps, products, rare)
    return tuple(code[n] for n in step), sum(code[n].name == "BAR" for n in spinning)


def serial_waits(step: Step) -> int:
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


def near(step: Step) -> frozenset[int]:
    """Addresses of the loads that a product may wait for: of weights, which L2 has. They are read 8
    bytes at a time between a stage's first load of the ring and its last product; what the cell
    needs, an element at a time."""
    parts = [halves(part)[0] for part in between_publications(step)]
    return frozenset(
        i.address for part in parts for i in part if i.is_plain_load and ".64" in i.text.split()[0]
    )


def between_publications(step: Step) -> list[Step]:
    """The step, cut where a stage hands its values to the others."""
    cuts = [n for n, i in enumerate(step) if i.is_publication]
    return [step[a:b] for a, b in itertools.pairwise([0, *cuts, len(step)])]


def early_consumers(step: Step) -> list[Instruction]:
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


def halves(step: Step) -> tuple[Step, ...]:
    """From the first load of the ring to the last product, and from there to the first load of the
    next step, which begins where this one ends; nothing where nothing is exchanged."""
    loads = [n for n, i in enumerate(step) if i.is_ring_load]
    products = [n for n, i in enumerate(step) if i.name in PRODUCTS]
    if not loads or not products:
        return (), ()
    first, last = loads[0], products[-1]
    return step[first:last], step[last:] + step[:first]
