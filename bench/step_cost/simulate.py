"""How long a step takes: the warps of one program, instruction by instruction.

Facts, from the machine code: the order of the instructions, how many clocks a warp lets pass behind
each (stall), which barriers it waits for, which products, special functions and accesses to shared
memory there are, and the wavefronts of the latter. Assumed: `parameters`. The model:

- A warp belongs to one of four schedulers; each of them issues one instruction a clock.
- All share one pipe to shared memory, which an access holds for its wavefronts.
- Products (mma) and special functions (MUFU) of a scheduler follow each other at an interval.
- A load takes its latency, or longer where the bytes before it have not come yet.
- A block barrier opens when the last warp has come to it.
- All programs are in step: what this one has signalled, all others have at the same time.

Instruction caches always hit, and clocks of one step are those of the next.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from types import SimpleNamespace

from bench.step_cost.sass import ARRIVALS, NO_BARRIER, Instruction, TimeLoop

SCHEDULERS = 4
LANES = 32
# Of other instructions with a latency that varies; nothing on the way through a step waits long
# for one, so they need no range.
OTHER_LATENCY = {"LDC": 40, "ULDC": 40, "LDCU": 40, "S2R": 30, "S2UR": 30}
USUAL_LATENCY = 20
STORE_READ = 12  # until a store has read its registers
JUMP = 8
PIPE_ENTRY = 2  # clocks until an access is at the pipe to shared memory and to L2


@dataclass(frozen=True)
class Result:
    """Attributes:
    clocks: of one step, when the first ones are over.
    issued: clock at which the first warp issued each instruction of that step, from its start.
    """

    clocks: float
    issued: tuple[float, ...]


class Deadlock(Exception):
    """A block barrier that not all warps come to."""


def simulate(
    loop: TimeLoop,
    wavefronts: dict[int, float],
    assumed: SimpleNamespace,
    *,
    warps: int,
    programs: int,
    protocol: str | None,
    together: int = 1,
    steps: int = 4,
) -> Result:
    """Runs a few steps and times the last but one, when the first ones are over.

    Args:
        wavefronts: of the accesses to shared memory, by address of the instruction.
        assumed: `Parameters.at`.
        programs: that exchange, each with a signal of its own.
        together: programs on the multiprocessor, each of a group of its own.
    Raises:
        Deadlock: not all warps come to a barrier.
    """
    return _Multiprocessor(loop, wavefronts, assumed, warps, programs, protocol, together).run(
        steps
    )


class _Multiprocessor:
    def __init__(self, loop, wavefronts, assumed, warps, programs, protocol, together):
        self.ways = ([loop.leader] + [loop.other] * (warps - 1)) * together
        self.warps = warps  # of one program
        self.near, self.wavefronts, self.assumed = loop.near, wavefronts, assumed
        self.programs, self.protocol = programs, protocol
        self.issue_free = [0.0] * SCHEDULERS
        self.mma_free = [0.0] * SCHEDULERS
        self.special_free = [0.0] * SCHEDULERS
        self.shared_free = self.l2_free = 0.0
        self.released = [[[0.0] for _ in range(6)] for _ in self.ways]
        # Of each program: the warps at its block barrier, and their pause behind it.
        self.waiting: list[list[tuple[int, float]]] = [[] for _ in range(together)]
        self.products = [0.0] * len(self.ways)  # when the asynchronous ones of a warp are done
        # Of each step and group: how many signals there will be; how many there are, and when the
        # others see the last of them.
        self.expected = sum(self.signals(w, i) for w in range(warps) for i in self.ways[w])
        self.signalled = {(0, group): (self.expected, 0.0) for group in range(together)}
        self.parked: list[int] = []  # warps that poll for what is still to be signalled
        places = [n for n, i in enumerate(self.ways[0]) if self.signals(0, i)]
        polls = [n for n, i in enumerate(self.ways[0]) if self.polls(0, i)]
        # Backward a step waits for its own signal, forward for the one of the step before.
        self.own = bool(places and polls and places[0] < polls[0])

    def run(self, steps: int) -> Result:
        at = [(0, 0)] * len(self.ways)  # step and position of each warp
        issued: list[list[float]] = []  # by the first warp, of each step
        queue: list[tuple[float, int, int]] = []  # when to ask a warp again; the oldest first
        asked = 0

        def ask(warp: int, when: float) -> None:
            nonlocal asked
            asked += 1
            heapq.heappush(queue, (when, asked, warp))

        for warp in range(len(self.ways)):
            ask(warp, 0.0)
        while queue:
            now, _, warp = heapq.heappop(queue)
            step, position = at[warp]
            if step == steps:
                continue
            i = self.ways[warp][position]
            could = max(now, self.earliest(warp, i))
            if could > now:
                ask(warp, could)
                continue
            group = warp // self.warps
            if self.polls(warp, i) and not self.complete(step + self.own, group):
                self.parked.append(warp)
                continue
            if warp == 0 and position == 0:
                issued.append([])
            if warp == 0:
                issued[-1].append(now)
            after = self.issue(warp, step, i, now)
            if self.signals(warp, i):
                for other in self.parked:
                    ask(other, now)
                self.parked = []
            position += 1
            if position == len(self.ways[warp]):
                step, position, after = step + 1, 0, after + JUMP
            at[warp] = (step, position)
            if i.name != "BAR":
                ask(warp, after)
                continue
            waiting = self.waiting[group]
            waiting.append((warp, after - now))
            if len(waiting) == self.warps:
                for other, pause in waiting:
                    ask(other, now + max(pause, self.assumed.barrier))
                waiting.clear()
        stuck = sum(map(len, self.waiting))
        if stuck or self.parked:
            raise Deadlock(f"{stuck} of {len(self.ways)} warps wait at a block barrier")
        # From the first instruction of one step to that of the next, whatever it waits for.
        start = issued[-2][0]
        return Result(issued[-1][0] - start, tuple(t - start for t in issued[-2]))

    def signals(self, warp: int, i: Instruction) -> bool:
        """Whether the others wait for this."""
        if self.protocol == "counter":
            return i.name in ARRIVALS and (warp % self.warps == 0 or i.predicate is None)
        return self.protocol is not None and i.is_publication

    def polls(self, warp: int, i: Instruction) -> bool:
        """Whether this waits for the others."""
        if self.protocol == "counter":
            return i.poll and (warp % self.warps == 0 or i.predicate is None)
        return self.protocol is not None and i.is_ring_load

    def complete(self, step: int, group: int) -> bool:
        return self.signalled.get((step, group), (0, 0.0))[0] == self.expected

    def signal(self, step: int, group: int, seen: float) -> None:
        count, last = self.signalled.get((step, group), (0, 0.0))
        self.signalled[step, group] = (count + 1, max(last, seen))

    def earliest(self, warp: int, i: Instruction) -> float:
        """When nothing keeps the instruction back any more."""
        scheduler = warp % SCHEDULERS
        times = [self.issue_free[scheduler]]
        times += [max(self.released[warp][b]) for b in range(6) if i.wait >> b & 1]
        few = re.match(r"DEPBAR\.LE SB(\d), 0x([0-9a-f]+)", i.text)
        if few:  # all but the last so many loads of a barrier
            pending = sorted(self.released[warp][int(few[1])], reverse=True)
            times += pending[int(few[2], 16) :][:1]
        if i.name == "HMMA":
            times.append(self.mma_free[scheduler])
        elif i.name == "MUFU":
            times.append(self.special_free[scheduler])
        elif i.op.startswith("WARPGROUP.DEPBAR"):
            times.append(self.products[warp])
        return max(times)

    def issue(self, warp: int, step: int, i: Instruction, now: float) -> float:
        """Does what the instruction does; returns when the warp may issue its next one."""
        a, scheduler = self.assumed, warp % SCHEDULERS
        self.issue_free[scheduler] = now + 1
        after = now + max(1, i.stall)
        done, read = now + OTHER_LATENCY.get(i.name, USUAL_LATENCY), now + STORE_READ
        if (
            i.predicate is not None
            and warp % self.warps
            and (i.poll or i.name in (*ARRIVALS, "MEMBAR", "CCTL"))
        ):
            return after  # what one thread does for all
        pipe = self.wavefronts.get(i.address, 0.0)
        if i.name == "SHFL":
            pipe = 1
        elif i.name in ("LDG", "STG", "LD", "ST"):
            pipe = max(1, i.width // 4)
        if pipe:
            self.shared_free = max(now + PIPE_ENTRY, self.shared_free) + pipe
            read = self.shared_free
        if i.name == "HMMA":
            self.mma_free[scheduler] = now + a.mma_clocks
            done = now + a.mma
        elif i.name == "HGMMA":
            # Four schedulers each do their quarter, and the operands come from shared memory.
            self.mma_free[scheduler] = max(self.mma_free[scheduler], now) + _wgmma_clocks(i, a)
            done = max(self.mma_free[scheduler], self.shared_free) + a.mma
            self.products[warp] = max(self.products[warp], done)
        elif i.name == "MUFU":
            self.special_free[scheduler] = now + a.special_clocks
            done = now + a.special
        elif i.name in ("LDS", "LDSM", "SHFL"):
            latency = {"LDS": a.shared_load, "LDSM": a.ldmatrix, "SHFL": a.shuffle}[i.name]
            done = self.shared_free - 1 - PIPE_ENTRY + latency
        elif i.name in ("LDG", "LD"):
            done = self.load(warp, i, step, read)  # behind what holds the pipe
        elif i.is_fence:
            after = done = now + a.fence
        if self.signals(warp, i):
            queued = self.programs * a.red_per_program if self.protocol == "counter" else 0
            group = warp // self.warps
            self.signal(step + 1, group, max(now, read - STORE_READ) + a.store_visible + queued)
        if i.write != NO_BARRIER:
            self.release(warp, i.write, now, done)
        if i.read != NO_BARRIER:
            self.release(warp, i.read, now, read)
        return after

    def load(self, warp: int, i: Instruction, step: int, now: float) -> float:
        """When the value of a load from global memory is there."""
        a = self.assumed
        near = i.is_strong or i.address in self.near
        latency = a.l2_load if near else a.dram_load
        self.l2_free = max(self.l2_free, now) + LANES * i.width / a.l2_bytes_per_clock
        done = max(now + latency, self.l2_free)
        if self.polls(warp, i):
            _, visible = self.signalled[step + self.own, warp // self.warps]
            if now + latency / 2 < visible:
                done = max(done, visible + latency / 2 + a.poll_phase)
        return done

    def release(self, warp: int, barrier: int, now: float, done: float) -> None:
        pending = [t for t in self.released[warp][barrier] if t > now]
        self.released[warp][barrier] = [*pending, done]


def _wgmma_clocks(i: Instruction, assumed: SimpleNamespace) -> float:
    """A scheduler's share of an asynchronous product of 64 rows, by its multiply-adds; those of
    `mma_clocks` are 16 x 8 x 16 of 16 bits, or half as many of tf32."""
    shape = re.search(r"\.64x(\d+)x(\d+)", i.op)
    if shape is None:
        raise ValueError(f"expected HGMMA.64xNxK, got {i.op}")
    n, k = int(shape[1]), int(shape[2])
    return assumed.mma_clocks * n / 8 * (k / 8 if "TF32" in i.op else k / 16)
