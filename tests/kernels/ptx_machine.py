"""Executes the PTX of a kernel on the CPU, so that compiled code can be tested without a GPU.

Every program of the grid has its own registers, shared memory and threads; the threads run in
lock step, those with the lowest program counter first, so that they meet again where their paths
do. Programs take turns in an order drawn from a seed: whoever is about to do something that others
may see or wait for (an atomic, a relaxed or ordered access, a barrier) may have to let others go
first. Global memory is that of tensors on the host, at their own addresses; an access beside them,
beside shared memory, or not aligned is an error, and so is an instruction that is not known here.

What a GPU computes approximately (ex2.approx, div.full, the sums in tensor cores) is computed at
least as exactly as it does. Stores are seen by everyone at once: what may be reordered is for the
tests of `sync`, not for these. But what warp groups multiply (wgmma) must have been made visible to
them, and must not be touched until they have been waited for.

(Instructions, and which lane holds what of a matrix: PTX ISA, "Instruction Set", "Matrix
Fragments for mma.m16n8k16", "... for mma.m16n8k8", "ldmatrix", "stmatrix", "Asynchronous
Warpgroup Level Matrix Instructions", "Matrix Descriptor Format".)
"""

from __future__ import annotations

import functools
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Array = np.ndarray
WARP = 32
GROUP = 4 * WARP  # a warp group


class UnknownInstruction(Exception):
    """PTX that this machine cannot execute; names it."""


class BadAccess(Exception):
    """An access to memory that is not there, or not aligned."""


class Diverged(Exception):
    """Threads that an instruction needs together are not together."""


class NotVisible(Exception):
    """A product of a warp group takes what no fence has shown to it."""


class InUse(Exception):
    """An access to what belongs to a product that has not been waited for."""


class Stuck(Exception):
    """The programs took more turns than they may."""


# --- parsing -----------------------------------------------------------------------------------


class Instruction(NamedTuple):
    guard: str | None  # register of the predicate
    negated: bool
    opcode: str
    operands: list[str]
    text: str


@dataclass
class Code:
    """A kernel.

    Attributes:
        labels: index of the instruction that follows.
        registers: bits of each, 1 for predicates.
        parameters: their names, in order.
    """

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    threads: int = 0


_STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+):|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_WORD = re.compile(r"(?<![.%$\w])[%$\w]+")  # not the x of %tid.x
_REGISTERS = re.compile(r"([%$\w]+)(?:<(\d+)>)?")


def parse(ptx: str) -> Code:
    """The one kernel in a text of PTX. Names in braces, as in inline assembly, are their own."""
    code = Code()
    entry = ptx.index(".entry")
    begin = ptx.index("\n{", entry)
    header = ptx[entry:begin]
    code.parameters = re.findall(r"\.param\s[^,)]*?(\w+)\s*(?=[,)\n])", header)
    code.threads = int(re.search(r"\.reqntid\s+(\d+)", header)[1])  # type: ignore[index]
    body = re.sub(r"//[^\n]*|^\s*\.loc\s[^\n]*", "", ptx[begin:], flags=re.MULTILINE)

    scopes: list[dict[str, str]] = []  # open ones: names to unique names
    found: list[tuple[list[dict[str, str]], str]] = []
    position = 0
    while True:
        match = _STATEMENT.match(body, position)
        if match is None:
            raise UnknownInstruction(body[position : position + 80].strip())
        position = match.end()
        brace, label, text = match.groups()
        if brace == "{":
            scopes = [*scopes, {}]
        elif brace == "}":
            scopes = scopes[:-1]
            if not scopes:
                break
        elif label is not None:
            code.labels[_declare(label, scopes, position)] = len(found)
        elif text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            bits = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
            for name, count in _REGISTERS.findall(names):
                for full in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    code.registers[_declare(full, scopes, position)] = bits
        elif not text.startswith(".pragma"):
            found.append((scopes, " ".join(text.split())))

    for scopes, text in found:
        match = _INSTRUCTION.fullmatch(text)
        if match is None:
            raise UnknownInstruction(text)
        negation, guard, opcode, operands = match.groups()

        def own(word: re.Match, scopes=scopes) -> str:
            return next((s[word[0]] for s in reversed(scopes) if word[0] in s), word[0])

        def rename(text: str, own=own) -> str:
            return _WORD.sub(own, text)

        code.instructions.append(
            Instruction(
                rename(guard) if guard else None,
                bool(negation),
                opcode,
                split_operands(rename(operands)),
                text,
            )
        )
    return code


def _declare(name: str, scopes: list[dict[str, str]], position: int) -> str:
    # The outermost braces are the kernel's own.
    unique = name if len(scopes) == 1 else f"{name}__{position}"
    scopes[-1][name] = unique
    return unique


def split_operands(text: str) -> list[str]:
    """At commas that are not in braces or brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def names(operand: str) -> list[str]:
    """The registers of a vector, or of a single one."""
    return split_operands(operand.strip("{} "))


# --- numbers -----------------------------------------------------------------------------------

PAIR = np.dtype([("low", np.uint64), ("high", np.uint64)])  # of 128 bits, which are only moved
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: PAIR}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


@functools.cache
def bits_of(kind: str) -> int:
    """Of "s32" 32, of "f16x2" 32, of "pred" 1."""
    if kind == "pred":
        return 1
    match = re.fullmatch(r"(?:[busf]|bf)(\d+)(x2)?", kind)
    if match is None or int(match[1]) not in UNSIGNED:
        raise UnknownInstruction(kind)
    return int(match[1]) * (2 if match[2] else 1)


def decode(raw: Array, kind: str) -> Array:
    """Numbers of the bits in a register; two of them, in a last axis, for packed kinds."""
    if kind.endswith("x2"):
        half = kind[:-2]
        return decode(np.ascontiguousarray(raw).view(UNSIGNED[bits_of(half)]).reshape(-1, 2), half)
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if kind[0] == "s":
        return raw.view(SIGNED[bits_of(kind)])
    if kind[0] == "f":
        return raw.view(FLOAT[bits_of(kind)])
    return raw


def encode(number: Array, kind: str) -> Array:
    """The bits of numbers: the inverse of `decode`, rounding to nearest even."""
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(encode(number, kind[:-2]))
        return halves.view(UNSIGNED[bits_of(kind)]).reshape(-1)
    if kind == "bf16":
        word = np.ascontiguousarray(number, np.float32).view(np.uint32)
        rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16
        return np.where(np.isnan(number), 0x7FFF, rounded).astype(np.uint16)
    if kind[0] == "f":
        return np.asarray(number, FLOAT[bits_of(kind)]).view(UNSIGNED[bits_of(kind)])
    return np.asarray(number).astype(UNSIGNED[bits_of(kind)])


# --- memory ------------------------------------------------------------------------------------


class Memory:
    """Pieces of memory, each at its address."""

    def __init__(self, pieces: dict[int, Array]):
        """pieces: address to bytes, uint8."""
        self.starts = np.array(sorted(pieces), np.int64)
        self.pieces = [pieces[start] for start in self.starts]

    def _places(self, address: Array, size: int, what: str):
        """For each piece that is accessed: which accesses, its words, and the places there."""
        piece = np.searchsorted(self.starts, address, side="right") - 1
        for i in np.unique(piece):
            which = np.flatnonzero(piece == i)
            place = address[which] - self.starts[i]
            beyond = i < 0 or int(place.max()) + size > self.pieces[i].size
            if beyond or (address[which] % size).any() or self.starts[i] % size:
                raise BadAccess(f"{what}: {size} bytes at {address[which].tolist()}")
            words = self.pieces[i][: self.pieces[i].size // size * size]
            yield which, words.view(UNSIGNED[8 * size]), place // size

    def load(self, address: Array, size: int, what: str) -> Array:
        result = np.empty(address.shape, UNSIGNED[8 * size])
        for which, words, place in self._places(address, size, what):
            result[which] = words[place]
        return result

    def store(self, address: Array, value: Array, what: str) -> None:
        for which, words, place in self._places(address, value.itemsize, what):
            words[place] = value[which]


class Shared(Memory):
    """Shared memory of a program, for its threads and for its warp groups' products.

    Attributes:
        unseen: which 16 bytes have been stored to since the last fence for products.
        reading: of each warp group, the last batch of products that reads each 16 bytes; 0 if none
            or waited for.
    """

    def __init__(self, size: int, groups: int):
        super().__init__({0: np.full(size, 0xFF, np.uint8)})
        self.unseen = np.zeros(-(-size // 16), np.bool_)
        self.reading = np.zeros((groups, self.unseen.size), np.int64)

    def store(self, address: Array, value: Array, what: str) -> None:
        super().store(address, value, what)
        place = address // 16
        if self.reading[:, place].any():
            raise InUse(f"{what}: a product reads this")
        self.unseen[place] = True

    def matrix(self, descriptor: int, rows: int, group: int, batch: int, what: str) -> Array:
        """32 bytes of each row for a product. [rows, 32], uint8"""
        if descriptor & 0x3FFF_C000_C000_C000:  # patterns that begin elsewhere, and unused bits
            raise UnknownInstruction(f"{what}: descriptor {descriptor:#x}")
        start, along, stride = (descriptor >> shift & 0x3FFF for shift in (0, 16, 32))
        # All in pieces of 16 bytes, of which a row of a block of eight has so many side by side.
        width = (1, 8, 4, 2)[descriptor >> 62]
        row, piece = np.arange(rows)[:, None], np.arange(2)
        place = start + row // 8 * stride + row % 8 * width + piece // width * along + piece % width
        place ^= place >> 3 & width - 1
        if place.max() >= self.pieces[0].size // 16:
            raise BadAccess(f"{what}: {rows} rows, descriptor {descriptor:#x}")
        if self.unseen[place].any():
            raise NotVisible(f"{what}: no fence.proxy.async after a store")
        self.reading[group, place] = batch
        memory = self.pieces[0][: self.pieces[0].size // 16 * 16]
        return memory.reshape(-1, 16)[place].reshape(rows, 32)


# --- threads -----------------------------------------------------------------------------------

# What executes an instruction: for threads under a mask, None for all of them.
Step = Callable[["Program", "Array | None"], None]


@dataclass
class WarpGroup:
    """What 128 threads have under way. Products go in batches, which are done in their order.

    Attributes:
        batch: number of the one that is put together.
        registers: sums and factors of products not waited for, and the last batch that has them.
        unordered: registers used since the last wgmma.fence, but for products: all, without one.
    """

    batch: int = 1
    registers: dict[str, int] = field(default_factory=dict)
    unordered: set[str] = field(default_factory=set)


class Program:
    """The threads of one program."""

    def __init__(self, machine: Machine, ids: tuple[int, int, int], shared: int):
        self.code, self.steps = machine.code, machine.steps
        self.executed = machine.executed
        self.parameters, self.memory = machine.parameters, machine.memory
        n = self.n = self.code.threads
        # What was never written is NaN, or true.
        self.registers = {
            name: np.full(n, -1 if bits > 1 else True).astype(UNSIGNED[bits])
            for name, bits in self.code.registers.items()
        }
        self.used = machine.used
        groups = n // GROUP if self.used else 0
        self.groups = [WarpGroup(unordered=set(self.registers)) for _ in range(groups)]
        self.shared = Shared(shared, len(self.groups))
        self.constants: dict[tuple[str, str], Array] = {}
        self.special = {"%tid.x": np.arange(n, dtype=np.uint32), "global_smem": 0}
        # The address of a parameter, which is in a space of its own, is its number here.
        self.special |= {name: number for number, name in enumerate(self.parameters)}
        for axis, own, count in zip("xyz", ids, machine.grid, strict=True):
            self.special |= {f"%ctaid.{axis}": own, f"%nctaid.{axis}": count}
            self.special |= {f"%ntid.{axis}": n if axis == "x" else 1}

    def read(self, operand: str, kind: str) -> Array:
        """The number in a register, or an immediate one, of which there is one for all threads."""
        raw = self.registers.get(operand)
        if raw is None:
            if (operand, kind) not in self.constants:
                self.constants[operand, kind] = decode(self._constant(operand, kind), kind)
            return self.constants[operand, kind]
        bits = bits_of(kind)
        if 8 * raw.itemsize > bits > 1:
            raw = raw.astype(UNSIGNED[bits])
        return decode(raw, kind)

    def _constant(self, operand: str, kind: str) -> Array:
        unsigned = UNSIGNED[bits_of(kind)]
        if operand in self.special:
            return np.broadcast_to(self.special[operand], self.n).astype(unsigned)
        if operand.startswith(("0f", "0d")):
            return np.array([int(operand[2:], 16)], unsigned)
        if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+U?", operand):
            return np.array([int(operand.rstrip("U"), 0) & (1 << bits_of(kind)) - 1], unsigned)
        raise UnknownInstruction(f"operand {operand}")

    def write(self, register: str, number: Array, kind: str, mask: Array | None) -> None:
        if register == "_":
            return
        raw = self.registers[register]
        if kind[0] == "s" and raw.itemsize * 8 > bits_of(kind):
            value = number.astype(raw.dtype)  # extends the sign
        else:
            value = encode(number, kind)
        np.copyto(raw, value, where=True if mask is None else mask, casting="safe")

    def lanes(self, mask: Array | None) -> Array:
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def address(self, operand: str, lanes: Array) -> Array:
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        if match is None:
            raise UnknownInstruction(f"address {operand}")
        bits = self.code.registers.get(match[1], 32)
        base = self.read(match[1], f"s{bits}") if bits == 64 else self.read(match[1], "u32")
        return base.astype(np.int64)[lanes] + int(match[2] or 0)

    def _use(self, here: int, mask: Array | None) -> None:
        """Notes which registers an instruction uses that is no product itself."""
        for i, group in enumerate(self.groups):
            if mask is None or mask[GROUP * i : GROUP * (i + 1)].any():
                if not group.registers.keys().isdisjoint(self.used[here]):
                    text = self.code.instructions[here].text
                    raise InUse(f"{text}: a register of a product that has not been waited for")
                group.unordered |= self.used[here]

    def run(self) -> Iterator[None]:
        """Runs until all threads have returned; yields where others may have to go first."""
        end = len(self.steps)
        counter = np.zeros(self.n, np.int64)
        here, together = 0, True
        while True:
            mask = None
            if not together:
                here = int(counter.min())
                mask = counter == here
                if mask.all():
                    mask, together = None, True
            if here >= end:
                return
            instruction, step, visible = self.steps[here]
            if visible:
                yield
            active = mask
            if instruction.guard is not None:
                active = self.registers[instruction.guard] != instruction.negated
                if mask is not None:
                    active = active & mask
                elif active.all():
                    active = None
            some = active is None or bool(active.any())
            goal = here + 1
            self.executed[here] += some
            if some and self.groups:
                self._use(here, active)
            if step is None:  # a jump
                goal = self.code.labels[instruction.operands[0]] if instruction.operands else end
            elif some:
                step(self, active)
            if together and (step is not None or active is None):
                here = goal
            else:
                counter[slice(None) if mask is None else mask] = here + 1
                if step is None:
                    counter[active] = goal
                together = False


class Machine:
    """One launch.

    Args:
        ptx: of one kernel.
        parameters: of the kernel, addresses and integers, in its order.
        memory: what it may access: address to bytes, uint8.
        grid: programs along x, y, z.
        shared: bytes of a program.
        seed: of the order in which the programs take turns.

    Attributes:
        executed: how often each instruction was, by at least one thread.
    """

    def __init__(
        self,
        ptx: str,
        parameters: Sequence[int],
        memory: dict[int, Array],
        grid: tuple[int, int, int],
        shared: int,
        seed: int = 0,
    ):
        self.code = parse(ptx)
        self.grid = grid
        if len(parameters) != len(self.code.parameters):
            raise ValueError(f"expected {self.code.parameters}, got {len(parameters)} parameters")
        self.parameters = dict(zip(self.code.parameters, parameters, strict=True))
        self.memory = Memory(memory)
        self.steps = [(i, compile_step(i), _visible(i.opcode)) for i in self.code.instructions]
        # The registers of every instruction that is no product, if there are products at all.
        self.used: list[set[str]] = []
        if any(i.opcode.startswith(PRODUCT) for i in self.code.instructions):
            for i in self.code.instructions:
                words = set() if i.opcode.startswith(PRODUCT) else _WORD.findall(str(i.operands))
                self.used.append(self.code.registers.keys() & words)
        self.executed = [0] * len(self.steps)
        self.random = random.Random(seed)
        self.programs = [
            Program(self, (x, y, z), shared)
            for z in range(grid[2])
            for y in range(grid[1])
            for x in range(grid[0])
        ]

    def run(self, turns: int = 10_000_000) -> None:
        """Runs all programs to their ends.

        Raises:
            Stuck: they are not there after so many turns.
        """
        waiting = [program.run() for program in self.programs]
        chosen = 0
        with np.errstate(all="ignore"):
            for _ in range(turns):
                if not waiting:
                    return
                # Mostly the same one again: who runs ahead has to wait for the others.
                if chosen == len(waiting) or self.random.random() < 0.05:
                    chosen = self.random.randrange(len(waiting))
                if next(waiting[chosen], self) is self:
                    waiting.pop(chosen)
                    chosen = len(waiting)
        raise Stuck(f"{len(waiting)} of {len(self.programs)} programs after {turns} turns")


def _visible(opcode: str) -> bool:
    words = opcode.split(".")
    return words[0] in ("atom", "red", "bar", "barrier") or not {
        "relaxed", "acquire", "release", "volatile",
    }.isdisjoint(words)  # fmt: skip


# --- instructions ------------------------------------------------------------------------------


PRODUCT = "wgmma.mma_async"


def compile_step(instruction: Instruction) -> Step | None:
    """What executes the instruction; None for a jump, whose only effect is on the counter."""
    name, *modifiers = instruction.opcode.replace("shared::cta", "shared").split(".")
    if name in ("bra", "ret"):
        return None
    makers = _memory, _matrix, _warp_group, _conversion, _comparison, _exchange, _elementwise
    for maker in makers:
        step = maker(name, modifiers, instruction)
        if step is not None:
            return step
    raise UnknownInstruction(instruction.text)


def _known(modifiers: Sequence[str], *known: str) -> bool:
    return set(modifiers) <= set(known)


_CACHING = ("cg", "ca", "cs", "relaxed", "acquire", "release", "volatile", "gpu", "sys", "cta")


def _memory(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """ld, st, atom, red."""
    if name not in ("ld", "st", "atom", "red"):
        return None
    operands, text = instruction.operands, instruction.text
    *others, kind = modifiers
    size = bits_of(kind) // 8
    if name == "ld" and others == ["param"]:
        target, parameter = operands[0], operands[1].strip("[] ")

        def load_parameter(p: Program, mask):
            chosen = p.read(parameter, "b64").astype(np.int64)  # a name, or its address
            values = [n & (1 << 8 * size) - 1 for n in p.parameters.values()]
            value = np.array(values, UNSIGNED[8 * size])[chosen]
            p.write(target, value, f"b{8 * size}", mask)

        return load_parameter

    shared = "shared" in others
    vector = [m for m in others if m in ("v2", "v4")]
    rest = [m for m in others if m not in ("shared", "global", *vector)]
    if not (shared or "global" in others):
        return None

    if name in ("atom", "red"):
        change = {"add": operator.add, "max": max}
        wanted = [m for m in rest if m in change]
        if len(wanted) != 1 or not _known(rest, *wanted, *_CACHING):
            return None
        target = operands[0] if name == "atom" else "_"
        place, operand = operands[-2:]

        def atomic(p: Program, mask):
            memory = p.shared if shared else p.memory
            lanes = p.lanes(mask)
            address = p.address(place, lanes)
            new = np.broadcast_to(p.read(operand, kind), p.n)[lanes]
            before = np.zeros(p.n, new.dtype)
            for i, lane in enumerate(lanes):  # one after the other, as there may be two of a word
                old = decode(memory.load(address[i : i + 1], size, text), kind)
                before[lane] = old[0]
                after = np.array([change[wanted[0]](old[0], new[i])], new.dtype)
                memory.store(address[i : i + 1], encode(after, kind), text)
            p.write(target, before, kind, mask)

        return atomic

    if not _known(rest, *_CACHING):
        return None
    place, registers = (operands[1], operands[0]) if name == "ld" else operands
    registers = names(registers)

    def access(p: Program, mask):
        memory = p.shared if shared else p.memory
        lanes = p.lanes(mask)
        address = p.address(place, lanes)
        if (address % (size * len(registers))).any():
            raise BadAccess(f"{text}: not aligned: {address.tolist()}")
        for i, register in enumerate(registers):
            if name == "ld":
                value = np.zeros(p.n, UNSIGNED[8 * size])
                value[lanes] = memory.load(address + i * size, size, text)
                p.write(register, decode(value, kind), kind, mask)
            else:
                value = encode(p.read(register, kind), kind)
                memory.store(address + i * size, np.broadcast_to(value, p.n)[lanes], text)

    return access


def _whole_warps(p: Program, mask: Array | None, text: str) -> None:
    if mask is not None:
        by_warp = mask.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise Diverged(text)


# Which rows and columns of a matrix a lane has to do with.
G, T = np.arange(WARP) // 4, np.arange(WARP) % 4


def _numbers(raw: Array, kind: str) -> Array:
    """Factors in the bits of words."""
    if kind == "tf32":  # the low 13 bits of a float32 are not looked at
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return decode(raw.view(np.uint16), kind)


def _factors(p: Program, register: str, kind: str) -> Array:
    """[warps, lanes, elements of a register]"""
    return _numbers(p.read(register, "b32"), kind).reshape(p.n // WARP, WARP, -1)


def _left(p: Program, registers: list[str], kind: str) -> Array:
    """The rows that each warp has of a left factor. [warps, 16, k]"""
    each = 1 if kind == "tf32" else 2  # elements of a register
    a = np.empty((p.n // WARP, 16, 8 * each))
    at = each * T[:, None] + np.arange(each)
    for i, register in enumerate(registers):
        row, column = G[:, None] + 8 * (i % 2), at + 4 * each * (i // 2)
        a[:, row, column] = _factors(p, register, kind)
    return a


def _sums(product: Array, i: int) -> Array:
    """What each thread has in its register i of a product [warps, 16, n]."""
    return product[:, G + 8 * (i // 2 % 2), 2 * T + i % 2 + 8 * (i // 4)].reshape(-1)


def _matrix(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """mma, ldmatrix, stmatrix: of whole warps."""
    operands, text = instruction.operands, instruction.text
    if name == "mma":
        shapes = {
            "m16n8k16.row.col.f32.f16.f16.f32": "f16",
            "m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
            "m16n8k8.row.col.f32.tf32.tf32.f32": "tf32",
        }
        kind = shapes.get(".".join(modifiers[2:]))
        if modifiers[:2] != ["sync", "aligned"] or kind is None:
            return None
        out, left, right, add = (names(operand) for operand in operands)

        def multiply(p: Program, mask):
            _whole_warps(p, mask, text)
            a = _left(p, left, kind)
            k = a.shape[-1]
            b = np.empty((p.n // WARP, k, 8))
            at = k // 8 * T[:, None] + np.arange(k // 8)
            for i, register in enumerate(right):
                b[:, at + k // 2 * i, G[:, None]] = _factors(p, register, kind)
            product = a @ b  # in float64
            for i, (register, start) in enumerate(zip(out, add, strict=True)):
                total = _sums(product, i) + p.read(start, "f32")
                p.write(register, total.astype(np.float32), "f32", mask)

        return multiply

    if name not in ("ldmatrix", "stmatrix"):
        return None
    if not re.fullmatch(r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", ".".join(modifiers)):
        return None
    place, registers = operands[::-1] if name == "ldmatrix" else operands
    # Where a matrix has the two halves of a lane's register.
    transposed = "trans" in modifiers
    row = [2 * T + e if transposed else G for e in (0, 1)]
    column = [G if transposed else 2 * T + e for e in (0, 1)]

    def move(p: Program, mask):
        _whole_warps(p, mask, text)
        lanes = p.lanes(mask)
        rows = np.zeros(p.n, np.int64)
        rows[lanes] = p.address(place, lanes)
        if (rows % 16).any():
            raise BadAccess(f"{text}: not aligned: {rows.tolist()}")
        rows = rows.reshape(-1, WARP)
        for i, register in enumerate(names(registers)):
            # Lane 8 * i + r says where row r of matrix i begins.
            value = np.zeros((p.n, 2), np.uint16)
            if name == "stmatrix":
                value[:] = p.read(register, "b16x2")
            for e in (0, 1):
                address = (rows[:, 8 * i + row[e]] + 2 * column[e]).reshape(-1)[lanes]
                if name == "stmatrix":
                    p.shared.store(address, value[lanes, e], text)
                else:
                    value[lanes, e] = p.shared.load(address, 2, text)
            if name == "ldmatrix":
                p.write(register, value, "b16x2", mask)

    return move


def _whole_groups(p: Program, mask: Array | None, text: str) -> list[int]:
    """The warp groups that execute an instruction."""
    active = np.ones(p.n, np.bool_) if mask is None else mask
    if p.n % GROUP or (by_group := active.reshape(-1, GROUP)).any(1).sum() != by_group.all(1).sum():
        raise Diverged(text)
    return np.flatnonzero(by_group[:, 0]).tolist()


def _warp_group(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """wgmma, and the fence that shows it what was stored."""
    operands, text = instruction.operands, instruction.text
    if name == "fence" and modifiers in (["proxy", "async"], ["proxy", "async", "shared"]):

        def show(p: Program, mask):
            if mask is not None:  # a thread may not show what another has stored
                raise Diverged(text)
            p.shared.unseen[:] = False

        return show
    if name != "wgmma" or modifiers[1:3] != ["sync", "aligned"]:
        return None
    what = modifiers[0]
    if what == "mma_async":
        return _product(modifiers[3:], operands, text)
    if what not in ("fence", "commit_group", "wait_group"):
        return None

    def order(p: Program, mask):
        for i in _whole_groups(p, mask, text):
            group = p.groups[i]
            if what == "fence":
                group.unordered.clear()
            elif what == "commit_group":
                group.batch += 1
            else:
                done = group.batch - 1 - int(operands[0])
                group.registers = {r: b for r, b in group.registers.items() if b > done}
                p.shared.reading[i, p.shared.reading[i] <= done] = 0

    return order


def _product(modifiers: list[str], operands: list[str], text: str) -> Step | None:
    """wgmma.mma_async. Its sums are there at once, but nobody may look."""
    shape = re.fullmatch(r"m64n(\d+)k(16|8)\.f32\.(f16|bf16|tf32)\.\3", ".".join(modifiers))
    if shape is None or (shape[2] == "8") != (shape[3] == "tf32"):
        return None
    columns, kind = int(shape[1]), shape[3]
    out, left, right, add, *rest = operands
    in_registers = left.startswith("{")
    # Signs as they are, nothing transposed.
    if rest != ["1", "1", *["0"] * (0 if kind == "tf32" else 1 if in_registers else 2)]:
        return None
    sums, factors = names(out), names(left) if in_registers else []
    if len(sums) != columns // 2:
        return None

    def multiply(p: Program, mask):
        groups = _whole_groups(p, mask, text)

        def matrix(operand: str, rows: int, i: int) -> Array:
            described = np.broadcast_to(p.read(operand, "b64"), p.n)[GROUP * i : GROUP * (i + 1)]
            if (described != described[0]).any():
                raise Diverged(f"{text}: {operand} differs within warp group {i}")
            raw = p.shared.matrix(int(described[0]), rows, i, p.groups[i].batch, text)
            return _numbers(raw, kind).astype(np.float64)

        product = np.zeros((p.n // GROUP, 64, columns))
        in_rows = _left(p, factors, kind).reshape(len(product), 64, -1)
        for i in groups:
            group = p.groups[i]
            if not group.unordered.isdisjoint((*sums, *factors)):
                raise NotVisible(f"{text}: no wgmma.fence after another use of its registers")
            group.registers |= dict.fromkeys((*sums, *factors), group.batch)
            a = in_rows[i] if in_registers else matrix(left, 64, i)
            product[i] = a @ matrix(right, columns, i).T
        adds = p.read(add, "pred")
        for i, register in enumerate(sums):
            before = np.where(adds, p.read(register, "f32"), np.float32(0))
            total = _sums(product.reshape(-1, 16, columns), i) + before
            p.write(register, total.astype(np.float32), "f32", mask)

    return multiply


def _conversion(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """cvt: sizes of integers, and roundings of floats to the nearest."""
    if name != "cvt":
        return None
    target, *sources = instruction.operands
    *how, to, source = modifiers
    integers = all(kind[0] in "us" for kind in (to, source))
    widens = how == [] and source in ("f16", "bf16") and to == "f32"
    rounds = how == ["rn"] and source == "f32" and to in ("f16", "bf16", "f16x2", "bf16x2")
    if not (widens or rounds or (integers and not how)):
        return None

    def convert(p: Program, mask):
        if len(sources) == 2:  # the first is the upper half
            halves = [p.read(s, source) for s in reversed(sources)]
            value = np.stack(np.broadcast_arrays(*halves), axis=-1)
        else:
            value = p.read(sources[0], source)
        if integers:
            value = value.astype((SIGNED if to[0] == "s" else UNSIGNED)[bits_of(to)])
        p.write(target, value, to, mask)

    return convert


def _comparison(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """setp, of one number or of two, and selp."""
    operands = instruction.operands
    if name == "selp" and len(modifiers) == 1:
        target, first, second, choice = operands
        plain = f"b{bits_of(modifiers[0])}"

        def select(p: Program, mask):
            chosen = p.read(choice, "pred")
            value = np.where(chosen, p.read(first, plain), p.read(second, plain))
            p.write(target, value, plain, mask)

        return select
    if name != "setp" or len(modifiers) != 2:
        return None
    how, kind = modifiers
    compare = {
        "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
        "gt": operator.gt, "ge": operator.ge,
    }.get(how)  # fmt: skip
    if compare is None or (how == "ne" and "f" in kind):  # which is false of NaN in PTX
        return None
    targets, first, second = operands[0].split("|"), *operands[1:]

    def test(p: Program, mask):
        result = compare(p.read(first, kind), p.read(second, kind))
        for i, target in enumerate(targets):
            p.write(target, result[:, i] if len(targets) == 2 else result, "pred", mask)

    return test


def _exchange(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """bar, fences, prefetch, shfl, mov."""
    operands, text = instruction.operands, instruction.text
    if (name, modifiers) in (("fence", ["acq_rel", "gpu"]), ("prefetch", ["global", "L2"])):
        return lambda p, mask: None  # everyone sees everything at once
    if (name, modifiers, operands) == ("bar", ["warp", "sync"], ["-1"]):
        return lambda p, mask: _whole_warps(p, mask, text)
    if (name, modifiers, operands) == ("bar", ["sync"], ["0"]):

        def barrier(p: Program, mask):
            if mask is not None:
                raise Diverged(text)

        return barrier
    ways = (["sync", "idx", "b32"], ["sync", "bfly", "b32"])
    if name == "shfl" and modifiers in ways and operands[3:] == ["31", "-1"]:
        target, source, lanes = operands[:3]

        def shuffle(p: Program, mask):
            _whole_warps(p, mask, text)
            threads, lane = np.arange(p.n), p.read(lanes, "u32") % WARP
            at = threads ^ lane if modifiers[1] == "bfly" else threads // WARP * WARP + lane
            p.write(target, p.read(source, "b32")[at], "b32", mask)

        return shuffle
    if name != "mov" or len(modifiers) != 1:
        return None
    target, source = operands
    kind = modifiers[0] if modifiers == ["pred"] else f"b{bits_of(modifiers[0])}"
    parts = names(source if source.startswith("{") else target)
    part = f"b{bits_of(kind) // len(parts)}"

    def move(p: Program, mask):
        if source.startswith("{"):
            value = np.stack([np.broadcast_to(p.read(s, part), p.n) for s in parts], axis=-1)
            value = value.view(UNSIGNED[bits_of(kind)]).reshape(-1)
            p.write(target, value, kind, mask)
        elif target.startswith("{"):
            value = p.read(source, kind)
            values = value.view(UNSIGNED[bits_of(part)]).reshape(len(value), -1)
            for i, register in enumerate(parts):
                p.write(register, values[:, i], part, mask)
        else:
            p.write(target, p.read(source, kind), kind, mask)

    return move


def _shift_left(a: Array, by: Array) -> Array:
    return np.where(by < 8 * a.itemsize, a << by.astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Array, by: Array) -> Array:
    # Beyond the width: all of it is the sign, or zero.
    most = np.minimum(by, 8 * a.itemsize - 1).astype(a.dtype)
    gone = (by >= 8 * a.itemsize) & (a.dtype.kind == "u")
    return np.where(gone, 0, a >> most).astype(a.dtype)


def _field(a: Array, first: Array, length: Array) -> Array:
    """bfe, for fields that lie within the word."""
    width = 8 * a.itemsize
    if ((first + length > width) | (length == 0)).any():
        raise ValueError("a field beyond the word")
    up = (width - first - length).astype(a.dtype)
    return (a << up) >> (width - length).astype(a.dtype)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt, without copies of signs."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << 32
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        which = selector >> (4 * i) & 0xF
        if (which > 7).any():
            raise UnknownInstruction("prmt of signs")
        byte = pool >> (8 * which).astype(np.uint64) & 0xFF
        result |= byte.astype(np.uint32) << (8 * i)
    return result


def _wide(a: Array) -> Array:
    return a.astype({"i": SIGNED, "u": UNSIGNED}[a.dtype.kind][16 * a.itemsize])


def _fma(a: Array, b: Array, c: Array) -> Array:
    # Rounded twice, which is off by less than a fused one may be by the last place.
    return (a.astype(np.float64) * b + c).astype(np.result_type(a, b, c))


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """With numbers smaller than the smallest normal one, given and returned, as zero."""

    def flush(a: Array) -> Array:
        return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)

    return lambda *numbers: flush(function(*map(flush, numbers)))


# Operations on each thread's own numbers: those of any kind, those of integers, those of floats
# with their modifiers.
_LOGICAL = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "neg": np.negative, "mul.lo": np.multiply,
    "mul.wide": lambda a, b: _wide(a) * _wide(b),
    "mul.hi": lambda a, b: (_wide(a) * _wide(b) >> 8 * a.itemsize).astype(a.dtype),
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
}  # fmt: skip
_FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "mul": np.multiply, "fma.rn": _fma,
    "neg": np.negative, "abs": np.abs, "div.full": np.divide, "ex2.approx": np.exp2,
    "sqrt.rn": np.sqrt, "rcp.approx": np.reciprocal, "tanh.approx": np.tanh,
}  # fmt: skip
# With the kinds of the operands, where those are not the instruction's.
_MIXED: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "shl": (_shift_left, ("", "u32")),
    "shr": (_shift_right, ("", "u32")),
    "bfe": (_field, ("", "u32", "u32")),
    "prmt": (_permute_bytes, ("", "", "u32")),
}


def _elementwise(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    *how, kind = modifiers
    full = ".".join([name, *how])
    target, *sources = instruction.operands
    kinds = [kind] * len(sources)
    result = kind
    if full in _MIXED:
        function, given = _MIXED[full]
        kinds = [k or kind for k in given]
        if len(kinds) != len(sources):
            return None
    elif full in _LOGICAL and kind[0] in "bp":
        function = _LOGICAL[full]
    elif kind[0] in "us":
        if full not in _INTEGER:
            return None
        function = _INTEGER[full]
        if "wide" in how:
            result = f"{kind[0]}{2 * bits_of(kind)}"
            kinds = [kind, kind, result][: len(sources)]
    elif kind[0] == "f" or kind[:2] == "bf":
        if how[-1:] == ["f32"]:  # only the last operand, and the result
            full, kinds, result = full.removesuffix(".f32"), [*kinds[:-1], "f32"], "f32"
        flush = kind == "f32" and "ftz" in how
        full = full.replace(".ftz", "") if flush else full
        if full not in _FLOAT:
            return None
        function = _flushing(_FLOAT[full]) if flush else _FLOAT[full]
    else:
        return None

    def compute(p: Program, mask):
        values = [p.read(s, k) for s, k in zip(sources, kinds, strict=True)]
        p.write(target, function(*values), result, mask)

    return compute
