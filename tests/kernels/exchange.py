"""What the miniature of the spread time loop (roundtrip.py) should compute."""

from __future__ import annotations

import torch


def expected(x: torch.Tensor, h0: torch.Tensor, decay: float = 0.5) -> torch.Tensor:
    """h_t = decay * mean(h_{t-1}) + x_t, in float32, stored in the dtype of x."""
    h, steps = h0, []
    for x_t in x.unbind():
        h = (decay * h.float().mean(1, keepdim=True) + x_t.float()).to(x.dtype)
        steps.append(h)
    return torch.stack(steps)
