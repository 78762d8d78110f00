"""Whole layers through the fused kernels against torch.nn: cases, and what counts as equal.

`tests/kernels/test_layers.py` runs them small in the interpreter, `tests/gpu` at real sizes on a
device.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Case:
    """One module on one input; `rows` is "all" (of equal length), "packed" or "lengths"."""

    module: str = "LSTM"
    T: int = 4
    B: int = 3
    I: int = 5
    H: int = 7
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    save: str = "gates"
    rows: str = "all"
    scale: float = 1.0
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + ("-tf32" if self.tf32 else "")
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return (
            f"{self.module}({options})-{dtype}-T{self.T}-B{self.B}-I{self.I}-H{self.H}"
            f"-{self.rows}-{self.save}-x{self.scale:g}"
        )


@contextmanager
def precision(tf32: bool):
    """float32 products in tf32 or exactly, for cuDNN and for the kernels alike."""
    switch = torch.backends.cudnn.rnn
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def lengths_of(case: Case) -> Tensor:
    """[B], unsorted, the longest row of full length."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator)
    lengths[case.B // 2] = case.T
    return lengths


def build(
    case: Case, family, dtype: torch.dtype, device: str, nudges: int = 0, **extra
) -> nn.Module:
    """The case's module of torch.nn or of fusedrnn, with the same parameters for both.

    nudges: by how many roundings the parameters are larger than usual.
    """
    torch.manual_seed(5)
    module = getattr(family, case.module)(case.I, case.H, **case.options, **extra)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(case.scale * (1 + nudges * torch.finfo(case.dtype).eps))
    return module.to(dtype).to(device)  # through the case's dtype for both would change the oracle


def run(case: Case, module: nn.Module, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs, final states and every gradient by name, with random cotangents on all outputs.

    Inputs are drawn in float64, rounded to the case's dtype, then converted: every module sees
    the same numbers. The parameters are rounded likewise.
    """
    generator = torch.Generator().manual_seed(11)
    batch_first = case.options.get("batch_first", False)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(case.dtype).to(dtype).to(device)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(case.dtype))
    L = case.options.get("num_layers", 1)
    D = 2 if case.options.get("bidirectional") else 1
    input = draw(*((case.B, case.T) if batch_first else (case.T, case.B)), case.I)
    widths = [case.options.get("proj_size", case.H), case.H]
    states = [draw(L * D, case.B, w) for w in widths[: 2 if case.module == "LSTM" else 1]]
    leaves = [t.requires_grad_() for t in (input, *states)]
    hx = tuple(states) if len(states) == 2 else states[0]
    lengths = lengths_of(case)

    if case.rows == "all":
        output, final = module(input, hx)
    elif case.rows == "lengths" and type(module).__module__.startswith("fusedrnn"):
        output, final = module(input, hx, lengths=lengths.to(device))
    else:
        packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
        output, final = module(packed, hx)
        assert isinstance(output, PackedSequence)
        output = pad_packed_sequence(output, batch_first, total_length=case.T)[0]
    outputs = [output, *(final if isinstance(final, tuple) else (final,))]
    names = ["output", "h_n", "c_n"][: len(outputs)]
    names += ["d_input", "d_h_0", "d_c_0"][: len(leaves)]
    names += [f"d_{name}" for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(
        outputs, [*leaves, *module.parameters()], [draw(*o.shape) for o in outputs]
    )
    return {
        name: value.detach().double().cpu()
        for name, value in zip(names, (*outputs, *gradients), strict=True)
    }


def assert_as_good_as_torch(case: Case, device: str, backend: str = "triton") -> None:
    """The fused kernels against float64, with torch.nn's own error as the yardstick.

    Per tensor, the largest error relative to the largest exact value may be twice torch.nn's
    in the same dtype and precision, plus four roundings of it: another order of summation is as
    good. With exact float32, of which a product is three that lose about four roundings
    together, four times torch's error. That is the worst of the outputs, or of the gradients, of
    a few sets of parameters that differ by a rounding: in one tensor, or in one unit, it may be
    small by luck.
    """

    def of_torch(dtype: torch.dtype, nudges: int) -> dict[str, Tensor]:
        return run(case, build(case, nn, dtype, device, nudges), dtype, device)

    with precision(case.tf32):
        exact = of_torch(torch.float64, 0)
        errors = [
            {name: _error(value, right[name]) for name, value in of_torch(case.dtype, n).items()}
            for n in range(5)
            for right in [of_torch(torch.float64, n)]
        ]
        module = build(case, fusedrnn, case.dtype, device, backend=backend, save=case.save)
        fused = run(case, module, case.dtype, device)
    times = 4 if case.dtype == torch.float32 and not case.tf32 else 2
    floor = 4 * (TF32_EPS if case.tf32 else torch.finfo(case.dtype).eps)
    assert fused.keys() == exact.keys()
    for kind in (False, True):
        names = [name for name in exact if name.startswith("d_") == kind]
        limit = times * max(error[name] for error in errors for name in names) + floor
        for name in names:
            assert fused[name].shape == exact[name].shape, name
            error = _error(fused[name], exact[name])
            assert error <= limit, f"{case}: {name}: error {error:.2e}, allowed {limit:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((value - exact).abs().max() / scale).item()
