"""grpo_loss in C++ is token_logprob, policy_loss and the gradient in one call, to the last bit."""

import random

import pytest
import torch

from fastgrpo.ops.grpo_loss import grpo_loss
from fastgrpo.ops.policy_loss import policy_loss
from fastgrpo.ops.token_logprob import token_logprob_bwd, token_logprob_fwd
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.spec import Level
from tests.cpu.inputs import (
    DTYPES,
    NAN,
    logits_and_ids,
    numbers,
    policy_arguments,
    random_objective,
    require_compiled,
)
from tests.cpu.test_policy_loss import PLAIN, plain_params
from tests.ops.common import bitwise_equal

require_compiled("grpo_loss")

LENGTHS = [3, 0, 9, 12]


class Case:
    """Arguments of the op, and its result by the three separate ops."""

    def __init__(
        self, dtype, spec, values, seed, vocabulary=777, temperature=(0.9,), params=(), scale=()
    ):
        self.logits, self.ids = logits_and_ids(sum(LENGTHS), vocabulary, dtype, seed=seed)
        acc = accumulate_dtype(dtype)
        self.tokens, self.cu = policy_arguments(LENGTHS, acc, seed)
        self.head = (numbers(dtype, *temperature), numbers(dtype, *params))
        self.params, self.spec, self.scale = (
            torch.tensor(values, dtype=acc),
            spec,
            numbers(dtype, *scale),
        )
        self.logits[~self.tokens[2]] = NAN
        self.ids[~self.tokens[2]] = -100

    def two_step(self, with_entropy, with_gradient):
        _, advantage, mask, weight, *sides, _, entropy_weight = self.tokens
        logprob, entropy, lse = token_logprob_fwd(
            self.logits, self.ids, mask, *self.head, with_entropy
        )
        middle = (logprob, advantage, mask, weight, *sides, entropy, entropy_weight)
        loss, token_loss, dlogprob, metrics = policy_loss(
            *middle, self.cu, self.params, self.spec, ""
        )
        gradient = torch.empty(0)
        if with_gradient:
            scale = self.scale if self.scale.numel() else 1.0
            dentropy = entropy_weight
            if dentropy.numel():
                dentropy = -dentropy.where(mask, torch.zeros_like(dentropy)) * scale
            gradient = torch.empty_like(self.logits)
            token_logprob_bwd(
                self.logits,
                self.ids,
                *self.head,
                logprob,
                entropy,
                lse,
                dlogprob * scale,
                dentropy,
                gradient,
            )
        return loss, token_loss, logprob, entropy, dlogprob, metrics, gradient

    def one_pass(self, with_entropy, dlogits, logits=None):
        _, advantage, mask, weight, *sides, _, entropy_weight = self.tokens
        logits = self.logits if logits is None else logits
        results = grpo_loss(
            logits, self.ids, *self.head, advantage, mask, weight, *sides, entropy_weight, self.cu, self.params,
            self.scale, self.spec, "", with_entropy, dlogits,
        )  # fmt: skip
        return (*results, dlogits)

    def check(self, with_entropy=True):
        want = self.two_step(with_entropy, with_gradient=True)
        new, own = torch.full_like(self.logits, 7.0), self.logits.clone()
        for got in (self.one_pass(with_entropy, new), self.one_pass(with_entropy, own, own)):
            assert all(bitwise_equal(a, b) for a, b in zip(got, want, strict=True))
        forward_only = self.one_pass(with_entropy, torch.empty(0))
        assert all(bitwise_equal(a, b) for a, b in zip(forward_only[:-1], want[:-1], strict=True))
        return want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_three_steps(dtype):
    """Random objectives: those whose coefficients need a row alone, and those that need the sequence."""
    for seed in range(24):
        spec, values = random_objective(random.Random(seed))
        Case(dtype, spec, values, seed, scale=(8.0,) if seed % 2 else ()).check(
            with_entropy=seed % 3 > 0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_softcap_and_a_temperature_per_row(dtype):
    temperature = tuple(0.5 + 0.1 * row for row in range(sum(LENGTHS)))
    for seed in range(4):
        spec, values = random_objective(random.Random(seed))
        Case(dtype, spec, values, seed, temperature=temperature, params=(1.5, 20.0)).check()


@pytest.mark.parametrize("level", list(Level), ids=lambda level: level.name)
def test_tokens_without_a_coefficient_have_no_gradient(level):
    """Zero advantage and beta = 0, or masked: the row is exactly 0; the others are not."""
    values = plain_params(torch.float64, beta=0.0).tolist()
    case = Case(torch.float32, [int(level), *PLAIN[1:]], values, 3)
    case.tokens = [
        value.new_empty(0) if index >= 4 else value for index, value in enumerate(case.tokens)
    ]
    case.tokens[1][5:9] = 0.0
    want = case.check()
    mask, advantage, gradient = case.tokens[2], case.tokens[1], want[-1]
    idle = ~mask | (advantage == 0)
    assert bool((gradient[idle] == 0).all()) or level != Level.TOKEN
    assert bool((gradient[~mask] == 0).all())
    assert bool((gradient[~idle] != 0).any(dim=1).all())


def test_a_faulty_row_stays_alone():
    case = Case(torch.float32, PLAIN, plain_params(torch.float64).tolist(), 4)
    mask = case.tokens[2]
    good = case.check()[-1]
    row = int(mask.nonzero()[2])
    case.logits[row, 100] = NAN
    bad = case.check()[-1]
    others = torch.arange(len(mask)) != row
    assert bool(bad[row].isnan().all())
    assert bitwise_equal(bad[others], good[others])


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    for level in (Level.TOKEN, Level.SEQ_SUM):
        spec = [int(level), *PLAIN[1:]]
        case = Case(
            torch.bfloat16, spec, plain_params(torch.float64).tolist(), 6, vocabulary=20_001
        )
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(case.one_pass(True, torch.empty_like(case.logits)))
        finally:
            torch.set_num_threads(before)
        assert all(bitwise_equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals_name_the_argument():
    case = Case(torch.float32, PLAIN, plain_params(torch.float64).tolist(), 0)
    with pytest.raises(RuntimeError, match="dlogits must have the dtype of logits"):
        case.one_pass(False, torch.empty_like(case.logits, dtype=torch.float64))
    case.scale = torch.ones(2)
    with pytest.raises(RuntimeError, match="grad_scale must have 1 elements, got 2"):
        case.one_pass(False, torch.empty(0))
