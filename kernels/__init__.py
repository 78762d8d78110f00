"""The Triton time loops. Import this package only where a Triton backend is about to run."""

import os

from fusedrnn.kernels import interpreter
from fusedrnn.kernels.launch import (
    Extras,
    Rows,
    check,
    refusal,
    scan_backward,
    scan_forward,
)

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    interpreter.repair()

__all__ = ["Extras", "Rows", "check", "refusal", "scan_backward", "scan_forward"]
