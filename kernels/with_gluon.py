"""What needs Gluon, Triton's language for layouts: None where there is none, since it is
experimental and may move. The other kernels do without."""

from typing import Any

gluon: Any = None
wgmma: Any = None
wgmma_backward: Any = None
try:
    from triton.experimental import gluon

    from fusedrnn.kernels import wgmma, wgmma_backward
except (ImportError, AttributeError):
    gluon = wgmma = wgmma_backward = None
