"""How far a result may lie from the exact one: one table, derived, for every test.

A result in a dtype is compared with the same computation in float64. The plain torch operator
in that dtype has an error of its own; ours may be at most FACTOR times as large. FLOOR, in
units in the last place of the largest exact value, is what the last rounding alone may cost:
it counts where torch's error happens to be near zero (a tensor of two numbers, a saturated
gate).
"""

import torch

FACTOR = 2.0

# In ulps of the largest value. Results are sums of a few dozen rounded terms in float32 and
# float64; in the low precisions the sums are float32 and only stored states are rounded.
FLOOR = {
    torch.float64: 32.0,
    torch.float32: 16.0,
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
}

# Elementwise, for torch.testing.assert_close: two computations of one function that differ in the
# order of their operations. A value is at most 100 rounded terms of order 1 in each of at most
# 100 time steps, 1e4 roundings. In float64 (1.1e-16 each) they come to 1e-12 if all add up; a
# gradient or a derivative of one sums up to 100 such values more.
VALUES64 = {"rtol": 1e-12, "atol": 1e-12}
GRADIENTS64 = {"rtol": 1e-10, "atol": 1e-11}
# In float32 (6e-8 each) that bound would find nothing. A few steps: FLOOR; many, or gradients:
# 1e4 roundings of either sign, as a random walk, 100 * 6e-8.
VALUES32 = {"rtol": 2e-6, "atol": 2e-6}
GRADIENTS32 = {"rtol": 6e-6, "atol": 6e-6}


def floor(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The error that rounding alone may cause in a tensor like `exact`.

    Gates and states are of order 1 whatever becomes of them, so small results may be
    differences of larger terms: no magnitude below 0.1 is taken for the scale.
    """
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return FLOOR[dtype] * torch.finfo(dtype).eps * max(largest, 0.1)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute difference, in float64."""
    difference = (actual.detach().double() - exact.detach().double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def assert_as_good(actual, plain, exact, what: str) -> None:
    """`actual` is as near to `exact` (float64) as `plain`, torch's result in the same dtype."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    allowed = FACTOR * error(plain, exact) + floor(exact, actual.dtype)
    found = error(actual, exact)
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"


def assert_exact(actual, expected, what: str) -> None:
    """Equal to rounding in float64: the two differ in the order of operations, no more."""
    expected = torch.as_tensor(expected)
    assert actual.dtype == torch.float64, f"{what}: {actual.dtype}, expected float64"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    allowed = floor(expected, torch.float64)
    found = error(actual, expected)
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"


def assert_same(actual, expected, what: str) -> None:
    """Bit for bit: both ran the same operators on the same numbers."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert torch.equal(actual, expected), f"{what}: differs by {error(actual, expected):.3g}"
