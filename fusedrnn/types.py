"""The types of this package's arguments, for the annotations of a program that uses it.

def tagger(backend: fusedrnn.types.Backend | None = None) -> fusedrnn.LSTM: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.types import Device
from typing_extensions import TypeVar

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any] | np.bool_]]
else:
    Array = Any  # only type checkers read more of it, so that a program can run without NumPy

Backend: TypeAlias = Literal["auto", "triton", "aten", "loop", "reference"]
Save: TypeAlias = Literal["gates", "states"]
Nonlinearity: TypeAlias = Literal["tanh", "relu"]
Peephole: TypeAlias = Literal["diagonal", "full"]
# Units of a layer; or of each layer.
HiddenSize: TypeAlias = int | Sequence[int]
# Which way layers of one direction run through time; "alternate": forward, reverse, forward, ...
Direction: TypeAlias = (
    Literal["forward", "reverse", "alternate"] | Sequence[Literal["forward", "reverse"]]
)

# What a module carries from step to step: h, or a tuple where the cell has several states, as
# (h, c) of an LSTM. Of a Recurrent only the cell's name tells, which a type checker cannot look up.
State = TypeVar("State", bound=Tensor | tuple[Tensor, ...], default=Any)
# Rows' lengths: integers [B], or a bool mask [T, B] ([B, T] with batch_first), true where a step
# is real; as a tensor, a NumPy array, or (lists of) Python numbers.
Lengths: TypeAlias = Tensor | Array | Sequence[int] | Sequence[Sequence[bool]]
# A mask, or a mask and the state that it sets.
Reset: TypeAlias = Tensor | tuple[Tensor, State]


class Steppable(Protocol[State]):
    """What has such a state: LSTM, GRU, RNN and Recurrent."""

    bidirectional: bool
    direction: Direction

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One time step."""
        ...


class ModuleOptions(TypedDict, total=False):
    """What every module takes by name; see `fusedrnn.Recurrent`."""

    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    device: Device
    dtype: torch.dtype | None
    num_heads: int
    direction: Direction
    residual: bool
    backend: Backend | None
    save: Save
    input_dropout: float
    recurrent_dropout: float
    weight_drop: float
    zoneout: float | tuple[float, ...]
    clip_gradient: float | None
    generator: torch.Generator | None
