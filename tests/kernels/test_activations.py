"""Triton's vocabulary against float64, over the whole range of float32."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusedrnn.cells import REGISTRY, vocabulary
from fusedrnn.kernels.activations import VOCABULARY
from fusedrnn.kernels.bind import bind

EPS = 2.0**-23
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 0.625, -0.625, 1e-45, -1e-45]


@triton.jit
def apply_kernel(
    x_ptr,  # [N]
    y_ptr,  # [N]
    FUNCTION: tl.constexpr,
    N: tl.constexpr,
):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, FUNCTION(tl.load(x_ptr + offs)))


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    with np.errstate(all="ignore"):
        apply_kernel[(1,)](x, y, FUNCTION=VOCABULARY[name], N=len(x))
    return y


def everywhere() -> torch.Tensor:
    """A million bit patterns spread evenly over all of float32, and the special ones."""
    spread = np.arange(2**20, dtype=np.uint64)
    patterns = spread * 4096 + spread * 2654435761 % 4096
    x = patterns.astype(np.uint32).view(np.float32)
    x[: len(SPECIAL)] = SPECIAL
    dense = np.linspace(-20, 20, 2**18, dtype=np.float32)  # where they are not constant
    x[2**19 : 2**19 + 2**18] = dense
    return torch.from_numpy(x)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("sigmoid", 2.0), ("tanh", 2.5), ("softplus", 3.5), ("log1p", 3.5), ("log", 2.0),
        ("exp", 2.0), ("sqrt", 0.5),
    ],
)  # fmt: skip
def test_error_bound(name, bound):
    x = everywhere()
    y = apply(name, x)
    exact = getattr(vocabulary, name)(x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    finite = exact.abs() <= torch.finfo(torch.float32).max
    assert torch.equal(y.isfinite(), finite)
    assert torch.equal(y[~finite & ~y.isnan()] > 0, exact[~finite & ~y.isnan()] > 0)
    known = finite & (exact.abs() >= 2.0**-126)  # below, float32 itself is coarser
    error = ((y.double() - exact).abs() / exact.abs())[known].max().item()
    assert error <= bound * EPS, error / EPS
    small = finite & ~known
    assert ((y.double() - exact)[small].abs() <= 2.0**-126).all()


@triton.jit
def maximum_kernel(
    x_ptr,  # [N]
    y_ptr,  # [N]
    z_ptr,  # [N]
    MAXIMUM: tl.constexpr,
    N: tl.constexpr,
):
    offs = tl.arange(0, N)
    tl.store(z_ptr + offs, MAXIMUM(tl.load(x_ptr + offs), tl.load(y_ptr + offs)))


def test_maximum_and_abs_are_torchs():
    x, y = everywhere(), everywhere().flip(0)
    z = torch.empty_like(x)
    maximum_kernel[(1,)](x, y, z, MAXIMUM=VOCABULARY["maximum"], N=len(x))
    assert torch.allclose(z, torch.maximum(x, y), rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(apply("abs", x), x.abs(), rtol=0, atol=0, equal_nan=True)


def test_tanh_of_subnormals_is_exact():
    x = torch.full((16,), 1e-45) * torch.arange(-8, 8)
    assert torch.equal(apply("tanh", x), x)


def test_relu_keeps_nan():
    x = everywhere()
    assert torch.allclose(apply("relu", x), torch.relu(x), rtol=0, atol=0, equal_nan=True)


def test_vocabulary_is_that_of_the_cells():
    assert set(VOCABULARY) == vocabulary.NAMES


def test_bind_refuses_unknown_names():
    def body(x_gates, h_gates, state, params):
        return (erf(x_gates[0]),), ()  # noqa: F821

    with pytest.raises(NameError, match="erf"):
        bind(body)


def test_bind_is_remembered():
    (stage,) = REGISTRY["gru"].stages
    assert bind(stage.forward) is bind(stage.forward)
