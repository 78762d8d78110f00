"""The suite for a CUDA device; without one, every test is skipped with the reason."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # layer_checks


def pytest_collection_modifyitems(items):
    missing = None if torch.cuda.is_available() else "no CUDA device: nothing here was verified"
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
