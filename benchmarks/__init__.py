"""Measurements and static checks of the kernels, run by hand or in CI; nothing here is installed."""
