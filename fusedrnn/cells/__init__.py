"""Recurrent cells: one file each, equations only."""

from fusedrnn.cells import gru, gru_reset_before, lstm, rnn
from fusedrnn.cells._cell import (
    REGISTRY,
    Cell,
    Linear,
    Mean,
    Onnx,
    Projection,
    Stage,
    get,
    register,
)

__all__ = [
    "REGISTRY",
    "Cell",
    "Linear",
    "Mean",
    "Onnx",
    "Projection",
    "Stage",
    "get",
    "gru",
    "gru_reset_before",
    "lstm",
    "register",
    "rnn",
]
