"""The Triton time loops. Import this package only where a Triton backend is about to run."""
