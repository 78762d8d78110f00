"""The Triton time loops. Import this package only where a Triton backend is about to run."""

from fusedrnn.kernels.launch import (
    Rows,
    StateOps,
    check,
    plan_for,
    refusal,
    scan_backward,
    scan_forward,
    workspaces,
)

__all__ = [
    "Rows", "StateOps", "check", "plan_for", "refusal", "scan_backward", "scan_forward",
    "workspaces",
]  # fmt: skip
