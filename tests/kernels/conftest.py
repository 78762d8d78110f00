"""Kernels run in Triton's interpreter here, which must be chosen before they are imported."""

import os
import sys
from pathlib import Path

if "fusedrnn.kernels" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError(
        "fusedrnn.kernels is imported already, for compilation: run tests/kernels by itself, or "
        "with TRITON_INTERPRET=1"
    )
os.environ["TRITON_INTERPRET"] = "1"

# importlib mode leaves sys.path alone; the helpers beside this file are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from interpreter_repairs import repair

repair()
