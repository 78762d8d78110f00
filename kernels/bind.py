"""Turns the body of a cell into a Triton function."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fusedrnn.cells._cell import check_body, numbers_of
from fusedrnn.kernels import activations


@functools.cache
def bind(body: Callable) -> Any:
    """`body` with the Triton vocabulary as its globals, jitted.

    The code object is the same one that runs in torch; only what the names mean differs, and that
    the numbers of the function around it are constants. A time loop takes the result as a
    `tl.constexpr` and inlines it.

    Raises:
        NameError: the body uses a name that is not in the vocabulary.
    """
    check_body(body)
    numbers = {name: tl.constexpr(value) for name, value in numbers_of(body).items()}
    meaning = {
        "__name__": body.__module__,  # triton shows it where a compilation fails
        "__builtins__": __builtins__,
        "tl": tl,  # the interpreter finds the language here; no body can name it
        **activations.VOCABULARY,
        **numbers,  # for the interpreter, which rebuilds functions without what is around them
    }
    around = tuple(types.CellType(value) for value in numbers.values())
    rebuilt = types.FunctionType(body.__code__, meaning, body.__name__, closure=around)
    rebuilt.__module__ = body.__module__
    rebuilt.__qualname__ = body.__qualname__
    return triton.jit(rebuilt)
