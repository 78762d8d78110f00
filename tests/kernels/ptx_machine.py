"""Executes the PTX of a kernel on the CPU, so that compiled code can be tested without a GPU.

Every program of the grid has its own registers, shared memory and threads; the threads run in
lock step, those with the lowest program counter first, so that they meet again where their paths
do. Programs take turns in an order drawn from a seed: whoever is about to do something that others
may see or wait for (an atomic, a relaxed or ordered access, a barrier) may have to let others go
first. Global memory is that of tensors on the host, at their own addresses; an access beside them,
beside shared memory, or not aligned is an error, and so is an instruction that is not known here.

What a GPU computes approximately (ex2.approx, div.full, the sums in tensor cores) is computed at
least as exactly as it does. Stores are seen by everyone at once: what may be reordered is for the
tests of `sync`, not for these.

(Instructions, and which lane holds what of a matrix: PTX ISA, "Instruction Set", "Matrix
Fragments for mma.m16n8k16", "... for mma.m16n8k8", "ldmatrix", "stmatrix".)
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


class UnknownInstruction(Exception):
    """PTX that this machine cannot execute; names it."""


class BadAccess(Exception):
    """An access to memory that is not there, or not aligned."""


class Diverged(Exception):
    """Threads that an instruction needs together are not together."""


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
            return re.sub(r"[%$\w]+", own, text)

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

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
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


# --- threads -----------------------------------------------------------------------------------

# What executes an instruction: for threads under a mask, None for all of them.
Step = Callable[["Program", "Array | None"], None]


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
        self.shared = Memory({0: np.full(shared, 0xFF, np.uint8)})
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


def compile_step(instruction: Instruction) -> Step | None:
    """What executes the instruction; None for a jump, whose only effect is on the counter."""
    name, *modifiers = instruction.opcode.replace("shared::cta", "shared").split(".")
    if name in ("bra", "ret"):
        return None
    for maker in (_memory, _matrix, _conversion, _comparison, _exchange, _elementwise):
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


def _matrix(name: str, modifiers: list[str], instruction: Instruction) -> Step | None:
    """mma, ldmatrix, stmatrix: of whole warps."""
    operands, text = instruction.operands, instruction.text
    lane = np.arange(WARP)
    g, t = lane // 4, lane % 4

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

        def elements(p: Program, register: str) -> Array:
            """[warps, lanes, elements of a register]"""
            if kind == "tf32":  # the low 13 bits of a float32 are not looked at
                raw = p.read(register, "b32") & np.uint32(0xFFFFE000)
                return raw.view(np.float32).reshape(-1, WARP, 1)
            return p.read(register, f"{kind}x2").reshape(-1, WARP, 2)

        def multiply(p: Program, mask):
            _whole_warps(p, mask, text)
            warps = p.n // WARP
            each = 1 if kind == "tf32" else 2  # elements of a register
            k = 8 * each
            a = np.empty((warps, 16, k))
            b = np.empty((warps, k, 8))
            for e in range(each):
                at = each * t + e
                for i, register in enumerate(left):
                    a[:, g + 8 * (i % 2), at + k // 2 * (i // 2)] = elements(p, register)[..., e]
                for i, register in enumerate(right):
                    b[:, at + k // 2 * i, g] = elements(p, register)[..., e]
            product = a @ b  # in float64
            for i, (register, start) in enumerate(zip(out, add, strict=True)):
                sums = product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1)
                p.write(register, (sums + p.read(start, "f32")).astype(np.float32), "f32", mask)

        return multiply

    if name not in ("ldmatrix", "stmatrix"):
        return None
    if not re.fullmatch(r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", ".".join(modifiers)):
        return None
    place, registers = operands[::-1] if name == "ldmatrix" else operands
    # Where a matrix has the two halves of a lane's register.
    transposed = "trans" in modifiers
    row = [2 * t + e if transposed else g for e in (0, 1)]
    column = [g if transposed else 2 * t + e for e in (0, 1)]

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
    """bar, fences, shfl, mov."""
    operands, text = instruction.operands, instruction.text
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


# Operations on each thread's own numbers: those of any kind, those of integers, those of floats
# with their modifiers.
_LOGICAL = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "neg": np.negative, "mul.lo": np.multiply,
    "mul.wide": lambda a, b: _wide(a) * _wide(b),
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
}  # fmt: skip
_FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "mul": np.multiply, "fma.rn": _fma,
    "neg": np.negative, "abs": np.abs, "div.full": np.divide, "ex2.approx": np.exp2,
    "sqrt.rn": np.sqrt,
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
        if full not in _FLOAT:
            return None
        function = _FLOAT[full]
    else:
        return None

    def compute(p: Program, mask):
        values = [p.read(s, k) for s, k in zip(sources, kinds, strict=True)]
        p.write(target, function(*values), result, mask)

    return compute
