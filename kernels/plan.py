"""wip"""
from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    capability: tuple[int, int]
    multiprocessors: int
    shared_per_program: int
    shared_per_multiprocessor: int
    backend: str = "cuda"

INTERPRETER = Device((0, 0), 1, 1 << 40, 1 << 40, "interpreter")

@dataclass(frozen=True)
class Plan:
    schedule: str
    block_b: int
    block_h: int
    block_k: int
    chunks: int
    resident: int
    split: int
    num_warps: int
    stages: int = 1
    protocol: str | None = None
    slab: int | None = None
    maxnreg: int | None = None

    def programs_per_multiprocessor(self, device): return 1
    def constants(self):
        return {"BLOCK_B": self.block_b, "BLOCK_H": self.block_h, "BLOCK_K": self.block_k, "CHUNKS": self.chunks, "RESIDENT": self.resident, "SPLIT": self.split, "STAGES": self.stages, "PROTOCOL": self.protocol}
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": 1}

@functools.cache
def plan_scan(cell, which, dtype, *, B, H, D, device):
    k = 1 << max(H - 1, 15).bit_length()
    return Plan("resident", 16, k, k, 1, 1, 1, 8)
