"""The repairs of Triton's interpreter (`interpreter_repairs`, by conftest.py), one by one."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU here, not in the interpreter"
)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    offs = rows * SIZE + columns
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    tl.store(c_ptr + offs, product.to(tl.bfloat16))


@triton.jit
def scalar_mask_kernel(seen, limit, SIZE: tl.constexpr):
    mask = (tl.arange(0, SIZE) < 3) & (limit > 0)
    seen.append(mask.handle.data)


def test_bfloat16_multiplies_as_numbers_and_rounds_to_nearest():
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    product_kernel[(1,)](a, b, c, 16)
    exact = (a.double() @ b.double()).float()  # of which float32 sums are within a rounding or so
    spacing = exact.abs().to(torch.bfloat16).float() * 2.0**-8
    assert ((c.float() - exact).abs() <= spacing * 1.01 + 2.0**-20).all()


@pytest.mark.parametrize("limit", [0, 1])
def test_masks_with_a_scalar_stay_masks(limit):
    seen: list[np.ndarray] = []
    scalar_mask_kernel[(1,)](seen, limit, 4)
    assert seen[0].dtype == np.bool_
    assert seen[0].tolist() == [limit > 0] * 3 + [False]
