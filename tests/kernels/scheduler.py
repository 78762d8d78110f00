"""Runs the programs of one launch interleaved, in Triton's interpreter.

The interpreter runs one program after the other, so a program that waits for its neighbours
would wait for ever. Here every program is a thread, and one baton goes round: a program keeps
it until it reaches an atomic, a volatile load or a load that bypasses L1 (whatever could see
another program's work), and there a seeded choice says who goes on. Relaxed stores, which promise
nothing to those who see only some of them, become visible in two parts, dealt out at random. The
same seed gives the same interleaving.

    with cooperative(seed=3, detector=Detector()):
        kernel[grid](...)

Workspaces from `sync.workspaces` made inside the block are declared to the detector by themselves.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from inline_asm import run_assembly
from races import Access, Detector
from triton._C.libtriton import ir

from fusedrnn.kernels import sync

BUILDER = interpreter.interpreter_builder
IDLE_POLLS = 3  # a program that has polled in vain so often is waiting, not reading twice


class Deadlock(Exception):
    """Every program that has not finished waits, and nothing changes any more."""


class _Stop(BaseException):
    """Unwinds the other programs of a launch that has failed; no kernel catches it."""


@dataclass
class _Program:
    index: tuple[int, int, int]
    run: Callable[[], None]
    weight: float
    baton: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    version: int = -1  # of memory, when the polls below were made
    polls: set[Any] = field(default_factory=set)
    idle: int = 0  # polls repeated at this version


class _Launch:
    """One grid. `step_aside` is called by whoever holds the baton."""

    def __init__(self, seed: int, on_deadlock: str):
        self.random = random.Random(seed)
        self.on_deadlock = on_deadlock
        # Some interleavings are even, some let a program run far ahead of the others, and some
        # change hands rarely: each finds mistakes that the others hide.
        self.spread = self.random.choice((0.0, 0.5, 1.5))
        self.stay = self.random.choice((0.0, 0.0, 0.7))
        self.programs: list[_Program] = []
        self.current = 0
        self.version = 0
        self.failure: BaseException | None = None
        self.finished = threading.Event()

    def add(self, index: tuple[int, int, int], run: Callable[[], None]) -> None:
        weight = 10 ** self.random.uniform(-self.spread, self.spread)
        self.programs.append(_Program(index, run, weight))

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._life, args=(number,), daemon=True)
            for number in range(len(self.programs))
        ]
        for program in self.programs:
            program.baton.acquire()
        for thread in threads:
            thread.start()
        self._hand_over(self._choose())
        self.finished.wait()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def step_aside(self, poll: Any) -> None:
        """Lets others run before the current program makes the access `poll`."""
        me = self.programs[self.current]
        if me.version != self.version:
            me.version, me.idle = self.version, 0
            me.polls.clear()
        if poll in me.polls:
            me.idle += 1
        me.polls.add(poll)
        number = self.current
        if self.random.random() < self.stay and not me.idle:
            return
        chosen = self._choose()
        if chosen != number:
            self._hand_over(chosen)
            self._await_baton(number)

    def _life(self, number: int) -> None:
        program = self.programs[number]
        try:
            self._await_baton(number)
            program.run()
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        program.done = True
        if all(p.done for p in self.programs):
            self.finished.set()
        else:
            try:
                self._hand_over(self._choose())
            except Deadlock as error:
                self.failure = self.failure or error
                self._hand_over(self._choose())

    def _await_baton(self, number: int) -> None:
        self.programs[number].baton.acquire()
        if self.failure is not None:
            raise _Stop
        BUILDER.grid_idx = self.programs[number].index

    def _hand_over(self, number: int) -> None:
        self.current = number
        self.programs[number].baton.release()

    def _choose(self) -> int:
        live = [n for n, p in enumerate(self.programs) if not p.done]
        if self.failure is not None:
            return live[0]
        ready = [
            n for n in live if not self.programs[n].idle or self.programs[n].version != self.version
        ]
        if not ready:
            idle = min(self.programs[n].idle for n in live)
            if self.on_deadlock == "raise" and idle >= IDLE_POLLS:
                waiting = [self.programs[n].index for n in live]
                raise Deadlock(f"programs {waiting} wait, and nobody is left to wake them")
            ready = live
        return self.random.choices(ready, [self.programs[n].weight for n in ready])[0]


class _Collector:
    """Stands in for the kernel in the interpreter's loop over the grid.

    It remembers every program, and at the end of the grid runs them all.
    """

    def __init__(self, kernel: Callable, run_all: Callable[[list], None]):
        self.kernel = kernel
        self.run_all = run_all
        self.programs: list[tuple[tuple[int, int, int], Callable[[], None]]] = []
        # What the interpreter asks of a kernel before it runs it.
        self.__name__ = kernel.__name__
        self.__globals__ = kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        self.programs.append((BUILDER.grid_idx, lambda: self.kernel(**arguments)))
        if BUILDER.grid_idx == tuple(extent - 1 for extent in BUILDER.grid_dim):
            self.run_all(self.programs)


class _Session:
    """What the interpreter calls in place of its own memory operations."""

    def __init__(self, seed: int | None, detector: Detector | None, on_deadlock: str):
        self.seed = seed
        self.detector = detector
        self.on_deadlock = on_deadlock
        self.launch: _Launch | None = None
        self.program = 0
        self.failure: BaseException | None = None
        self.allocate = sync.workspaces
        self.load = BUILDER.create_masked_load
        self.store = BUILDER.create_masked_store
        self.rmw = BUILDER.create_atomic_rmw
        self.cas = BUILDER.create_atomic_cas

    def workspaces(self, launches: int, **sizes: Any) -> Iterator[sync.Exchange]:
        """Workspaces that the detector knows."""
        for space in self.allocate(launches, **sizes):
            if self.detector is not None:
                self.detector.error_word(space.error)
                self.detector.error_word(space.signal[:, sync._GAVE_UP.value])
                self.detector.polled(space.ring)
            yield space

    # The grid.

    def execute(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors((*args, *kwargs.values())))
        executor.fn = _Collector(executor.fn, lambda programs: self.run_all(programs, tensors))
        return _EXECUTE(executor, *args, **kwargs)

    def run_all(self, programs: list, tensors: list) -> None:
        if self.detector is not None:
            self.detector.begin(len(programs), tensors)
        # Every call of a device function patches the whole language again, which takes most of
        # the interpreter's time. Once is enough: for kernels, which see triton.language, and for
        # the standard library, which sees its core.
        patch = interpreter._patch_lang
        scope = patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
        try:
            if self.seed is None:
                for self.program, (index, run) in enumerate(programs):
                    BUILDER.grid_idx = index
                    run()
            else:
                self.launch = _Launch(self.seed, self.on_deadlock)
                for index, run in programs:
                    self.launch.add(index, run)
                self.launch.run()
        except BaseException as error:
            self.failure = _root(error)
            raise
        finally:
            self.launch = None
            interpreter._patch_lang = patch
            scope.restore()

    def current(self) -> int:
        return self.launch.current if self.launch is not None else self.program

    def step_aside(self, kind: str, pointers: Any) -> None:
        if self.launch is not None:
            self.launch.step_aside((kind, pointers.data.tobytes()))

    def wrote(self) -> None:
        if self.launch is not None:
            self.launch.version += 1

    # Memory. Triton 3.9 merges the two cache arguments into one policy, made of their names.

    def masked_load(self, pointers: Any, mask: Any, other: Any, cache: Any, *rest: Any) -> Any:
        volatile = bool(rest[-1])
        bypass = volatile or cache in (ir.CACHE_MODIFIER.CG, "cg")
        if bypass:
            self.step_aside("load", pointers)
        if self.detector is not None:
            access = Access(self.current(), pointers, mask, volatile=volatile, bypass=bypass)
            self.detector.load(access)
        return self.load(pointers, mask, other, cache, *rest)

    def masked_store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if self.detector is not None:
            self.detector.store(Access(self.current(), pointers, mask))
        self.wrote()
        return self.store(pointers, value, mask, *rest)

    # And what the assembly does: loads and stores of one tile of addresses, past L1.

    def relaxed_load(self, pointers: Any, acquire: bool = False) -> np.ndarray:
        self.step_aside("load", pointers)
        if self.detector is not None:
            access = Access(self.current(), pointers, None, volatile=True, bypass=True)
            self.detector.load(access)
            if acquire:
                self.detector.acquire(access)
        every = np.ones(pointers.data.shape, bool)
        kind = interpreter._get_np_dtype(pointers.get_element_ty())
        return interpreter._interpreter.load(pointers.data, every, every.astype(kind), kind)

    def relaxed_store(self, pointers: Any, values: np.ndarray) -> None:
        if self.launch is None:
            self._store_part(pointers, values, np.ones(values.shape, bool))
            return
        first = np.array(self.launch.random.choices((True, False), k=values.size))
        for part in (first, ~first):
            self._store_part(pointers, values, part.reshape(values.shape))
            self.step_aside("store", pointers)

    def _store_part(self, pointers: Any, values: np.ndarray, part: np.ndarray) -> None:
        if self.detector is not None:
            mask = interpreter.TensorHandle(part, tl.int1)
            self.detector.store(Access(self.current(), pointers, mask, values=values[part]))
        self.wrote()
        interpreter._interpreter.store(pointers.data, values, part)

    def atomic_rmw(
        self, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        self.step_aside("atomic", pointers)
        if self.detector is not None:
            self.detector.atomic(Access(self.current(), pointers, mask), sem, scope)
        if value.data.any():
            self.wrote()
        return self.rmw(operation, pointers, value, mask, sem, scope)

    def atomic_cas(self, pointers: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        self.step_aside("atomic", pointers)
        if self.detector is not None:
            self.detector.atomic(Access(self.current(), pointers, None), sem, scope)
        self.wrote()
        return self.cas(pointers, expected, value, sem, scope)

    def barrier(self) -> None:
        if self.detector is not None:
            self.detector.barrier(self.current())


_EXECUTE = interpreter.GridExecutor.__call__


def _tensors(arguments: tuple) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "untyped_storage"):
            yield argument


def _root(error: BaseException) -> BaseException:
    """What a program raised, without the interpreter's wrapper for every call on the way."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def cooperative(
    seed: int | None, *, detector: Detector | None = None, on_deadlock: str = "raise"
) -> Iterator[None]:
    """Runs the launches inside the block interleaved, and under the detector if there is one.

    Args:
        seed: which interleaving; None for one program after the other, without switches.
        detector: sees every access to global memory, and raises Race.
        on_deadlock: "raise" Deadlock, or let all "spin" until their own limit.
    """
    if on_deadlock not in ("raise", "spin"):
        raise ValueError(f"on_deadlock must be 'raise' or 'spin', got {on_deadlock!r}")
    session = _Session(seed, detector, on_deadlock)
    hooks = {
        "create_masked_load": session.masked_load,
        "create_masked_store": session.masked_store,
        "create_atomic_rmw": session.atomic_rmw,
        "create_atomic_cas": session.atomic_cas,
        "create_barrier": session.barrier,
        "create_inline_asm": functools.partial(run_assembly, session),
    }
    if hasattr(BUILDER, "get_cache_policy"):
        hooks["get_cache_policy"] = lambda cache_modifier, eviction_policy: cache_modifier
    for name, hook in hooks.items():
        setattr(BUILDER, name, hook)
    interpreter.GridExecutor.__call__ = lambda executor, *args, **kwargs: session.execute(
        executor, *args, **kwargs
    )
    sync.workspaces = session.workspaces
    try:
        yield
    except interpreter.InterpreterError as error:
        # The interpreter wraps whatever a program raises; the cause says more.
        raise (session.failure or error) from None
    finally:
        sync.workspaces = session.allocate
        interpreter.GridExecutor.__call__ = _EXECUTE
        for name in hooks:
            delattr(BUILDER, name)
