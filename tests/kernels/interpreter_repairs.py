"""Repairs what Triton's interpreter gets wrong (seen in 3.7.1; the last also in 3.9.0).

It keeps bfloat16 values as their bit patterns. Its `dot` multiplies these as integers, and its
cast from float32 cuts off where hardware rounds to nearest, ties to even. And a comparison of
scalars becomes an int32 where it is combined with a tile, which 3.9 refuses as a mask.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from fusedrnn.backends import triton as backend


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    """float32 values from the bit patterns of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """The bit patterns of bfloat16 nearest to float32 values; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Replaces these operations; does nothing the second time."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "multiplies_bfloat16", False):
        return
    dot, cast, splat = builder.create_dot, builder.cast_impl, builder.create_splat
    handle = interpreter.TensorHandle

    def create_dot(self, a, b, d, *options):
        a, b = (handle(_widen(x.data), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
        return dot(self, a, b, d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(_round(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_splat(self, ret_ty, arg):
        tile = splat(self, ret_ty, arg)
        return handle(tile.data.astype(arg.data.dtype), arg.dtype.scalar)

    builder.create_dot, builder.cast_impl, builder.create_splat = (
        create_dot,
        cast_impl,
        create_splat,
    )
    builder.multiplies_bfloat16 = True
    backend.INTERPRETED_DTYPES = backend.DTYPES
