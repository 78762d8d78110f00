"""Which backend runs a call, and why.

    triton     the fused kernels of `fusedrnn.kernels`
    aten       torch's own kernels: cuDNN on a GPU, oneDNN or native code on a CPU
    loop       a time loop for the CPU, of few torch operators a step, with a backward of its own
    reference  plain torch operators

`auto`, the default, takes the first in that order that can run the call; on a CPU never triton,
and the loop before aten where it is the faster one (`loop.is_faster`). A backend is forced by a
module's `backend=`, else by `use_backend`, else by the environment variable FUSEDRNN_BACKEND (read
at import); a forced backend that cannot run a call raises.

Determinism: on the same device, with the same versions, the same call gives the same bits from
run to run, forward and backward, and with dropout and the other regularisers from the same seed.
triton promises it (its sums have one order; it adds no floating-point numbers by atomics), loop
and reference as far as torch's matrix products do, and aten where torch's kernels do: on a CPU,
and on a GPU with torch.use_deterministic_algorithms(True) and CUBLAS_WORKSPACE_CONFIG=:4096:8.
Across devices, backends, versions or batch sizes results agree to rounding, not in bits.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fusedrnn.backends import aten, loop, reference, triton
from fusedrnn.call import Call, directions
from fusedrnn.types import Backend

logger: logging.Logger = logging.getLogger("fusedrnn")

BACKENDS: tuple[Backend, ...] = ("triton", "aten", "loop", "reference")


def check_name(backend: str, source: str) -> str:
    """`backend`, if it names one. Raises ValueError that says where the name came from."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend


_default = check_name(os.environ.get("FUSEDRNN_BACKEND") or "auto", "FUSEDRNN_BACKEND")
_of_block: ContextVar[str | None] = ContextVar("fusedrnn_backend", default=None)
# torch.compile cannot read a context variable. It reads, and guards on, this plain global: the
# name given to the newest of the blocks that are open in the process, or else the default.
_backend_in_force = _default
_open_blocks: list[list[str]] = []  # each a list of its own, so that equal names stay apart
_blocks_lock = threading.Lock()


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Forces a backend for every module that has none of its own, in this thread or asyncio task.

    Other threads and tasks do not see it, and nothing of it is left when it ends, whatever the
    order in which blocks end. A thread that starts inside the block begins without it: those of
    torch.nn.DataParallel, and autograd's for a GPU, in which checkpoints run again, among them.
    Give such a module its own `backend=`.

    torch.compile cannot tell threads apart: a compiled function runs, or compiles again, for the
    newest block that is open in the process. That is the caller's own block, unless several
    threads use compiled functions in blocks of different names at one time.

    Args:
        backend: "auto", "triton", "aten", "loop" or "reference".
    Raises:
        ValueError: another name.
    """
    global _backend_in_force
    check_name(backend, "use_backend(backend)")
    if torch.compiler.is_compiling():  # a block inside a compiled function
        before, _backend_in_force = _backend_in_force, backend
        try:
            yield
        finally:
            _backend_in_force = before
        return
    outer, block = _of_block.get(), [backend]
    _of_block.set(backend)
    _open_or_close(block)
    try:
        yield
    finally:
        _of_block.set(outer)
        _open_or_close(block)


def _open_or_close(block: list[str]) -> None:
    global _backend_in_force
    with _blocks_lock:
        others = [other for other in _open_blocks if other is not block]
        _open_blocks[:] = [*others, block] if len(others) == len(_open_blocks) else others
        _backend_in_force = _open_blocks[-1][0] if _open_blocks else _default


class Explanation(NamedTuple):
    """The backend that would run a call, and what every other one has against it."""

    backend: str
    because: str
    passed_over: dict[str, str]
    call: Call

    def __str__(self) -> str:
        call, spec = self.call, self.call.spec
        flags = [n for n in ("packed", "lengths", "reset", "needs_grad") if getattr(call, n)]
        flags += [name for name in call.loop_features if name not in flags]
        lines = [
            f"{spec.cell}: {spec.num_layers} layer(s) x {directions(spec)} direction(s), "
            f"T={call.T} B={call.B} I={spec.input_size} H={spec.hidden_sizes or spec.hidden_size}"
            + (f" P={spec.proj_size}" if spec.proj_size else "")
            + f", {str(call.dtype).removeprefix('torch.')} on {call.device.type}"
            + (f" ({', '.join(flags)})" if flags else ""),
            f"  runs on  {self.backend}: {self.because}",
        ]
        lines += [f"  not on   {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


REFUSES = {
    "triton": triton.refuses,
    "aten": aten.refuses,
    "loop": loop.refuses,
    "reference": reference.refuses,
}

BECAUSE = {
    "triton": "one fused launch per layer and pass",
    "aten": "torch's own kernels for this device",
    "loop": "a time loop for the CPU, with a backward of its own",
    "reference": "plain torch operators run everything",
}


def forced_backend(backend: str | None) -> str:
    """The name in force: the module's own, else the block's, else the environment's."""
    if backend is not None:
        return check_name(backend, "backend")
    return _backend_in_force if torch.compiler.is_compiling() else _of_block.get() or _default


def select(call: Call) -> str:
    """The backend that runs `call`.

    Raises:
        RuntimeError: a backend is forced and cannot run it; the message says why.
    """
    name, device = forced_backend(call.spec.backend), call.device.type
    if name != "auto":
        refusal = REFUSES[name](call)
        if refusal:
            raise RuntimeError(
                f"backend {name!r} was asked for and cannot run this call: {refusal}"
            )
        return name
    order = BACKENDS
    if device == "cpu":
        order = ("loop", "aten", "reference") if loop.is_faster(call) else BACKENDS[1:]
    name = next(name for name in order if REFUSES[name](call) is None)
    if device == "cuda" and name != "triton" and not torch.compiler.is_compiling():
        _warn_once(name, REFUSES["triton"](call))
    return name


@functools.cache
def _warn_once(backend: str, why: str | None) -> None:
    logger.warning("a call falls back from the fused kernels to %s: %s", backend, why)


def explain_call(call: Call) -> Explanation:
    """What `select` decides for `call`, with the reasons."""
    chosen, forced = select(call), forced_backend(call.spec.backend)
    passed_over = {}
    for name in BACKENDS:
        if name != chosen:
            refusal = REFUSES[name](call)
            if refusal is None and forced != "auto":
                refusal = f"{forced} is forced"
            elif refusal is None and name == "triton":
                refusal = "on a cpu the interpreter runs only when forced: it is for tests"
            passed_over[name] = refusal or f"{chosen} is faster and comes first"
    because = BECAUSE[chosen] if forced == "auto" else f"forced; {BECAUSE[chosen]}"
    return Explanation(chosen, because, passed_over, call)
