"""fusedrnn: recurrent networks as fused kernels, a drop-in for torch.nn's recurrent modules."""
