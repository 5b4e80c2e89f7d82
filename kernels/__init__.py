"""Triton device code and launchers, one file a family of operations; installed as `imbdiff.kernels`."""
