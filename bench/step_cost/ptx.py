"""What the time loop does to shared memory, from the PTX: bank conflicts, access by access.

The address of every access is computed for every thread of a program, by following the registers
back to %tid.x and constants. Shared memory has 32 banks of 4 bytes and serves one *wavefront* a
clock: a word of each bank. An access of up to 4 bytes a thread serves 32 threads together, one of
8 bytes 16, one of 16 bytes 8; ldmatrix and stmatrix take 8 rows of 16 bytes together. Each such
group takes one wavefront where no two of its words lie in one bank, and otherwise as many as the
most different words in one bank. (CUDA C++ Programming Guide, "Shared Memory"; PTX ISA,
"ldmatrix".)
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch

from bench.step_cost import flow

BANKS = 32
LANES = 32

# How programs arrive and wait for arrivals, which they do once in many steps. The barriers of all
# other steps cannot be passed by.
RARE = ("bar.", "atom.", "red.", "ld.acquire.")

# Their first operand is read.
NO_RESULT = ("st.", "stmatrix.", "red.", "bar.", "bra", "prefetch")


@dataclass(frozen=True)
class Access:
    """One access to shared memory, made by every warp.

    Attributes:
        kind: the machine instruction: LDS, STS, LDSM, STSM or HGMMA.
        width: bytes of a thread, or of a row's 8 threads times the matrices for LDSM and STSM.
        wavefronts: of the warp with most of them; None where the address cannot be computed.
        ideal: wavefronts without conflicts.
        text: the statement.
    """

    kind: str
    width: int
    wavefronts: float | None
    ideal: float
    text: str


@dataclass(frozen=True)
class Statement:
    text: str
    op: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False


class Unknown(Exception):
    """A register whose value does not follow from the thread's number."""


def parse(text: str) -> tuple[list[Statement], dict[int, flow.Jump]]:
    """Statements and jumps of the PTX of one kernel."""
    statements: list[Statement] = []
    # A label within the braces of an asm block may come again in the next one.
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    scopes: dict[int, tuple[int, ...]] = {}
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
            if label:
                labels[scope, label[1]] = len(statements)
                continue
            m = re.match(r"^(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", piece)
            if m:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+", m[4] or "")
                scopes[len(statements)] = scope
                statements.append(Statement(piece, m[3], tuple(operands), m[2], bool(m[1])))
    jumps = {}
    for n, statement in enumerate(statements):
        name = statement.op.split(".")[0]
        if name in ("ret", "exit"):
            jumps[n] = flow.Jump(None, statement.predicate is not None)
        elif name == "bra":
            around = [scopes[n][:depth] for depth in range(len(scopes[n]), -1, -1)]
            target = next(
                labels[s, statement.operands[-1]]
                for s in around
                if (s, statement.operands[-1]) in labels
            )
            jumps[n] = flow.Jump(target, statement.predicate is not None)
    return statements, jumps


def accesses(text: str, threads: int) -> list[Access]:
    """The accesses of one step of a program of so many threads, in order."""
    statements, jumps = parse(text)
    # A jump beyond the last statement would have nowhere to go.
    statements.append(Statement("end", "ret", ()))

    def those(*ops: str) -> list[int]:
        return [n for n, statement in enumerate(statements) if statement.op.startswith(ops)]

    products = those("mma.", "wgmma.mma", "tcgen05.mma", "fma.")
    loop = flow.TimeLoop(flow.graph(len(statements), jumps), products, those(*RARE))
    registers = Registers(statements, threads)
    found = [_access(statements[n], registers) for n in loop.step()]
    return [access for access in found if access]


def _access(statement: Statement, registers: Registers) -> Access | None:
    """What a statement does to shared memory, or None."""
    parts = statement.op.split(".")
    name = parts[0]
    if name == "wgmma" and parts[1] == "mma_async":
        return _wgmma(statement)
    shared = any(part.startswith("shared") for part in parts)
    if not shared or name in ("mbarrier", "fence", "tcgen05", "cvta", "mapa"):
        return None
    if name in ("ldmatrix", "stmatrix"):
        matrices = int(next(p for p in parts if re.match(r"x[124]$", p))[1])
        kind, width = {"ldmatrix": "LDSM", "stmatrix": "STSM"}[name], 16 * matrices
    elif name in ("ld", "st"):
        vector = next((int(p[1:]) for p in parts if re.match(r"v\d$", p)), 1)
        bits = re.search(r"\d+$", parts[-1])
        assert bits, statement.text
        kind, width, matrices = {"ld": "LDS", "st": "STS"}[name], vector * int(bits[0]) // 8, 0
    else:
        return Access(name, 4, None, 1, statement.text)
    where = next(o for o in statement.operands if o.startswith("["))
    try:
        addresses = registers.address(where)
        active = registers.active(statement)
        if matrices:
            warps = [_waves([a[8 * k : 8 * k + 8] for k in range(matrices)], 16) for a in addresses]
        else:
            group = min(LANES, LANES * 4 // width)
            chosen = [
                [address if on else None for address, on in zip(a, o, strict=True)]
                for a, o in zip(addresses, active, strict=True)
            ]
            warps = [
                _waves([a[k : k + group] for k in range(0, LANES, group)], width) for a in chosen
            ]
    except Unknown:
        return Access(kind, width, None, max(1, width // 4), statement.text)
    wavefronts, ideal = max(warps)
    return Access(kind, width, wavefronts, ideal, statement.text)


def _waves(groups: list[list], width: int) -> tuple[int, int]:
    """Wavefronts of groups of threads that are served together, and how few it could be."""
    total = ideal = 0
    for group in groups:
        banks = defaultdict(set)
        for address in group:
            if address is not None:
                for word in range(address // 4, (address + width - 1) // 4 + 1):
                    banks[word % BANKS].add(word)
        total += max((len(words) for words in banks.values()), default=0)
        ideal += bool(banks)
    return total, ideal


def _wgmma(statement: Statement) -> Access:
    """A product that reads its operands from shared memory itself, in a layout without conflicts
    (PTX ISA, "wgmma.mma_async"): a group of 4 warps reads each of them once."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", statement.op)
    bits = re.search(r"(\d+)$", statement.op)
    assert shape is not None, statement.text
    assert bits is not None, statement.text
    m, n, k = (int(x) for x in shape.groups())
    rows = n + (0 if statement.operands[1].startswith("{") else m)
    share = rows * k * int(bits[0]) / 8 / (4 * BANKS) / 4
    return Access("HGMMA", 0, share, share, statement.text)


class Registers:
    """Values of registers, for all threads of a program: int64 tensors [warps, 32]."""

    def __init__(self, statements: list[Statement], threads: int):
        self.definitions: dict[str, list[Statement]] = defaultdict(list)
        for statement in statements:
            if statement.operands and not statement.op.startswith(NO_RESULT):
                for name in re.findall(r"[%\w.]+", statement.operands[0]):
                    self.definitions[name].append(statement)
        self.known = {"%tid.x": torch.arange(threads).reshape(-1, LANES)}
        self.open: set[str] = set()

    def address(self, operand: str) -> list[list[int]]:
        """Of `[register + offset]`, for each lane of each warp."""
        total = torch.zeros_like(self.known["%tid.x"])
        for term in operand.strip("[] ").split("+"):
            total = total + self.value(term.strip())
        return total.tolist()

    def active(self, statement: Statement) -> list[list[int]]:
        """Which threads run it; all where its predicate is not known."""
        everyone = torch.ones_like(self.known["%tid.x"])
        if statement.predicate is None:
            return everyone.tolist()
        try:
            on = self.value(statement.predicate)
        except Unknown:
            return everyone.tolist()
        return ((on == 0) if statement.negated else (on != 0)).long().tolist()

    def value(self, name: str) -> torch.Tensor:
        """Raises Unknown where it does not follow from the thread's number."""
        if re.match(r"^-?(0[xX][0-9a-fA-F]+|\d+)$", name):
            return torch.full_like(self.known["%tid.x"], int(name, 0))
        if name.startswith("global_smem"):  # all of a program's shared memory starts at 0
            return torch.zeros_like(self.known["%tid.x"])
        if name not in self.known:
            if name in self.open or not self.definitions[name]:
                raise Unknown(name)
            self.open.add(name)
            try:
                values = [self._define(statement) for statement in self.definitions[name]]
            finally:
                self.open.discard(name)
            if any(not torch.equal(values[0], other) for other in values[1:]):
                raise Unknown(name)
            self.known[name] = values[0]
        return self.known[name]

    def _define(self, statement: Statement) -> torch.Tensor:
        if statement.predicate is not None or statement.operands[0].startswith("{"):
            raise Unknown(statement.text)
        parts = statement.op.split(".")
        kind = parts[-1]  # b32, s64, pred ...
        bits = int(re.sub(r"\D", "", kind) or 1)
        signed = kind.startswith("s")
        sources = [self.value(o) for o in statement.operands[1:]]
        if parts[0] in ("setp", "shr", "div", "rem", "min", "max", "bfe", "cvt", "mul", "mad"):
            sources = [_as(x, bits, signed) for x in sources]
        operation = OPERATIONS.get(parts[0])
        if operation is None:
            raise Unknown(statement.text)
        result = operation(parts, *sources)
        if parts[0] in ("mul", "mad") and "wide" in parts:
            bits *= 2
        if parts[0] == "cvt":
            bits = int(re.sub(r"\D", "", parts[-2]) or 1)
        return result.long() if parts[0] == "setp" else _as(result, bits, False)


def _as(x: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """The low bits as a number; 64 of them are taken as signed, as addresses never need the top."""
    if bits >= 64:
        return x
    x = x & ((1 << bits) - 1)
    return torch.where(x >> (bits - 1) != 0, x - (1 << bits), x) if signed else x


def _compare(parts, a, b):
    compare = {
        "eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b,
        "lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b,
    }  # fmt: skip
    if len(parts) != 3:  # combined with another predicate
        raise Unknown(".".join(parts))
    return compare[parts[1]]


def _extract(parts, a, position, length):
    value = (a >> position) & ((1 << length) - 1)
    if parts[-1].startswith("s"):
        value = torch.where(value >> (length - 1) != 0, value - (1 << length), value)
    return value


def _insert(parts, field, a, position, length):
    mask = ((1 << length) - 1) << position
    return (a & ~mask) | ((field << position) & mask)


def _shuffle(parts, a, lane, clamp, members):
    if parts[2] != "idx":
        raise Unknown(".".join(parts))
    return a.gather(1, lane)


def _multiply(parts, a, b, c=0):
    if "hi" in parts:
        raise Unknown(".".join(parts))
    return a * b + c


OPERATIONS = {
    "mov": lambda parts, a: a,
    "cvt": lambda parts, a: a,
    "cvta": lambda parts, a: a,
    "add": lambda parts, a, b: a + b,
    "sub": lambda parts, a, b: a - b,
    "mul": _multiply,
    "mad": _multiply,
    "div": lambda parts, a, b: torch.div(a, b, rounding_mode="trunc"),
    "rem": lambda parts, a, b: torch.fmod(a, b),
    "min": lambda parts, a, b: torch.minimum(a, b),
    "max": lambda parts, a, b: torch.maximum(a, b),
    "neg": lambda parts, a: -a,
    "not": lambda parts, a: ~a,
    "and": lambda parts, a, b: a & b,
    "or": lambda parts, a, b: a | b,
    "xor": lambda parts, a, b: a ^ b,
    "shl": lambda parts, a, b: a << b,
    "shr": lambda parts, a, b: a >> b,
    "bfe": _extract,
    "bfi": _insert,
    "setp": _compare,
    "selp": lambda parts, a, b, on: torch.where(on != 0, a, b),
    "shfl": _shuffle,
}
