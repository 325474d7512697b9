"""Rows whose maximum lies far from where the kernel guesses it: the sums are taken again from the true maximum."""

import pytest
import torch
from interpreter_helpers import assert_close, empty, statistic_atol

from fastgrpo import reference
from fastgrpo.kernels import token_logprob

VOCABULARY = 4097


# The first block decides what is subtracted; a peak of +-80 behind it over- or underflows the sums.
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("peak", [-80.0, 40.0, 80.0, 300.0])
@pytest.mark.parametrize("target", ["the peak", "near it", "far below"])
def test_sums_are_taken_again(peak, target, temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, VOCABULARY, generator=generator) * 2
    logits[:, 3000:3010] += peak
    if peak < 0:  # the other way round: the guess is far above everything that follows
        logits[:, :3000] += peak
    column = {"the peak": 3004, "near it": 3009, "far below": 17}[target]
    ids = torch.tensor([column, column])
    mask, t = torch.empty(0, dtype=torch.bool), torch.tensor([temperature])
    got = token_logprob.forward(logits, ids, mask, t, empty(torch.float32), True)
    want = reference.token_logprob_fwd(
        logits.double(), ids, mask, t.double(), empty(torch.float64), True
    )
    atol = statistic_atol(logits, t)
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, 2 * atol)
