"""What Opacus, where it is loaded, is told of our modules: to treat them as torch.nn's.

It looks up validators and fixers by type. Its hooks see the gradient of the output alone, not that
of the final state, so no rule of ours for them could be right; its own fix replaces LSTM and GRU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def tell(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Registers the validator and the fixer of torch.nn's class for ours; `classes` maps ours."""
    loaded = sys.modules.get("opacus.validators")
    if loaded is None:
        return
    registry = loaded.ModuleValidator
    for ours, torchs in classes.items():
        if torchs in registry.FIXERS and ours not in registry.FIXERS:
            registry.VALIDATORS[ours] = _validator(registry.VALIDATORS[torchs])
            registry.FIXERS[ours] = _fixer(registry.FIXERS[torchs])


def _validator(of_torchs: Callable[..., Any]) -> Callable[..., Any]:
    def validate(module):
        name = f"fusedrnn.{type(module).__name__}"
        return [
            type(error)(f"{name}, as torch.nn's: {error} (ModuleValidator.fix)")
            for error in of_torchs(module)
        ]

    return validate


def _fixer(of_torchs: Callable[..., Any]) -> Callable[..., Any]:
    def fix(module, **options):
        if module.regularizers is not None:
            raise ValueError(
                f"{type(module).__name__}: Opacus' module has no {module.regularizers}; "
                f"set regularizers = None first"
            )
        if module.num_heads > 1:
            raise ValueError(
                f"{type(module).__name__}: Opacus' module has no heads, "
                f"got num_heads={module.num_heads}"
            )
        if lacking := module._torch_lacks():
            raise ValueError(f"{type(module).__name__}: Opacus' module is torch's: {lacking}")
        return of_torchs(module, **options)

    return fix
