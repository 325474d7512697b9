"""Fused kernels for Group Relative Policy Optimization."""

__version__ = "0.1.0"
