"""Compiles the exchange kernel ahead of time, and prints what comes out as JSON.

Run in a process of its own: triton either interprets or compiles.

    python compile_exchange.py PROTOCOL:DTYPE:TARGET ...        e.g. ll:bf16:90, counter:fp32:gfx942
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl
from exchange import roundtrip
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedrnn.kernels import sync

DTYPES = {"bf16": (torch.bfloat16, tl.bfloat16), "fp32": (torch.float32, tl.float32)}
WORDS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def assembly(protocol: str, dtype: str, target: str) -> str:
    torch_dtype, tl_dtype = DTYPES[dtype]
    constants = {
        "DTYPE": tl_dtype,
        "PROTOCOL": protocol,
        "FLAGS_BLOCK": 32 * roundtrip.NUM_WARPS,
        "BLOCK_B": roundtrip.BLOCK_B,
        "BLOCK_H": roundtrip.BLOCK_H,
        "CHUNK": roundtrip.CHUNK,
        "CHUNKS": 1,
    }
    types = dict.fromkeys(roundtrip.exchange_kernel.arg_names, "i32")
    types |= dict.fromkeys(constants, "constexpr")
    types |= {name: f"*{dtype}" for name in ("x_ptr", "h0_ptr", "output_ptr")}
    types |= {"ring_ptr": WORDS[sync.ring_dtype(torch_dtype, protocol)], "decay": "fp32"}
    types |= {"signal_ptr": "*i32", "error_ptr": "*i32"}
    names = list(types)
    divisible = [n for n, t in types.items() if t[0] == "*"] + ["ring_stride", "H"]
    source = ASTSource(
        roundtrip.exchange_kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    if target.startswith("gfx"):
        gpu, output = GPUTarget("hip", target, 64), "amdgcn"
    else:
        gpu, output = GPUTarget("cuda", int(target), 32), "ptx"
    options = {"num_warps": roundtrip.NUM_WARPS, "num_stages": 1}
    return triton.compile(source, target=gpu, options=options).asm[output]


if __name__ == "__main__":
    json.dump({name: assembly(*name.split(":")) for name in sys.argv[1:]}, sys.stdout)
