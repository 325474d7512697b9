"""The bundled trainer: one page of GRPO (`train.py`) and what a run needs around it, from first line to report.

Importing this package imports no torch: the command line sets the number of threads first.
"""
