"""Liger 0.8.5's GRPO loss against ours: the same numbers where it follows TRL, a pinned difference elsewhere."""

import warnings

import pytest
import torch

pytest.importorskip(
    "liger_kernel", reason="liger-kernel is not installed: pip install 'fastgrpo[bench]'"
)
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from fastgrpo import Objective, linear_grpo_loss, policy_loss
from fastgrpo.choices import KL, Reduce
from fastgrpo.convert.trl import REDUCES
from tests import formulas as f
from tests.formulas import make_batch
from tests.test_losses import close

LENGTH = 9
OBJECTIVES = {
    "grpo": Objective.grpo(epsilon=0.2, epsilon_high=0.3),
    "bnpo": Objective.bnpo(epsilon=0.2, epsilon_high=0.3),
    "dr_grpo": Objective.dr_grpo(LENGTH, epsilon=0.2, epsilon_high=0.3),
    "dapo": Objective.dapo(epsilon=0.2, epsilon_high=0.3),
    "cispo": Objective.cispo(epsilon_high=0.3),
    "sapo": Objective.sapo(tau_negative=1.0625),
    "vespo": Objective.vespo(),
}
OPTIONS = {
    "plain": {},
    "delta": {"delta": 1.4},
    "kl": {"beta": 0.1},
    "kl-corrected": {"beta": 0.1, "use_bias_correction_kl": True},
    "sequence": {"importance_sampling_level": "sequence"},
    "is-weights": {"vllm_is_ratio": True},
}


def unclamped(objective: Objective, loss_type: str, options: dict) -> Objective:
    """Liger's formula in our terms: no clamps outside of VESPO."""
    changes: dict = {"d_clamp": objective.d_clamp if loss_type == "vespo" else None}
    gradient = "ratio" if options.get("use_bias_correction_kl") else "path"
    changes["kl"] = KL(beta=options.get("beta", 0.0), gradient=gradient, clamp_in=None)
    if options.get("importance_sampling_level") == "sequence":
        changes["level"] = "seq_mean"
    if "delta" in options and objective.surrogate == "ratio" and objective.shape is None:
        clip = Objective.grpo(epsilon=0.2, epsilon_high=0.3, delta=options["delta"])
        changes |= {"positive": clip.positive, "negative": clip.negative}
    return objective.replace(**changes)


def batch_for(seed: int):
    b = make_batch(seed=seed, noise=0.2)
    logprob = b.logprob.clamp(min=-4)
    g = torch.Generator().manual_seed(seed)
    noise = lambda: 0.2 * torch.randn(logprob.shape, generator=g, dtype=torch.float64)  # noqa: E731
    return logprob, logprob + noise(), logprob + noise(), b.advantage[:, 0], b.mask


CASES = [
    (loss_type, option)
    for loss_type in OBJECTIVES
    for option in OPTIONS
    # Liger refuses a sequence level there; VESPO's KL weight is the token's ratio, which from_trl refuses.
    if not (option == "sequence" and loss_type in ("cispo", "sapo", "vespo"))
    and not (option == "kl-corrected" and loss_type == "vespo")
    and not (option == "is-weights" and loss_type == "vespo")
]


@pytest.mark.parametrize(("loss_type", "option"), CASES)
def test_loss_function_equals_ligers(loss_type, option):
    logprob, old, ref, advantage, mask = batch_for(CASES.index((loss_type, option)))
    options = dict(OPTIONS[option])
    weight = None
    if options.pop("vllm_is_ratio", False):
        weight = torch.rand(mask.shape, dtype=torch.float64) + 0.5
    leaf = logprob.clone().requires_grad_()
    wanted, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf, mask.double(), advantage, mask.double(), ref_per_token_logps=ref,
        old_per_token_logps=old, epsilon_low=0.2, epsilon_high=0.3, loss_type=loss_type,
        max_completion_length=LENGTH, sapo_temperature_neg=1.0625, vllm_is_ratio=weight,
        **{"beta": 0.0, **options},
    )  # fmt: skip
    wanted.backward()
    ours = logprob.clone().requires_grad_()
    objective = unclamped(OBJECTIVES[loss_type], loss_type, options)
    out = policy_loss(
        ours,
        advantage,
        mask,
        old_logprob=old,
        ref_logprob=ref,
        token_weight=weight,
        objective=objective,
    )
    out.loss.backward()
    # Liger counts tokens in float32, so its float64 stops at 1e-7.
    assert torch.allclose(out.loss, wanted, rtol=3e-7)
    assert torch.allclose(ours.grad, leaf.grad, rtol=3e-7, atol=1e-12)
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") and option != "sequence":
        assert torch.allclose(out.metrics["clip_region"], metrics[-1].double(), rtol=1e-6)


def test_module_on_hidden_states_equals_linear_grpo_loss():
    """Both from the hidden states on, gradients of hidden states and head included."""
    torch.manual_seed(0)
    batch, length, size, vocabulary = 4, 6, 8, 37
    hidden, weight = torch.randn(batch, length, size), torch.randn(vocabulary, size)
    ids = torch.randint(vocabulary, (batch, length))
    mask = torch.arange(length)[None] < torch.tensor([6, 3, 1, 5])[:, None]
    advantage = torch.tensor([1.0, -0.5, 2.0, -1.0])
    old = (hidden @ weight.T / 0.8).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = old + 0.1 * torch.randn(batch, length)
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = linear_grpo_loss(
                h,
                w,
                ids,
                advantage,
                mask,
                old_logprob=old,
                temperature=0.8,
                objective=Objective.bnpo(),
            ).loss
        else:
            module = LigerFusedLinearGRPOLoss(
                beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", temperature=0.8
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss, _ = module(h, w, ids, mask, advantage, old_per_token_logps=old)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_luspo_is_where_liger_left_trl():
    """Liger 0.8.5 takes the mean over B x T of L |o|, with the L of padding in it.

    TRL >= 1.10 and the paper: the sum over tokens, the mean over sequences. The two agree only if L is one number per
    sequence; our preset is the paper's.
    """
    logprob, old, _, advantage, mask = batch_for(1)
    theirs, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logprob, mask.double(), advantage, mask.double(), old_per_token_logps=old, beta=0.0, loss_type="luspo"
    )  # fmt: skip
    b = f.Batch(logprob, old, old, old, advantage[:, None].expand_as(logprob), mask)
    objective = Objective.grpo().replace(reduce=REDUCES["luspo"], d_clamp=None)
    ours = policy_loss(logprob, advantage, mask, old_logprob=old, objective=objective).loss
    close(ours, f.reduce_tokens(f.ppo(b), mask, "sequence", power=0.0), "LUSPO as published")
    weighted = f.ppo(b) * mask.sum(1, keepdim=True)
    assert torch.allclose(theirs, weighted.sum() / mask.numel(), rtol=1e-6)
    assert not torch.allclose(ours, theirs, rtol=1e-2)


def test_reductions_that_liger_and_trl_share_are_one_table():
    assert REDUCES["grpo"] == Reduce()
    assert REDUCES["dapo"] == OBJECTIVES["dapo"].reduce
