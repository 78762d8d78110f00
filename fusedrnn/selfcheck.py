"""Does every backend compute the right thing on this machine? Run as `python -m fusedrnn`."""

from __future__ import annotations

import importlib.util
import platform
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedrnn
from fusedrnn import cells, dispatch
from fusedrnn.backends import triton
from fusedrnn.call import Call, Spec

T, B, I, H, LAYERS = 9, 3, 5, 17, 2


class Check(NamedTuple):
    """What one backend did on one device.

    `status` is "ok", "wrong" (the error exceeds the tolerance), "failed" (it raised) or
    "unavailable"; `error` and `tolerance` are relative to the largest value of float64's.
    """

    device: str
    backend: str
    status: str
    reason: str
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None


def versions() -> dict[str, str]:
    """The versions that a bug report needs."""
    found = {
        "fusedrnn": fusedrnn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": "not installed",
        "cuda": torch.version.cuda or "not built in",
        "cudnn": str(torch.backends.cudnn.version() or "not available"),
    }
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = triton.triton_version() or "unknown"
    return found


def devices() -> list[str]:
    """The CPU and every CUDA device, as torch names them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def describe(device: str) -> str:
    """The device's name for a person."""
    if device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors"
    )


def check(device: str, backend: str) -> Check:
    """Runs every cell that the backend has, two layers in two directions with lengths, forward and
    backward, and compares outputs, final states and all gradients with the reference in float64.

    The tolerance is twice the error that the reference makes in float32 on the CPU, plus 16
    roundings: another order of summation may lose as much again, never much more.
    """
    start = time.perf_counter()
    worst, allowed, where = 0.0, 1.0, ""
    refusals: dict[str, str] = {}
    for cell in cells.REGISTRY:
        spec = Spec(cell, I, H, LAYERS, bidirectional=True)
        example = Call(
            spec, torch.device(device), torch.float32, T, B, lengths=True, needs_grad=True
        )  # fmt: skip
        if refusal := dispatch.REFUSES[backend](example):
            refusals[cell] = refusal
            continue
        exact = _run(cell, "cpu", "reference", torch.float64)
        plain = _run(cell, "cpu", "reference", torch.float32)
        try:
            got = _run(cell, device, backend, torch.float32)
        except Exception as error:  # reported as this backend's result, and by the exit status
            return Check(device, backend, "failed", f"{cell}: {type(error).__name__}: {error}")
        for key, value in exact.items():
            limit = 2 * _error(plain[key], value) + 16 * torch.finfo(torch.float32).eps
            error = _error(got[key], value)
            if not error / limit <= worst / allowed:  # NaN compares false, and so counts
                worst, allowed, where = error, limit, f"{cell}, {key}"
    if not where:
        return Check(device, backend, "unavailable", next(iter(refusals.values())))
    seconds = time.perf_counter() - start
    if worst <= allowed:
        reason = f"largest error, of {allowed:.1e} allowed, in {where}"
        reason += "".join(f"; without {cell}: {why}" for cell, why in refusals.items())
        return Check(device, backend, "ok", reason, worst, allowed, seconds)
    return Check(device, backend, "wrong", f"in {where}", worst, allowed, seconds)


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def _run(cell: str, device: str, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU, from inputs that depend on no argument."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    module = fusedrnn.Recurrent(cell, I, H, LAYERS, bidirectional=True)
    module.to(device, dtype)
    module.backend = backend  # pyright: ignore[reportAttributeAccessIssue] - a name, checked there
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
    input = draw(T, B, I).requires_grad_()
    lengths = torch.tensor([T, 1, 4], device=device)
    switch: Any = torch.backends.cudnn.rnn
    precision, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        output, final = module(input, lengths=lengths)
        outputs = [output, *(final if isinstance(final, tuple) else (final,))]
        leaves = {"input": input, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [draw(*o.shape) for o in outputs]
        )
    finally:
        switch.fp32_precision = precision
    names = ["output", *(f"{name}_n" for name in cells.get(cell).states)]
    results = dict(zip(names, outputs, strict=True))
    results |= {f"d_{key}": g for key, g in zip(leaves, gradients, strict=True)}
    return {key: value.detach().cpu() for key, value in results.items()}
