"""Which backend runs a call, and why.

    triton     the fused kernels of `fusedrnn.kernels`
    aten       torch's own kernels: cuDNN on a GPU, oneDNN or native code on a CPU
    reference  plain torch operators

`auto`, the default, takes the first in that order that can run the call, but aten where it was
measured to be faster than the kernels (`fusedrnn.measured`). A backend is forced
by a module's `backend=`, else by `use_backend`, else by the environment variable
FUSEDRNN_BACKEND (read at import); a forced backend that cannot run a call raises.

Determinism: on the same device, with the same versions, the same call gives the same bits from
run to run, forward and backward, and with dropout and the other regularisers from the same seed.
triton promises it (its sums have one order; it adds no floating-point numbers by atomics),
reference as far as torch's matrix products do, and aten where torch's kernels do: on a CPU, and
on a GPU with torch.use_deterministic_algorithms(True) and CUBLAS_WORKSPACE_CONFIG=:4096:8. Across
devices, backends, versions or batch sizes results agree to rounding, not in bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import operator
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fusedrnn import cells, measured
from fusedrnn.types import Backend

logger: logging.Logger = logging.getLogger("fusedrnn")

BACKENDS: tuple[Backend, ...] = ("triton", "aten", "reference")
OLDEST_TRITON = (3, 6)
# What a time loop may have to do besides the cell: in `Call.inside`.
INSIDE = {
    "reset": "resets inside a sequence",
    "reset_state": "resets to a given state",
    "recurrent_dropout": "recurrent dropout",
    "zoneout": "zoneout",
    "clip_gradient": "gradient clipping inside the loop",
}
# "states", all of them at all steps, is had in other ways beside every backend's loop.
STATES_COMPILED = "torch.compile sees the states of all steps only in plain torch operators"
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_name(backend: str, source: str) -> str:
    """`backend`, if it names one. Raises ValueError that says where the name came from."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend


_default = check_name(os.environ.get("FUSEDRNN_BACKEND") or "auto", "FUSEDRNN_BACKEND")
_of_block: ContextVar[str | None] = ContextVar("fusedrnn_backend", default=None)
# torch.compile cannot read a context variable. It reads, and guards on, this plain global: the
# name given to the newest of the blocks that are open in the process, or else the default.
_in_force = _default
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
        backend: "auto", "triton", "aten" or "reference".
    Raises:
        ValueError: another name.
    """
    global _in_force
    check_name(backend, "use_backend(backend)")
    if torch.compiler.is_compiling():  # a block inside a compiled function
        before, _in_force = _in_force, backend
        try:
            yield
        finally:
            _in_force = before
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
    global _in_force
    with _blocks_lock:
        others = [other for other in _open_blocks if other is not block]
        _open_blocks[:] = [*others, block] if len(others) == len(_open_blocks) else others
        _in_force = _open_blocks[-1][0] if _open_blocks else _default


class Call(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it."""

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    directions: int = 1
    proj_size: int = 0
    packed: bool = False
    lengths: bool = False
    reset: bool = False
    needs_grad: bool = False
    transformed: bool = False
    device_index: int | None = None
    inside: tuple[str, ...] = ()
    autocast: bool = False  # float32 tensors, of which autocast makes `dtype`


class Explanation(NamedTuple):
    """The backend that would run a call, and what every other one has against it."""

    backend: str
    because: str
    passed_over: dict[str, str]
    call: Call

    def __str__(self) -> str:
        call = self.call
        extras = [
            name for name in ("packed", "lengths", "reset", "needs_grad") if getattr(call, name)
        ]
        extras += [name for name in call.inside if name not in extras]
        lines = [
            f"{call.cell}: {call.num_layers} layer(s) x {call.directions} direction(s), "
            f"T={call.T} B={call.B} I={call.input_size} H={call.hidden_size}"
            + (f" P={call.proj_size}" if call.proj_size else "")
            + f", {str(call.dtype).removeprefix('torch.')} on {call.device}"
            + (f" ({', '.join(extras)})" if extras else ""),
            f"  runs on  {self.backend}: {self.because}",
        ]
        lines += [f"  not on   {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


def triton_version() -> str | None:
    """The version of the triton that Python would import, or None if that has none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Distributions of other names hold a package triton too: triton-windows, ROCm's, XPU's.
        return getattr(importlib.import_module("triton"), "__version__", None)


def _triton_missing() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    version = triton_version()
    if version is None:
        return "the package named triton here is not the compiler: it has no version"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old, {oldest} or newer is needed"
    return None


# Found out once, at import, so that torch.compile need not trace the search.
TRITON_MISSING = _triton_missing()


def interpreted() -> bool:
    """Whether Triton's interpreter, which runs kernels on a CPU, is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refuses(call: Call) -> str | None:
    if TRITON_MISSING:
        return TRITON_MISSING
    if call.transformed:
        return "torch.func transforms and forward-mode AD need plain torch operators"
    if call.device == "cpu" and not interpreted():
        return "the tensors are on the cpu (TRITON_INTERPRET=1 would interpret the kernels there)"
    if call.device not in ("cpu", "cuda"):
        return f"the kernels run on cuda devices, not on {call.device}"
    if call.dtype not in TRITON_DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, not {call.dtype}"
    if call.proj_size:
        return f"projections are not fused (proj_size={call.proj_size})"
    if "states" in call.inside and torch.compiler.is_compiling():
        return STATES_COMPILED
    if call.B == 0 or call.T == 0:
        return f"there is nothing to launch (T={call.T}, B={call.B})"
    if call.device == "cuda":
        H = operator.index(call.hidden_size)  # a number, where torch.compile has a symbol
        return _no_plan(call.cell, call.dtype, H, call.directions, call.device_index or 0)
    return None


def _no_plan(cell: str, dtype: torch.dtype, H: int, D: int, index: int) -> str | None:
    """Why the kernels cannot run such a layer on that CUDA device, or None."""
    if torch.version.hip:
        return "the waits of the kernels are not proven on AMD GPUs"
    from fusedrnn.kernels import refusal

    return refusal(cells.get(cell), dtype, H, D, torch.device("cuda", index))


def lstm_autocast_failure(dtype: torch.dtype, *, training: bool) -> str | None:
    """What torch's LSTM says on this processor to float32 tensors under autocast to `dtype`, or
    None where it computes.

    It takes oneDNN for float32, and finds out too late that autocast has made it a dtype for
    which oneDNN has no kernel here. No query tells beforehand, so one time step is tried.
    """
    return _try_lstm(dtype, training, torch._C._get_mkldnn_enabled())


# torch.compile calls these and takes the answer for a constant, as with the decorator
# torch.compiler.assume_constant_result, which would import all of torch._dynamo to set this.
_no_plan._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
lstm_autocast_failure._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _try_lstm(dtype: torch.dtype, training: bool, onednn: bool) -> str | None:
    # In a thread of its own: what the caller is in (a trace, a mode, hooks of a checkpoint) would
    # take part in it, and all that is a thread's.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_failure_of_lstm, dtype, training).result()


def _failure_of_lstm(dtype: torch.dtype, training: bool) -> str | None:
    like = {"device": "cpu", "dtype": torch.float32}
    x = torch.zeros(1, 1, 1, **like, requires_grad=training)
    weights = [torch.zeros(4, 1, **like) for _ in range(2)]
    state = [torch.zeros(1, 1, 1, **like) for _ in range(2)]
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=dtype):
        try:
            output, *_ = torch.lstm(x, state, weights, False, 1, 0.0, training, False, False)
            if training:
                torch.autograd.grad(output.sum(), x)
        except RuntimeError as error:
            return str(error).split(". ")[0]
    return None


def fp32_precision() -> str:
    """ "tf32" or "ieee": what torch's switch for cuDNN's recurrent kernels asks of float32."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"  # pyright: ignore


def measured_slower(call: Call) -> str | None:
    """Why `auto` leaves to aten a call that the kernels could run: a recorded measurement.

    A compiled graph serves many T and B with one choice, and takes the kernels.
    """
    if call.device != "cuda" or torch.compiler.is_compiling():
        return None
    kind = measured.kind(
        call.cell,
        measured.dtype_name(call.dtype, fp32_precision()),
        training=call.needs_grad,
        layers=call.num_layers,
        directions=call.directions,
        packed=call.packed or call.lengths,
    )
    name = torch.cuda.get_device_name(call.device_index)
    ratio = measured.aten_is_faster(name, kind, call.T, call.B, call.hidden_size)
    if ratio is None:
        return None
    return f"aten was measured to be {1 / ratio:.2f}x as fast nearest to this call"


def aten_refuses(call: Call) -> str | None:
    if cells.get(call.cell).aten is None:
        return f"torch has no {call.cell}"
    inside = [INSIDE[name] for name in call.inside if name in INSIDE]
    if inside:
        return f"torch's kernels do not have {' and '.join(inside)}"
    if "states" in call.inside and torch.compiler.is_compiling():
        return STATES_COMPILED
    if call.transformed:
        return "torch.func transforms and forward-mode AD need plain torch operators"
    # Of torch's loops only the LSTM over plain rows is oneDNN's.
    plain = not (call.packed or call.lengths or call.proj_size)
    if call.cell == "lstm" and call.autocast and call.device == "cpu" and plain:
        failure = lstm_autocast_failure(call.dtype, training=call.needs_grad)
        if failure:
            return f"torch's LSTM fails under autocast to {call.dtype} on this processor: {failure}"
    return None


def reference_refuses(call: Call) -> str | None:
    return None


REFUSES = {"triton": triton_refuses, "aten": aten_refuses, "reference": reference_refuses}

BECAUSE = {
    "triton": "one fused launch per layer and pass",
    "aten": "torch's own kernels for this device",
    "reference": "plain torch operators run everything",
}


def forced_backend(backend: str | None) -> str:
    """The name in force: the module's own, else the block's, else the environment's."""
    if backend is not None:
        return check_name(backend, "backend")
    return _in_force if torch.compiler.is_compiling() else _of_block.get() or _default


def select(call: Call, backend: str | None = None) -> str:
    """The backend that runs `call`.

    Raises:
        RuntimeError: a backend is forced and cannot run it; the message says why.
    """
    name = forced_backend(backend)
    if name != "auto":
        refusal = REFUSES[name](call)
        if refusal:
            raise RuntimeError(
                f"backend {name!r} was asked for and cannot run this call: {refusal}"
            )
        return name
    if call.device == "cpu" and aten_refuses(call) is None:
        return "aten"
    for name in BACKENDS:
        if not (name == "triton" and call.device == "cpu") and REFUSES[name](call) is None:
            break
    if name == "triton" and measured_slower(call) and aten_refuses(call) is None:
        return "aten"
    if call.device == "cuda" and name != "triton" and not torch.compiler.is_compiling():
        _say_once(name, triton_refuses(call))
    return name


@functools.cache
def _say_once(backend: str, why: str | None) -> None:
    logger.warning("a call falls back from the fused kernels to %s: %s", backend, why)


def explain_call(call: Call, backend: str | None = None) -> Explanation:
    """What `select` decides for `call`, with the reasons."""
    chosen = select(call, backend)
    forced = forced_backend(backend)
    passed_over = {}
    for name in BACKENDS:
        if name != chosen:
            refusal = REFUSES[name](call)
            if refusal is None and forced != "auto":
                refusal = f"{forced} is forced"
            elif refusal is None and name == "triton" and call.device == "cuda":
                refusal = measured_slower(call)
            elif refusal is None and name == "triton":
                refusal = "on a cpu the interpreter runs only when forced: it is for tests"
            passed_over[name] = refusal or f"{chosen} is faster and comes first"
    because = BECAUSE[chosen] if forced == "auto" else f"forced; {BECAUSE[chosen]}"
    return Explanation(chosen, because, passed_over, call)
