"""The micro-benchmarks time processor time of one thread: set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
