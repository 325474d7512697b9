"""`kernels.grpo_loss`: equal to the float64 reference and to the three kernels that it replaces."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter_helpers import accumulate, assert_close, logits_and_ids, statistic_atol
from policy_inputs import PRESETS, assert_outputs, random_choice, tokens, without

from fastgrpo import reference
from fastgrpo.kernels import grpo_loss, policy_loss, surrogates, token_logprob
from fastgrpo.objective import Objective
from fastgrpo.spec import Surrogate

LENGTHS = [3, 0, 4]
N = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(policy_loss, "_BLOCK", 16)


class Case:
    """Arguments of one call; the log-probs of the other policies lie near the policy's own."""

    def __init__(self, vocabulary, dtype, spec, params, absent=(), seed=0, scale=4.0):
        acc = accumulate(dtype)
        self.logits, self.token_ids = logits_and_ids(N, vocabulary, dtype, scale=scale, seed=seed)
        self.temperature = torch.tensor([0.8], dtype=acc)
        self.logit_params = torch.empty(0, dtype=acc)
        mask = torch.tensor([True, False, True, True, True, False, True])
        values = tokens(LENGTHS, acc, seed, mask=mask)
        logprob, _, _ = reference.token_logprob_fwd(
            self.logits.double(), self.token_ids, values["mask"], self.temperature.double(),
            self.logit_params.double(), False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for name in ("old", "ref", "rollout"):
            values[name] = (logprob + 0.2 * torch.randn(N, generator=generator)).to(acc)
        del values["logprob"], values["entropy"]
        self.values = without(values, *(set(absent) - {"entropy"}))
        self.params = torch.tensor(params, dtype=acc)
        self.grad_scale = torch.tensor([4.0], dtype=acc)
        self.spec = spec

    def run(self, function, out, convert=lambda x: x, surrogate="", with_entropy=True):
        values = [convert(x) if x.is_floating_point() else x for x in self.values.values()]
        return function(
            convert(self.logits), self.token_ids,
            convert(self.temperature), convert(self.logit_params), *values, convert(self.params),
            convert(self.grad_scale), self.spec, surrogate, with_entropy, out,
        )  # fmt: skip

    def check(self, surrogate="", factor=256.0, with_entropy=True):
        dlogits = torch.full_like(self.logits, 7.0)
        got = self.run(grpo_loss.grpo_loss, dlogits, surrogate=surrogate, with_entropy=with_entropy)
        gold = torch.empty(self.logits.shape, dtype=torch.float64)
        want = self.run(reference.grpo_loss, gold, torch.Tensor.double, surrogate, with_entropy)
        loss, token_loss, logprob, entropy, dlogprob, metrics = got
        assert_outputs(
            (loss, token_loss, dlogprob, metrics), (want[0], want[1], want[4], want[5]), factor
        )
        atol = statistic_atol(self.logits, self.temperature)
        assert_close(logprob, want[2], atol)
        assert_close(entropy, want[3], atol)
        largest = float(gold[gold.isfinite()].abs().max())
        eps = torch.finfo(dlogits.dtype).eps
        assert_close(dlogits, gold, atol=factor * torch.finfo(loss.dtype).eps * largest + eps * eps)
        return dlogits


# 31: one masked block; 1000: aligned; 4097: unaligned rows; 20000: main loop in both passes.
@pytest.mark.parametrize("vocabulary", [1, 31, 1000, 4097, 20000])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_vocabularies_and_dtypes(vocabulary, dtype):
    objective = Objective.grpo(beta=0.04)
    case = Case(vocabulary, dtype, objective.spec(), objective.params())
    dlogits = case.check()
    assert (dlogits[~case.values["mask"]] == 0).all()


@pytest.mark.parametrize("objective", PRESETS, ids=lambda x: x.name)
def test_presets(objective):  # the pooled ones run as three kernels
    Case(
        300, torch.float32, objective.spec(), objective.params(), ("entropy_weight", "log_weight")
    ).check()


@pytest.mark.parametrize("seed", range(100, 116))
def test_random_token_level_specifications(seed):
    spec, params, absent = random_choice(seed, pooled=False)
    Case(200, torch.float32, spec, params, absent, seed).check()


@pytest.mark.parametrize("pooled", [False, True], ids=["one pass", "three kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_place_equals_out_of_place(dtype, pooled):
    objective = Objective.gspo(beta=0.1) if pooled else Objective.grpo(beta=0.1)
    case = Case(20000, dtype, objective.spec(), objective.params())
    apart = torch.empty_like(case.logits)
    first = case.run(grpo_loss.grpo_loss, apart)
    second = case.run(grpo_loss.grpo_loss, case.logits)
    assert torch.equal(case.logits, apart)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(100, 104))
def test_equals_the_three_kernels(seed):
    spec, params, absent = random_choice(seed, pooled=False)
    case = Case(4097, torch.bfloat16, spec, params, absent, seed)
    one = torch.empty_like(case.logits)
    got = case.run(grpo_loss.grpo_loss, one)
    v = case.values
    mask, weights = v["mask"], v["entropy_weight"]
    row = (case.logits, case.token_ids, mask, case.temperature, case.logit_params)
    logprob, entropy, lse = token_logprob.forward(*row, True)
    sides = [v[k] for k in ("old", "ref", "rollout", "log_weight", "token_weight", "kl_weight")]
    loss, token_loss, dlogprob, metrics = policy_loss.policy_loss(
        logprob, v["advantage"], mask, v["weight"], *sides, entropy, weights, v["cu_seqlens"], case.params, spec, ""
    )  # fmt: skip
    three = torch.empty_like(case.logits)
    dentropy = torch.where(mask, -4.0 * weights, 0.0) if weights.numel() else weights
    token_logprob.backward(
        case.logits, case.token_ids, case.temperature, case.logit_params, logprob, entropy, lse, dlogprob * 4.0,
        dentropy, three,
    )  # fmt: skip
    # The kernels differ in block size, hence in the order of sums: a few eps of the log-prob.
    for a, b in zip(got[1:5], (token_loss, logprob, entropy, dlogprob), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0], loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[5], metrics, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, three, rtol=2**-7, atol=1e-6)


def test_softcap_scale_and_temperature_per_row():
    objective = Objective.grpo(beta=0.04)
    case = Case(4097, torch.float32, objective.spec(), objective.params(), scale=12.0)
    case.logit_params = torch.tensor([0.5, 7.0])
    case.temperature = torch.linspace(0.5, 2.0, N)
    case.check()


def test_without_gradient_and_without_entropy():
    objective = Objective.grpo(beta=0.04)
    case = Case(4097, torch.bfloat16, objective.spec(), objective.params(), ("entropy_weight",))
    before = case.logits.clone()
    with_gradient = case.run(grpo_loss.grpo_loss, torch.empty_like(case.logits), with_entropy=False)
    got = case.run(grpo_loss.grpo_loss, case.logits.new_empty(0), with_entropy=False)
    assert torch.equal(case.logits, before)
    assert got[3].numel() == 0
    for a, b in zip(got, with_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    case.grad_scale = torch.empty(0)
    case.check(with_entropy=False)


def test_masked_rows_are_not_read_and_idle_rows_are_zero():
    objective = Objective.grpo()
    case = Case(1000, torch.float32, objective.spec(), objective.params(), ("entropy_weight",))
    case.values["advantage"][2] = 0.0
    first = torch.full_like(case.logits, 7.0)
    clean = case.run(grpo_loss.grpo_loss, first)
    case.logits[1], case.logits[5] = torch.nan, torch.inf
    case.token_ids[1] = -100
    second = torch.full_like(case.logits, 7.0)
    dirty = case.run(grpo_loss.grpo_loss, second)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (first[[1, 2, 5]] == 0).all()


def test_faulty_rows_stay_alone():
    objective = Objective.grpo(beta=0.1)
    case = Case(1000, torch.float32, objective.spec(), objective.params())
    case.logits[0, 7] = torch.nan
    case.logits[2] = -torch.inf
    case.token_ids[3] = 1000
    case.logits[4, 4:] = -torch.inf
    case.token_ids[4] = 2
    dlogits = case.check()
    assert dlogits[[0, 2, 3]].isnan().all()
    assert dlogits[[1, 4, 5, 6]].isfinite().all()


@triton.jit
def _smooth_absolute(log_ratio, advantage, params):
    length = tl.sqrt(1.0 + log_ratio * log_ratio)
    return -advantage * length, -advantage * log_ratio / length


def _smooth_absolute_expression(log_ratio, advantage, user):
    length = torch.sqrt(1 + log_ratio**2)
    return -advantage * length, -advantage * log_ratio / length


def test_registered_surrogate(monkeypatch):
    name = "smooth_absolute"
    monkeypatch.setitem(surrogates.SURROGATES, name, _smooth_absolute)
    monkeypatch.setitem(reference.SURROGATES, name, _smooth_absolute_expression)
    objective = Objective.grpo(beta=0.1)
    spec = objective.spec()
    spec[2] = int(Surrogate.CUSTOM)
    Case(300, torch.float32, spec, objective.params()).check(name)


def test_no_rows():
    objective = Objective.grpo()
    case = Case(64, torch.float32, objective.spec(), objective.params())
    case.logits, case.token_ids = case.logits[:0], case.token_ids[:0]
    case.values = {k: v[:0] if k != "cu_seqlens" else v[:1] for k, v in case.values.items()}
    loss, *rest = case.run(grpo_loss.grpo_loss, case.logits)
    assert loss == 0
    assert [x.numel() for x in rest[:4]] == [0, 0, 0, 0]
