"""The functions that the body of a cell may use, bound to torch.

`fusedrnn.kernels.activations` binds the same names for Triton. A body may use these,
arithmetic, comparisons and tuples; nothing else has a meaning on both sides.
"""

from collections.abc import Callable

import torch
from torch import Tensor

sigmoid: Callable[..., Tensor] = torch.sigmoid
tanh: Callable[..., Tensor] = torch.tanh
relu: Callable[..., Tensor] = torch.relu
exp: Callable[..., Tensor] = torch.exp
log1p: Callable[..., Tensor] = torch.log1p
abs: Callable[..., Tensor] = torch.abs
where: Callable[..., Tensor] = torch.where
rsqrt: Callable[..., Tensor] = torch.rsqrt
zeros_like: Callable[..., Tensor] = torch.zeros_like

NAMES = frozenset(
    {"sigmoid", "tanh", "relu", "exp", "log1p", "abs", "where", "rsqrt", "zeros_like"}
)
