"""fusedrnn: recurrent networks as fused kernels, a drop-in for torch.nn's recurrent modules.

import fusedrnn

rnn = fusedrnn.LSTM(128, 256, num_layers=2, bidirectional=True)     # as torch.nn.LSTM
fusedrnn.replace_modules(model)                                     # or a finished model

LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell    the modules of torch.nn
PeepholeLSTM, CoupledLSTM, MultiplicativeLSTM, LayerNormLSTM, SLSTM, LayerNormGRU, MGU, UGRNN,
LiGRU, IndRNN, MLPTransitionRNN               their relatives, with the same arguments
Recurrent                                     one for any cell: Recurrent("ugrnn", 8, 16)
replace_modules, restore_modules              swap those of a finished model, and back
cell                                          makes a cell of a function of one step
use_backend, BACKENDS, explain                which backend runs a call
Regularizers                                  dropout of several kinds, zoneout, clipping
Stream                                        carries the state from one chunk to the next
init                                          initialisers: identity_, orthogonal_, chrono_, ...
convert                                       weights of Keras, ONNX, haste, FlashRNN and others
functional, gradient_flow, types              functions; gradients made visible; for annotations
fusedrnn.onnx, fusedrnn.cells                 import these: export to ONNX; register your own cells

help(fusedrnn.LSTM) and the like say more.
"""

from fusedrnn import convert, functional, gradient_flow, init, types
from fusedrnn.cells import cell
from fusedrnn.dispatch import BACKENDS, use_backend
from fusedrnn.explain import explain
from fusedrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
from fusedrnn.regularizers import Regularizers
from fusedrnn.replace import replace_modules, restore_modules
from fusedrnn.streaming import Stream
from fusedrnn.variants import (
    MGU,
    SLSTM,
    UGRNN,
    CoupledLSTM,
    IndRNN,
    LayerNormGRU,
    LayerNormLSTM,
    LiGRU,
    MLPTransitionRNN,
    MultiplicativeLSTM,
    PeepholeLSTM,
)

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "UGRNN",
    "CoupledLSTM",
    "GRUCell",
    "IndRNN",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "MLPTransitionRNN",
    "MultiplicativeLSTM",
    "PeepholeLSTM",
    "RNNCell",
    "Recurrent",
    "Regularizers",
    "Stream",
    "cell",
    "convert",
    "explain",
    "functional",
    "gradient_flow",
    "init",
    "replace_modules",
    "restore_modules",
    "types",
    "use_backend",
]
