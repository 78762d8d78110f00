"""Loops and paths in code with branches: the same for PTX and for machine code (SASS).

An instruction is known by its number. What is needed here of each: where it may jump, and whether
the next one may follow. Programs have a few dozen blocks, so nothing here minds the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Jump:
    """What leaves straight-line code: `target` is an instruction's number, or None at an exit."""

    target: int | None
    conditional: bool


@dataclass(frozen=True)
class Graph:
    """Straight runs of instructions, and which of them may follow each."""

    blocks: tuple[range, ...]
    successors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Loop:
    """Blocks that reach each other; `inner` are the loops within, entered after `header`."""

    header: int
    blocks: frozenset[int]
    inner: tuple[Loop, ...]


def graph(count: int, jumps: dict[int, Jump]) -> Graph:
    """The graph of `count` instructions, of which `jumps` are some."""
    firsts = {0} | {n + 1 for n in jumps if n + 1 < count}
    firsts |= {jump.target for jump in jumps.values() if jump.target is not None}
    starts = sorted(firsts)
    number = {first: block for block, first in enumerate(starts)}
    blocks = tuple(range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True))
    successors = []
    for block in blocks:
        jump = jumps.get(block[-1])
        following = []
        if jump is not None and jump.target is not None:
            following.append(number[jump.target])
        if (jump is None or jump.conditional) and block.stop < count:
            following.append(number[block.stop])
        successors.append(tuple(following))
    return Graph(blocks, tuple(successors))


def loops(code: Graph, inside: Iterable[int] | None = None, cut: int | None = None) -> list[Loop]:
    """The outermost loops of the blocks `inside`, when no jump to the block `cut` counts."""
    inside = set(range(len(code.blocks)) if inside is None else inside)
    after = {b: [s for s in code.successors[b] if s in inside and s != cut] for b in inside}
    reach = {b: _reached(after, b) for b in inside}
    found, seen = [], set()
    for block in sorted(inside):
        if block in seen or block not in reach[block]:
            continue
        members = frozenset(b for b in reach[block] if block in reach[b])
        seen |= members
        entered = [
            b for b in sorted(members) for p, s in enumerate(code.successors)
            if b in s and p not in members
        ]  # fmt: skip
        header = entered[0] if entered else min(members)
        found.append(Loop(header, members, tuple(loops(code, members, header))))
    return found


def _reached(after: dict[int, list[int]], start: int) -> set[int]:
    found, open_ = set(), list(after[start])
    while open_:
        block = open_.pop()
        if block not in found:
            found.add(block)
            open_.extend(after[block])
    return found


class TimeLoop:
    """The outermost loop with most instructions, and what a step runs of it.

    An inner loop is a spin, which waits for other programs: it is passed by where that can be done,
    and else left at the first chance, as what it costs depends on the others. So is passed by what
    most steps do not run.

    Attributes:
        spinning: the instructions of spins.
    """

    def __init__(self, code: Graph, products: Collection[int], rare: Collection[int]):
        """
        Args:
            products: instructions that multiply.
            rare: instructions that mark a way which most steps do not take, where there is another.
        Raises:
            ValueError: no loop at all, or products in an inner one, which would be no spin.
        """
        found = loops(code)
        if not found:
            raise ValueError("expected code with a loop over the steps, got code without a loop")
        self.code, self.rare = code, frozenset(rare)
        self.loop = max(found, key=lambda loop: len(self._inside(loop)))
        self.spinning = self._inside(*self.loop.inner)
        if self.spinning.intersection(products):
            raise ValueError("expected a step's products outside of inner loops, got some within")

    def step(self) -> list[int]:
        """The instructions of a step."""

        def worth(block: int) -> float:
            here = self.code.blocks[block]
            shunned = len(self.rare.intersection(here)) + (here[0] in self.spinning)
            return len(here) - 1e6 * shunned

        return path(self.code, self.loop, worth)

    def _inside(self, *some: Loop) -> frozenset[int]:
        return frozenset(n for loop in some for b in loop.blocks for n in self.code.blocks[b])


def path(code: Graph, loop: Loop, worth: Callable[[int], float]) -> list[int]:
    """The instructions of one turn of `loop`: of all ways round, the one worth most.

    Inner loops are left at the first chance, where the way leads through them. `worth`: of passing
    a block.
    """
    of_block = {b: inner for inner in loop.inner for b in inner.blocks}
    best: dict[int, tuple[float, list[int]] | None] = {}

    def through(block: int) -> tuple[float, list[int]] | None:
        """From this block to the end of the turn; None where it leaves the loop."""
        if block in best:
            return best[block]
        inner = of_block.get(block)
        passed = [block] if inner is None else way_out(code, inner)
        here = [n for b in passed for n in code.blocks[b]]
        value = sum(map(worth, passed))
        following = set(code.successors[passed[-1]]) - (inner.blocks if inner else frozenset())
        found = None
        for successor in sorted(following & loop.blocks):
            rest = (0.0, []) if successor == loop.header else through(successor)
            if rest is not None and (found is None or value + rest[0] > found[0]):
                found = (value + rest[0], here + rest[1])
        best[block] = found
        return found

    whole = through(loop.header)
    assert whole is not None, "a loop leads back to its header"
    return whole[1]


def way_out(code: Graph, loop: Loop) -> list[int]:
    """The blocks from the header of a loop to where it can be left, with fewest instructions."""
    ways = [(len(code.blocks[loop.header]), [loop.header])]
    while ways:
        ways.sort()
        length, blocks = ways.pop(0)
        if set(code.successors[blocks[-1]]) - loop.blocks:
            return blocks
        for successor in set(code.successors[blocks[-1]]) - set(blocks):
            ways.append((length + len(code.blocks[successor]), [*blocks, successor]))
    raise ValueError("expected a loop that ends, got one without a way out")
