"""The functions that the body of a cell may use, bound to torch.

`fusedrnn.kernels.activations` binds the same names for Triton. A body may use these,
arithmetic, comparisons and tuples; nothing else has a meaning on both sides.
"""

import torch

sigmoid = torch.sigmoid
tanh = torch.tanh
relu = torch.relu
where = torch.where
zeros_like = torch.zeros_like

NAMES = frozenset({"sigmoid", "tanh", "relu", "where", "zeros_like"})
