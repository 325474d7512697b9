"""These tests run the real kernel source on CPU tensors, so Triton has to be told before it is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["FASTGRPO_BACKEND"] = "triton"  # and CPU tensors go to it through the ops too
