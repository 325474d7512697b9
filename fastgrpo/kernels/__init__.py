"""Triton kernels and their launchers, one file per op; a launcher has exactly the signature of its op."""
