"""How long a step takes: the warps of one program, instruction by instruction.

Facts, from the machine code: the order of the instructions, how many clocks a warp lets pass behind
each (stall), which barriers it waits for, which products, special functions and accesses to shared
memory there are, and the wavefronts of the latter. Assumed: `parameters`. The model:

- A warp belongs to one of four schedulers; each of them issues one instruction a clock.
- All share one pipe to shared memory, which an access holds for its wavefronts.
- Products (mma) and special functions (MUFU) of a scheduler follow each other at an interval.
- A load takes its latency, or longer where the bytes before it have not come yet.
- A block barrier opens when the last warp has come to it.
- All programs are in step: what this one has published, all others have at the same time.

Instruction caches always hit, and clocks of one step are those of the next.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from types import SimpleNamespace

from bench.step_cost.sass import NO_BARRIER, Instruction, TimeLoop

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
    """Warps that wait for what they publish only behind that."""


def simulate(
    loop: TimeLoop,
    wavefronts: dict[int, float],
    assumed: SimpleNamespace,
    *,
    warps: int,
    together: int = 1,
    steps: int = 4,
) -> Result:
    """Runs a few steps and times the last but one, when the first ones are over.

    Args:
        wavefronts: of the accesses to shared memory, by address of the instruction.
        assumed: `Parameters.at`.
        warps: of a program.
        together: programs on the multiprocessor, each of a group of its own.
    Raises:
        Deadlock: the step publishes only a part before it waits for all of it.
    """
    return _Multiprocessor(loop, wavefronts, assumed, warps, together).run(steps)


class _Multiprocessor:
    def __init__(self, loop, wavefronts, assumed, warps, together):
        self.step, self.near = loop.step, loop.near
        self.wavefronts, self.assumed = wavefronts, assumed
        self.warps, self.all_warps = warps, warps * together
        self.issue_free = [0.0] * SCHEDULERS
        self.mma_free = [0.0] * SCHEDULERS
        self.special_free = [0.0] * SCHEDULERS
        self.shared_free = self.l2_free = 0.0
        self.released = [[[0.0] for _ in range(6)] for _ in range(self.all_warps)]
        # Of each program: the warps at its block barrier, and their pause behind it.
        self.waiting: list[list[tuple[int, float]]] = [[] for _ in range(together)]
        self.products = [0.0] * self.all_warps  # when the asynchronous ones of a warp are done
        # How many stores for others a program makes in a step. Of each step and program: how many
        # there are, and when the others see the last of them.
        self.expected = warps * sum(i.is_publication for i in self.step)
        self.published = {(0, program): (self.expected, 0.0) for program in range(together)}
        self.parked: list[int] = []  # warps that poll for what is still to be published
        stores = [n for n, i in enumerate(self.step) if i.is_publication]
        polls = [n for n, i in enumerate(self.step) if i.is_ring_load]
        # Backward a step waits for its own stores, forward for those of the step before.
        self.own = bool(stores and polls and stores[0] < polls[0])

    def run(self, steps: int) -> Result:
        at = [(0, 0)] * self.all_warps  # step and position of each warp
        issued: list[list[float]] = []  # by the first warp, of each step
        queue: list[tuple[float, int, int]] = []  # when to ask a warp again; the oldest first
        asked = 0

        def ask(warp: int, when: float) -> None:
            nonlocal asked
            asked += 1
            heapq.heappush(queue, (when, asked, warp))

        for warp in range(self.all_warps):
            ask(warp, 0.0)
        while queue:
            now, _, warp = heapq.heappop(queue)
            step, position = at[warp]
            if step == steps:
                continue
            i = self.step[position]
            could = max(now, self.earliest(warp, i))
            if could > now:
                ask(warp, could)
                continue
            program = warp // self.warps
            if i.is_ring_load and self.count(step + self.own, program) < self.expected:
                self.parked.append(warp)
                continue
            if warp == 0 and position == 0:
                issued.append([])
            if warp == 0:
                issued[-1].append(now)
            after = self.issue(warp, step, i, now)
            if i.is_publication:
                for other in self.parked:
                    ask(other, now)
                self.parked = []
            position += 1
            if position == len(self.step):
                step, position, after = step + 1, 0, after + JUMP
            at[warp] = (step, position)
            if i.name != "BAR":
                ask(warp, after)
                continue
            waiting = self.waiting[program]
            waiting.append((warp, after - now))
            if len(waiting) == self.warps:
                for other, pause in waiting:
                    ask(other, now + max(pause, self.assumed.barrier))
                waiting.clear()
        if self.parked:
            raise Deadlock(
                f"{len(self.parked)} of {self.all_warps} warps wait for what they publish later"
            )
        # From the first instruction of one step to that of the next, whatever it waits for.
        start = issued[-2][0]
        return Result(issued[-1][0] - start, tuple(t - start for t in issued[-2]))

    def count(self, step: int, program: int) -> int:
        """The stores for others that there are."""
        return self.published.get((step, program), (0, 0.0))[0]

    def publish(self, step: int, program: int, seen: float) -> None:
        count, last = self.published.get((step, program), (0, 0.0))
        self.published[step, program] = (count + 1, max(last, seen))

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
        if i.is_publication:
            seen = max(now, read - STORE_READ) + a.store_visible
            self.publish(step + 1, warp // self.warps, seen)
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
        if i.is_ring_load and self.expected:
            _, visible = self.published[step + self.own, warp // self.warps]
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
