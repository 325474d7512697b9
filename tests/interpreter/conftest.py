"""These tests run the real kernel source on CPU tensors, so Triton has to be told before it is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
