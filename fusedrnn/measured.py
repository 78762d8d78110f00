"""What was measured to be faster, and for which calls: torch's own kernels or ours.

`dispatch_table.json` is generated from the results under bench/results/ by
`python -m bench.dispatch_table`; nobody edits it. It lists, for a device and a kind of call, the
points at which both were timed:

    {"schema": 1, "sources": [...],
     "devices": {"NVIDIA H200": {"lstm fp16 training": [[T, B, H, speed-up], ...]}}}

and only those kinds that have a speed-up below 1 somewhere: a kind that is not there is ours. A
speed-up that noise could be all of stands there as 1.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
PATH = Path(__file__).parent / "dispatch_table.json"
RADIUS = (2, 1, 1)  # of a measured point in T, B and H, in doublings
Table = dict[str, dict[str, list[list[float]]]]


def kind(
    cell: str, dtype: str, *, training: bool, layers: int, directions: int, packed: bool
) -> str:
    """The name of a kind of call: what changes which kernels cuDNN picks.

    Args:
        dtype: "bf16", "fp16", "fp32-tf32" or "fp32-exact".
    """
    words = [cell, dtype, "training" if training else "inference"]
    words += ["stacked"] if layers > 1 else []
    words += ["bidirectional"] if directions > 1 else []
    words += ["packed"] if packed else []
    return " ".join(words)


def dtype_name(dtype: object, precision: str) -> str:
    """A torch dtype as `kind` wants it; `precision`, of float32, is "tf32" or "ieee"."""
    fp32 = "fp32-tf32" if precision == "tf32" else "fp32-exact"
    return DTYPES.get(str(dtype), fp32)


@functools.cache
def table() -> Table:
    """The devices' measurements; empty where nothing was measured."""
    if not PATH.exists():
        return {}
    return json.loads(PATH.read_text())["devices"]


@functools.lru_cache(maxsize=4096)
def aten_is_faster(device: str, kind: str, T: int, B: int, H: int) -> float | None:
    """The speed-up, below 1, that was measured nearest to a call; None where ours is as fast, or
    where nothing was measured near it: within a factor of two in B and H, of four in T.

    Nearest by the logarithms of T, B and H, since times grow with products of them.
    """
    return _nearest_loss(table(), device, kind, T, B, H)


def _nearest_loss(devices: Table, device: str, kind: str, T: int, B: int, H: int) -> float | None:
    points = devices.get(device, {}).get(kind)
    if not points:
        return None
    call = [math.log2(max(n, 1)) for n in (T, B, H)]

    def distance(point: list[float]) -> tuple[float, float]:
        apart = sum((math.log2(n) - c) ** 2 for n, c in zip(point[:3], call, strict=True))
        return apart, point[3]  # of two as near, the worse

    near = [
        point for point in points
        if all(abs(math.log2(n) - c) <= r for n, c, r in zip(point[:3], call, RADIUS, strict=True))
    ]  # fmt: skip
    if not near:
        return None
    ratio = min(near, key=distance)[3]
    return ratio if ratio < 1 else None
