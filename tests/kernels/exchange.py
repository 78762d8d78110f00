"""The miniature of the spread time loop (bench/roundtrip.py), and what it should compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

BENCH = Path(__file__).parents[2] / "bench"
_spec = importlib.util.spec_from_file_location("roundtrip", BENCH / "roundtrip.py")
assert _spec is not None
assert _spec.loader is not None
roundtrip = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(roundtrip)


def expected(x: torch.Tensor, h0: torch.Tensor, decay: float = 0.5) -> torch.Tensor:
    """h_t = decay * mean(h_{t-1}) + x_t, in float32, stored in the dtype of x."""
    h, steps = h0, []
    for x_t in x.unbind():
        h = (decay * h.float().mean(1, keepdim=True) + x_t.float()).to(x.dtype)
        steps.append(h)
    return torch.stack(steps)
