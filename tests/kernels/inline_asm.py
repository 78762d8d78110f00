"""Runs inline assembly in Triton's interpreter, which has no assembler.

It knows as much PTX as `fusedrnn.kernels.sync` uses; all registers are of 32 bits, but for
addresses and predicates. The text is executed instruction by instruction, for all threads
together: those furthest behind make the next step, so a thread that goes back to poll again keeps
nobody from going on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ELEMENTS = {"b16": tl.int16, "b32": tl.int32}
NUMPY = {"b16": np.int16, "b32": np.int32}
# An acquire that is meant for its own block orders nothing between programs.
ACCESS = re.compile(
    r"(?:ld\.(relaxed\.gpu|acquire\.gpu|acquire\.cta)|st\.relaxed\.gpu)\.global\.(?:v4\.)?b\d+"
)


class Memory(Protocol):
    """What the assembly loads from and stores to: a tile of pointers at once."""

    def relaxed_load(self, pointers: Any, acquire: bool = False) -> np.ndarray: ...

    def relaxed_store(self, pointers: Any, values: np.ndarray) -> None: ...


class Threads:
    """All threads of one block of assembly, and their registers, by name: [threads] each."""

    def __init__(self, memory: Memory, count: int, registers: dict[str, np.ndarray]):
        self.memory = memory
        self.count = count
        self.registers = registers

    def run(self, text: str) -> None:
        lines = _lines(text)
        labels = {line[:-1]: n for n, line in enumerate(lines) if line.endswith(":")}
        at = np.zeros(self.count, int)  # the line that each thread executes next
        while (here := int(at.min())) < len(lines):
            who = at == here
            at[who] += 1
            guard, operation, operands = _parse(lines[here])
            if guard:
                who &= self.registers[guard.lstrip("!")] != guard.startswith("!")
            if operation == "bra":
                at[who] = labels[operands]
            elif operation and who.any():
                self.execute(operation, operands, who)

    def execute(self, operation: str, operands: str, who: np.ndarray) -> None:
        if match := ACCESS.fullmatch(operation):
            self.access(operation, operands, who, acquire=match[1] == "acquire.gpu")
            return
        target, *sources = operands.split(", ")
        self.write(target, OPERATIONS[operation](*map(self.read, sources)), who)

    def read(self, source: str) -> np.ndarray:
        if source in self.registers:
            return self.registers[source]
        return np.full(self.count, int(source, 0), np.uint32)

    def write(self, target: str, value: np.ndarray, who: np.ndarray) -> None:
        old = self.registers.get(target, np.zeros_like(value))
        self.registers[target] = np.where(who, value, old)

    def access(self, operation: str, operands: str, who: np.ndarray, acquire: bool) -> None:
        pointer, offset, names = _address(operands)
        kind = operation[-3:]
        width = NUMPY[kind](0).itemsize
        assert (".v4." in operation) == (len(names) == 4), (operation, operands)
        addresses = self.read(pointer)[who, None] + np.uint64(offset)
        addresses = addresses + np.arange(len(names), dtype=np.uint64) * np.uint64(width)
        assert not (addresses[:, 0] % np.uint64(width * len(names))).any(), "an unaligned access"
        pointers = interpreter.TensorHandle(addresses, tl.pointer_type(ELEMENTS[kind]))
        if operation.startswith("ld"):
            loaded = self.memory.relaxed_load(pointers, acquire).view(np.uint32)
            for n, name in enumerate(names):
                word = np.zeros(self.count, np.uint32)
                word[who] = loaded[:, n]
                self.write(name, word, who)
        else:
            words = np.stack([self.read(name)[who] for name in names], 1)
            unsigned = words.astype(f"u{width}")
            self.memory.relaxed_store(pointers, unsigned.view(NUMPY[kind]))


def _lines(text: str) -> list[str]:
    """One instruction or label each, without the braces of the block and declarations."""
    text = text.strip()
    if text.startswith("{"):
        text = text[1:-1]
    parts = re.split(r";|(?<=:)\s", text)
    lines = [" ".join(part.split()) for part in parts]
    return [line for line in lines if line and not line.startswith(".reg")]


def _parse(line: str) -> tuple[str, str, str]:
    """Its guard, without the @; its operation; its operands. All empty for a label."""
    found = re.fullmatch(r"(?:@(!?\w+) )?([\w.]+) (.+)", line)
    if not found:
        assert line.endswith(":"), line
        return "", "", ""
    return found[1] or "", found[2], found[3]


def _address(operands: str) -> tuple[str, int, list[str]]:
    """Of a load's or a store's operands: the pointer, what is added to it, and the others."""
    found = re.search(r"\[(\$\d+)(?: \+ (\d+))?\]", operands)
    assert found, operands
    others = operands.replace(found[0], "").strip("{}, ")
    return found[1], int(found[2] or 0), others.split(", ")


def _pairs(x: np.ndarray) -> np.ndarray:
    return x.view(np.int16)


def _permute(x: np.ndarray, y: np.ndarray, selector: np.ndarray) -> np.ndarray:
    octets = np.concatenate([a.view(np.uint8).reshape(-1, 4) for a in (x, y)], 1)
    chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    assert not (chosen & 8).any(), "no replication of signs"
    return np.take_along_axis(octets, (chosen & 7).astype(int), 1).view(np.uint32)[:, 0]


OPERATIONS = {
    "mov.b32": lambda x: x,
    "min.s32": lambda x, y: np.minimum(x.view(np.int32), y.view(np.int32)).view(np.uint32),
    "min.s16x2": lambda x, y: np.minimum(_pairs(x), _pairs(y)).view(np.uint32),
    "prmt.b32": _permute,
    "setp.eq.b32": np.equal,
    "setp.eq.s32": np.equal,
    "setp.ne.s32": np.not_equal,
    "setp.lt.s32": lambda x, y: x.view(np.int32) < y.view(np.int32),
    "setp.ne.b32": np.not_equal,
    "sub.u32": np.subtract,
    "sub.s32": np.subtract,
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "not.b32": np.invert,
}


# --- in the place of the interpreter's builder ------------------------------------------------


def run_assembly(
    memory: Memory,
    text: str,
    constraints: str,
    inputs: Sequence[Any],
    types: Sequence[Any],
    is_pure: bool,
    pack: int,
) -> Any:
    """What `tl.inline_asm_elementwise` asks of the builder.

    A thread holds `pack` elements: of whole rows of the tile, which are as far apart as there
    are threads. Elements of 16 bits share a register, if there are two of them.
    """
    shape = inputs[0].data.shape
    row = shape[-1] if pack > 1 else 1
    count = inputs[0].data.size // pack

    def by_thread(tile: np.ndarray) -> np.ndarray:
        return tile.reshape(pack // row, count, row).swapaxes(0, 1).reshape(count, pack)

    def as_tile(elements: np.ndarray) -> np.ndarray:
        return elements.reshape(count, pack // row, row).swapaxes(0, 1).reshape(shape)

    registers: dict[str, np.ndarray] = {}
    outputs = [max(1, pack * t.scalar.primitive_bitwidth // 32) for t in types]
    number = sum(outputs)
    for value in inputs:
        elements = np.ascontiguousarray(by_thread(value.data))
        size = elements.dtype.itemsize
        if size < 4 and pack == 1:
            elements = elements.view(f"u{size}").astype(np.uint32)
        for register in elements.view(np.uint32 if size < 8 else np.uint64).T:
            registers[f"${number}"] = np.ascontiguousarray(register)
            number += 1
    assert number == len(constraints.split(",")), constraints
    threads = Threads(memory, count, registers)
    threads.run(text)
    results, first = [], 0
    for tile_type, length in zip(types, outputs, strict=True):
        names = [f"${n}" for n in range(first, first + length)]
        words = np.stack([threads.registers[name] for name in names], 1)
        dtype = interpreter._get_np_dtype(tile_type.scalar)
        results.append(interpreter.TensorHandle(as_tile(words.view(dtype)), tile_type.scalar))
        first += length
    return _Results(results)


class _Results:
    def __init__(self, results: list):
        self.results = results

    def get_result(self, n: int) -> Any:
        return self.results[n]
