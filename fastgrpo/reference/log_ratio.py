"""Difference of two log-probs, the one subtraction that every ratio and every KL term starts from."""

import torch
from torch import Tensor


def log_ratio_of(first: Tensor, second: Tensor) -> Tensor:
    """First minus second, 0 where they are equal: a token of probability 0 under both (-inf - -inf) has ratio 1."""
    return torch.where(first == second, 0.0, first - second)
