"""Recurrent cells: one file each, equations only."""

from fusedrnn.cells import gru, lstm, rnn
from fusedrnn.cells._cell import REGISTRY, Cell, get, register

__all__ = ["REGISTRY", "Cell", "get", "gru", "lstm", "register", "rnn"]
