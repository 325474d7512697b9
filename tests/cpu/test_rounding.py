"""Gradients in bfloat16 are rounded to nearest, ties to even, on every instruction set."""

import pytest
import torch

from fastgrpo import token_logprob
from tests.cpu.inputs import require_compiled

require_compiled("token_logprob_fwd")


@pytest.mark.parametrize("vocabulary", [2, 16, 64, 4096])  # tails, single vectors, loop bodies
def test_ties_go_to_even(vocabulary):
    """A uniform row gives its columns exactly -g / V: with g = V (1 + odd / 256) each lies between two numbers."""
    middle = 1 + (2 * torch.arange(128.0) + 1) / 256
    logits = torch.zeros(128, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(128, dtype=torch.int64)
    (token_logprob(logits, ids).logprob * middle * vocabulary).sum().backward()
    expected = (-middle).bfloat16()
    assert torch.equal(expected.float().abs() * 128 % 2, torch.zeros(128)), "even in the last place"
    assert torch.equal(logits.grad[:, 1:], expected[:, None].expand(128, vocabulary - 1))
