"""Breaks source code on purpose, to see that a test notices."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def mutated(path: Path, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module at `path` with each `old` text replaced by its `new`.

    It is written to `folder`, since Triton reads the source of what it compiles or interprets.

    Raises:
        ValueError: a text does not occur: the mutant has rotted.
    """
    source = path.read_text()
    for old, new in changes:
        if old not in source:
            raise ValueError(f"{path.name} must have {old!r} for this mutant to be one")
        source = source.replace(old, new)
    name = f"mutant_{next(_numbers)}_{path.stem}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
