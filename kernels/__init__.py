"""The Triton time loops. Import this package only where a Triton backend is about to run."""

from fusedrnn.kernels.launch import Rows, StateOps, check, refusal, scan_backward, scan_forward

__all__ = ["Rows", "StateOps", "check", "refusal", "scan_backward", "scan_forward"]
