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
where: Callable[..., Tensor] = torch.where
exp: Callable[..., Tensor] = torch.exp
log: Callable[..., Tensor] = torch.log
log1p: Callable[..., Tensor] = torch.log1p
sqrt: Callable[..., Tensor] = torch.sqrt
rsqrt: Callable[..., Tensor] = torch.rsqrt
abs: Callable[..., Tensor] = torch.abs
maximum: Callable[..., Tensor] = torch.maximum
zeros_like: Callable[..., Tensor] = torch.zeros_like


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). torch's own rounds to x from x = 20 on, which float64 can tell."""
    return torch.nn.functional.softplus(x, threshold=40)


NAMES = frozenset(
    {"sigmoid", "tanh", "relu", "where", "rsqrt", "zeros_like"}
    | {"exp", "log", "log1p", "softplus", "sqrt", "abs", "maximum"}
)
