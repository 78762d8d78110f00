"""The exchange between programs on the device, without a cell or a product around it."""

import pytest
import roundtrip
import torch
from exchange import expected

from fusedrnn.kernels import sync


def variants() -> list[bool]:
    """Both ways to look at pairs of 16 bits, where the device has both."""
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return [False, True] if capable else [False]


@pytest.mark.parametrize("H", [8, 300, 768])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pairwise", variants())
def test_many_laps(pairwise, dtype, H):
    """Many times round the ring; -0.0 is among the values. In 16 bit, a mean summed in another
    order may round to the next value: within the usual tolerance of the dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10 * sync.LAP.value + 3, 20, H, generator=generator).to(dtype)
    h0 = torch.full((20, H), -0.0, dtype=dtype)
    found = roundtrip.exchange(x.cuda(), h0.cuda(), pairwise=pairwise)
    torch.testing.assert_close(found.cpu(), expected(x, h0))


def test_the_same_bits_every_time():
    x = torch.randn(1000, 16, 512, device="cuda", dtype=torch.bfloat16)
    first = roundtrip.exchange(x, x[0])
    for _ in range(100):
        assert torch.equal(roundtrip.exchange(x, x[0]), first)


def test_impatience_is_an_error():
    """Without patience every wait ends at once, and the launch with it."""
    x = torch.randn(500, 16, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="timed out at step"):
        roundtrip.exchange(x, x[0], spin_limit=0)
    right = expected(x.cpu(), x[0].cpu())
    torch.testing.assert_close(roundtrip.exchange(x, x[0]).cpu(), right)
