"""A happens-before race detector for the programs of one launch.

It sees every access to global memory, and asks of each whether all conflicting accesses of
other programs are ordered before it by something that the kernel said, not by the order in
which the interpreter happened to run.

A program is many threads, and only a block barrier orders them. So a program's time is the
number of barriers it has passed, its *epoch*:

- a release publishes what the program knew and did before its last barrier, since the thread
  that releases speaks for the others only as far as a barrier has made them meet;
- an atomic that acquires takes effect at the next barrier, since only one thread acquired;
- a load with acquire, which every thread makes, takes effect at once;
- relaxed atomics and volatile loads order nothing.

Every program has two clocks. `seen[p][q]`: the last epoch of q whose *stores* p may read.
`done[p][q]`: the last epoch of q whose *loads* are known to be over, so that p may overwrite
what they read. An acquire moves both.

A ring whose values are their own flags (declared with `Detector.polled`) is read and written at
the same time, and has rules of its own:

- A cell takes a value only where it holds the sentinel: else a reader may take the old for the new.
- Who polls a cell must have seen the store that put the sentinel back: else it may still find the
  value before that.
- Reading another program's value orders no stores; but it shows that its writer's loads were over,
  because the value was computed from all that its writer had polled, by all threads of the writer.
  `taken[p][q]` counts those, in *turns*: the stores that each program has made to such a ring.
- Whoever stores into a cell that may be read by a turn it has not heard of, is too early.

The detector also demands that what another program wrote in this launch is read past L1, that a
polled ring is read volatile, that a program does not read back across its threads what it has
stored since its last barrier, and that no access leaves the tensors of the launch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton._C.libtriton import ir

_RELEASE = {ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE}
_ACQUIRE = {ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE}
_WIDE = {ir.MEM_SYNC_SCOPE.GPU, ir.MEM_SYNC_SCOPE.SYSTEM}
_NOBODY = -1


class Race(Exception):
    """Two programs access the same memory, and nothing orders them."""


@dataclass
class Access:
    """One tile of addresses, as a program reads or writes it."""

    program: int
    pointers: Any
    mask: Any
    volatile: bool = False
    bypass: bool = False
    values: np.ndarray | None = None  # what is stored, where that matters

    def __post_init__(self) -> None:
        addresses = self.pointers.data
        if self.mask is not None:
            # The interpreter spreads a scalar mask as integers.
            addresses = addresses[np.broadcast_to(self.mask.data, addresses.shape).astype(bool)]
        self.addresses = addresses.reshape(-1)
        self.size = max(8, self.pointers.get_element_ty().primitive_bitwidth) // 8
        # Equal tiles have equal layouts, so each thread meets its own elements again.
        self.tile = hash((self.pointers.data.shape, self.addresses.tobytes()))


@dataclass
class _Region:
    """The storage of a tensor argument and its shadow, cell by cell."""

    name: str
    base: int
    n_bytes: int
    cell: int  # bytes
    n_programs: int
    sentinel: int | None  # the bits of it, in a polled ring
    writer: np.ndarray = field(init=False)
    write_epoch: np.ndarray = field(init=False)
    write: np.ndarray = field(init=False)  # number of the write
    atomic: np.ndarray = field(init=False)  # whether it was an atomic
    read_epoch: np.ndarray = field(init=False)  # by each program, 0 where never
    # Of a polled ring, by each program: what it read last, and may read again; and what of that
    # has been overwritten since.
    pending: np.ndarray = field(init=False)
    doomed: np.ndarray = field(init=False)
    armed: np.ndarray = field(init=False)  # whether it holds the sentinel
    armer: np.ndarray = field(init=False)  # who put it back last, and when
    arm_epoch: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = -(-self.n_bytes // self.cell)
        self.writer = np.full(n, _NOBODY, np.int32)
        self.write_epoch = np.zeros(n, np.int32)
        self.write = np.zeros(n, np.int64)
        self.atomic = np.zeros(n, bool)
        self.read_epoch = np.zeros((self.n_programs, n), np.int32)
        n = n if self.polled else 0
        self.pending = np.zeros((self.n_programs, n), bool)
        self.doomed = np.zeros_like(self.pending)
        self.armed = np.zeros(n, bool)
        self.armer = np.full(n, _NOBODY, np.int32)
        self.arm_epoch = np.zeros(n, np.int32)

    @property
    def polled(self) -> bool:
        return self.sentinel is not None

    def cells(self, access: Access) -> np.ndarray:
        offsets = access.addresses.astype(np.int64) - self.base
        if offsets.min() < 0 or offsets.max() + access.size > self.n_bytes:
            raise IndexError(f"program {access.program} leaves {self.name}")
        first = offsets // self.cell
        width = max(1, access.size // self.cell)
        return (first[:, None] + np.arange(width)).reshape(-1)


class Detector:
    """Watches launches; `polled` and `error_word` declare what its rules cannot know."""

    def __init__(self) -> None:
        self._polled: list[torch.Tensor] = []
        self._error_words: list[torch.Tensor] = []
        self.regions: list[_Region] = []

    def polled(self, ring: torch.Tensor) -> None:
        """Declares a ring in which -0.0 stands where there is no value yet."""
        self._polled.append(ring)

    def error_word(self, words: torch.Tensor) -> None:
        """Declares words, [n], that a time-out sets. Anybody may; and nothing holds after it."""
        self._error_words.append(words)

    def begin(self, n_programs: int, tensors: list[torch.Tensor]) -> None:
        """Forgets the last launch: between launches everything is ordered."""
        polled = {t.untyped_storage().data_ptr(): t for t in self._polled}
        self.ignored = {
            words.data_ptr() + n * words.stride(0) * words.element_size()
            for words in self._error_words
            for n in range(words.numel())
        }
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.regions = [
            _Region(
                name=" = ".join(f"{t.dtype} {list(t.shape)}" for t in views),
                base=base,
                n_bytes=views[0].untyped_storage().nbytes(),
                cell=min(t.element_size() for t in views),
                n_programs=n_programs,
                sentinel=1 << 8 * views[0].element_size() - 1 if base in polled else None,
            )
            for base, views in storages.items()
        ]
        for region in self.regions:
            if region.polled:
                ring = polled[region.base]  # of one launch; those of others may lie beside it
                ring = ring.new_empty(0).set_(ring.untyped_storage())
                region.armed = ((ring == 0) & ring.signbit()).numpy()
        self.epoch = np.ones(n_programs, np.int32)
        self.seen = np.zeros((n_programs, n_programs), np.int32)
        self.done = np.zeros((n_programs, n_programs), np.int32)
        self.coming_seen = np.zeros_like(self.seen)  # acquired since the last barrier
        self.coming_done = np.zeros_like(self.done)
        self.released: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by address
        self.numbers = itertools.count(1)
        self.tile_of: dict[int, int] = {}  # by number of the write
        self.turn = np.ones(n_programs, np.int32)
        self.taken = np.zeros((n_programs, n_programs), np.int32)
        self.coming_taken = np.zeros_like(self.taken)  # read since the last turn
        self.taken_of: dict[int, np.ndarray] = {}  # what a polled value shows, by number

    # The four kinds of event.

    def load(self, access: Access) -> None:
        found = self._find(access)
        if found is None:
            return
        region, cells = found
        me = access.program
        writer, epoch = region.writer[cells], region.write_epoch[cells]
        foreign = (writer != me) & (writer != _NOBODY)
        if region.polled:
            if not access.volatile:
                self._report(region, access, "reads a polled ring without volatile", foreign)
            armer = region.armer[cells]
            unseen = (armer != me) & (region.arm_epoch[cells] > self.seen[me][armer])
            self._report(region, access, "polls what may not be taken back yet", unseen)
            for number in np.unique(region.write[cells][foreign]):
                np.maximum(
                    self.coming_taken[me], self.taken_of[int(number)], out=self.coming_taken[me]
                )
            region.pending[me, cells] = True
            region.doomed[me, cells] = False
        else:
            if not access.bypass and foreign.any():
                self._report(region, access, "reads through L1 what another wrote", foreign)
            # Volatile is a relaxed atomic load: beside atomics it races with nothing.
            strong = region.atomic[cells] & access.volatile
            unordered = foreign & ~strong & (epoch > self.seen[me][writer])
            self._report(region, access, "reads what another may be writing", unordered)
            own = (writer == me) & (epoch == self.epoch[me]) & ~region.atomic[cells]
            for number in np.unique(region.write[cells][own]):
                if self.tile_of[int(number)] != access.tile:
                    self._report(region, access, "reads back its own stores, no barrier since", own)
            region.read_epoch[me, cells] = self.epoch[me]

    def store(self, access: Access) -> None:
        found = self._find(access)
        if found is None:
            return
        region, cells = found
        if region.polled:
            self._store_polled(region, cells, access)
            return
        self._check_write(region, cells, access)
        number = next(self.numbers)
        self.tile_of[number] = access.tile
        self._note_write(region, cells, access, number, atomic=False)

    def _store_polled(self, region: _Region, cells: np.ndarray, access: Access) -> None:
        me = access.program
        if access.size != region.cell or access.values is None:
            raise Race(f"program {me} stores part of a word of {region.name}, or by a plain store")
        back = access.values.view(f"u{access.size}") == region.sentinel
        self._accept(region, access)
        np.maximum(self.taken[me], self.coming_taken[me], out=self.taken[me])
        self._check_write(region, cells, access)
        over = ~region.armed[cells] & ~back
        self._report(region, access, "stores over what was not taken back", over)
        shown = self.taken[me].copy()
        shown[me] = self.turn[me]
        for which, taken in ((back, np.zeros_like(shown)), (~back, shown)):
            number = next(self.numbers)
            self.taken_of[number] = taken
            self._note_write(region, cells[which], access, number, atomic=False)
        region.armed[cells] = back
        region.armer[cells[back]] = me
        region.arm_epoch[cells[back]] = self.epoch[me]
        self.turn[me] += 1

    def atomic(self, access: Access, sem: Any, scope: Any) -> None:
        found = self._find(access)
        if found is None:
            return
        region, cells = found
        me = access.program
        plain = (region.writer[cells] != me) & (region.writer[cells] != _NOBODY)
        plain &= ~region.atomic[cells]
        unordered = plain & (region.write_epoch[cells] > self.seen[me][region.writer[cells]])
        self._report(region, access, "changes by atomic what another may be storing", unordered)
        if sem in _ACQUIRE and scope in _WIDE:
            self._take_released(me, access)
        for address in access.addresses.tolist():
            if sem in _RELEASE and scope in _WIDE:
                new = self._published(self.seen, me), self._published(self.done, me)
                old = self.released.get(address, new)
                self.released[address] = np.maximum(old[0], new[0]), np.maximum(old[1], new[1])
        self._note_write(region, cells, access, next(self.numbers), atomic=True)

    def acquire(self, access: Access) -> None:
        """Beside the load: that it acquires, for every thread."""
        me = access.program
        self._take_released(me, access)
        self._know_what_came(me)

    def barrier(self, program: int) -> None:
        self.epoch[program] += 1
        self._know_what_came(program)

    def _take_released(self, program: int, access: Access) -> None:
        for address in access.addresses.tolist():
            if address in self.released:
                seen, done = self.released[address]
                np.maximum(self.coming_seen[program], seen, out=self.coming_seen[program])
                np.maximum(self.coming_done[program], done, out=self.coming_done[program])

    def _know_what_came(self, program: int) -> None:
        np.maximum(self.seen[program], self.coming_seen[program], out=self.seen[program])
        np.maximum(self.done[program], self.coming_done[program], out=self.done[program])

    # What they share.

    def _find(self, access: Access) -> tuple[_Region, np.ndarray] | None:
        if not access.addresses.size:
            return None
        address = int(access.addresses[0])
        if address in self.ignored:
            return None
        for region in self.regions:
            if region.base <= address < region.base + region.n_bytes:
                return region, region.cells(access)
        raise IndexError(f"program {access.program} accesses no tensor of this launch")

    def _published(self, clock: np.ndarray, program: int) -> np.ndarray:
        """What this program can vouch for: the epochs that its last barrier closed."""
        vouched = clock[program].copy()
        vouched[program] = self.epoch[program] - 1
        return vouched

    def _check_write(self, region: _Region, cells: np.ndarray, access: Access) -> None:
        me = access.program
        writer = region.writer[cells]
        foreign = (writer != me) & (writer != _NOBODY)
        unordered = foreign & (region.write_epoch[cells] > self.seen[me][writer])
        self._report(region, access, "overwrites what another may be writing", unordered)
        over = self.taken if region.polled else self.done
        reading = region.read_epoch[:, cells] > over[me][:, None]
        reading[me] = False
        self._report(region, access, "overwrites what another may be reading", reading.any(0))
        if region.polled:
            region.doomed[:, cells] |= region.pending[:, cells]
            region.doomed[me] = False

    def _accept(self, region: _Region, access: Access) -> None:
        """The program polls no more: what it read last is what it takes.

        A poll that fails may meet the very store for which it waits. So whether a store came
        too early for a reader shows only when the reader goes on instead of polling again.
        """
        me = access.program
        doomed = region.doomed[me] & region.pending[me]
        self._report(region, access, "was still reading what was overwritten", doomed)
        region.read_epoch[me, region.pending[me]] = self.turn[me]
        region.pending[me] = False

    def _note_write(
        self, region: _Region, cells: np.ndarray, access: Access, number: int, *, atomic: bool
    ) -> None:
        region.writer[cells] = access.program
        region.write_epoch[cells] = self.epoch[access.program]
        region.write[cells] = number
        region.atomic[cells] = atomic

    def _report(self, region: _Region, access: Access, what: str, where: np.ndarray) -> None:
        if not where.any() or any(bool(word.any()) for word in self._error_words):
            return
        raise Race(
            f"program {access.program} {what}: {region.name}, {int(where.sum())} of "
            f"{where.size} elements, the first at {int(np.argmax(where))}"
        )
