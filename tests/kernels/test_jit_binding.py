"""Modules bind and compile their kernels as they would on a GPU, and once for all T and B."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("jit_binding.py")


@pytest.mark.parametrize(
    ("module", "H", "dtype"),
    [("LSTM", 8, "bfloat16"), ("GRU", 300, "bfloat16"), ("RNN", 300, "float32")],
)
def test_launches_bind_and_compile(module, H, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), module, str(H), dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["scan_forward_kernel", "scan_backward_kernel"]
    assert [record["kernel"] for record in launches] == names * 2
    assert [record["compiled"] for record in launches] == [True, True, False, False]
    for record in launches:
        assert record["grid"][2] == 2  # both directions in one launch
        assert record["cooperative"] is True
        assert record["shared"] <= 232_448
