"""Recurrent cells: one file each, equations only."""

# In the order in which tables list them: torch's own, then their relatives.
from fusedrnn.cells import lstm, gru, rnn, gru_reset_before  # isort: skip
from fusedrnn.cells import (
    coupled_lstm,
    indrnn,
    layer_norm_gru,
    layer_norm_lstm,
    ligru,
    mgu,
    multiplicative_lstm,
    peephole_lstm,
    slstm,
    ugrnn,
)
from fusedrnn.cells._cell import (
    REGISTRY,
    Cell,
    InputNorm,
    Linear,
    Mean,
    Onnx,
    Own,
    Projection,
    Stage,
    family,
    get,
    register,
)
from fusedrnn.cells.derived import cell

__all__ = [
    "REGISTRY",
    "Cell",
    "InputNorm",
    "Linear",
    "Mean",
    "Onnx",
    "Own",
    "Projection",
    "Stage",
    "cell",
    "coupled_lstm",
    "family",
    "get",
    "gru",
    "gru_reset_before",
    "indrnn",
    "layer_norm_gru",
    "layer_norm_lstm",
    "ligru",
    "lstm",
    "mgu",
    "multiplicative_lstm",
    "peephole_lstm",
    "register",
    "rnn",
    "slstm",
    "ugrnn",
]
