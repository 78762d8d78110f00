"""Compiles the exchange kernel ahead of time, and prints what comes out as JSON.

Run in a process of its own: triton either interprets or compiles.

    python compile_exchange.py DTYPE:TARGET ...        e.g. bf16:90
"""

from __future__ import annotations

import json
import sys

import roundtrip
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.kernels.sync import Exchange

SPLIT = {"bf16": 8, "fp32": 4}


def assembly(dtype: str, target: str) -> str:
    constants = {
        "BLOCK_H": roundtrip.BLOCK_H,
        "CHUNKS": 3,
        "AHEAD": 2,
        "SPLIT": SPLIT[dtype],
        "PAIRWISE": int(target) >= 90,
    }
    types = dict.fromkeys(roundtrip.exchange_kernel.arg_names, "i32")
    types |= dict.fromkeys(constants, "constexpr")
    types |= {name: f"*{dtype}" for name in ("x_ptr", "h0_ptr", "output_ptr")}
    types["decay"] = "fp32"
    names = list(types)
    divisible = [(n,) for n, t in enumerate(types.values()) if t[0] == "*"] + [(names.index("H"),)]
    types["exchange"] = Exchange(f"*{dtype}", "*i32", "*i32", "i32", "i32", "i32")
    divisible += [(names.index("exchange"), n) for n in range(4)]
    source = ASTSource(
        roundtrip.exchange_kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {path: [["tt.divisibility", 16]] for path in divisible},
    )
    options = {"num_warps": SPLIT[dtype], "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", int(target), 32), options=options).asm[
        "ptx"
    ]


if __name__ == "__main__":
    json.dump({name: assembly(*name.split(":")) for name in sys.argv[1:]}, sys.stdout)
