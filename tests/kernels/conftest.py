"""Kernels run in Triton's interpreter here, which must be chosen before triton is imported."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

# importlib mode leaves sys.path alone; the helpers beside this file are imported by name.
sys.path.insert(0, str(Path(__file__).parent))
