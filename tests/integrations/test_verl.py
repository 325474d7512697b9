"""verl's own loss functions, rollout correction, advantage estimator and fused-head door against fastgrpo's."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "verl.trainer.ppo.core_algos",
    reason="verl is not installed. A light install is enough: pip install --no-deps --target DIR verl ray tensordict "
    "omegaconf (and what their import then asks for), with DIR on PYTHONPATH",
    exc_type=ImportError,
)
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

from fastgrpo import Objective, policy_loss
from fastgrpo.convert import objective_from_verl
from fastgrpo.integrations import verl as adapter
from fastgrpo.integrations.verl_loss import MODES
from tests.formulas import make_batch
from tests.test_losses import close

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
GLOBAL = {"dp_size": 4, "batch_num_tokens": 77, "global_batch_size": 19, "loss_scale_factor": 12}


def actor(mode: str = "vanilla", **options: object) -> ActorConfig:
    info = options.pop("global_batch_info", {})
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=PolicyLossConfig(loss_mode=mode, dro_beta=0.3),
        # The parity is in float64: numbers that float32 holds exactly where verl makes float32 tensors of them.
        **{"tau_neg": 1.0625, "clip_ratio_high": 0.28, **options},
    )
    config.global_batch_info.update(info)
    return config


def inputs(seed: int = 0, *, packed_rows: bool = True):
    b = make_batch(seed=seed, noise=0.2)
    logprob = b.logprob.clamp(min=-4.0)
    g = torch.Generator().manual_seed(seed)
    old, rollout = (
        (logprob + 0.2 * torch.randn(logprob.shape, generator=g, dtype=torch.float64)).clamp(
            max=-1e-3
        )
        for _ in range(2)
    )
    return logprob, old, rollout, b.advantage, b.mask


def theirs(mode: str, config: ActorConfig, aggregation: str, weight=None, seed: int = 0):
    logprob, old, _, advantage, mask = inputs(seed)
    leaf = logprob.clone().requires_grad_()
    function = core_algos.get_policy_loss_fn(mode)
    loss, metrics = function(
        old_log_prob=old, log_prob=leaf, advantages=advantage, response_mask=mask,
        loss_agg_mode=aggregation, config=config, rollout_is_weights=weight,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), leaf.grad, metrics


# 9 modes x 5 aggregations, alternating local and global denominators, with and without importance weights.
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_registered_loss_equals_verls(mode, aggregation):
    number = MODES.index(mode) + AGGREGATIONS.index(aggregation)
    info = GLOBAL if number % 2 else {}
    config = actor(mode, global_batch_info=info)
    mask = inputs(number)[-1]
    weight = (torch.rand(mask.shape, dtype=torch.float64) + 0.5) * mask if number % 3 == 0 else None
    wanted, gradient, metrics = theirs(mode, config, aggregation, weight, number)
    found, our_gradient, ours = theirs(f"fastgrpo_{mode}", config, aggregation, weight, number)
    # verl guards its sequence denominators by + 1e-8, which is visible beyond 1e-8 relative.
    assert torch.allclose(found, wanted, rtol=3e-8, atol=1e-12)
    assert torch.allclose(our_gradient, gradient, rtol=3e-8, atol=1e-12)
    if mode in ("vanilla", "gspo"):
        for name in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"):
            assert ours[name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name


def test_plain_name_is_vanilla():
    a = theirs("fastgrpo", actor(), "token-mean")
    b = theirs("vanilla", actor(), "token-mean")
    close(a[0], b[0], "loss")


@pytest.mark.parametrize(
    "name", ["low_var_kl", "k3+", "k1", "k1+", "kl", "abs", "mse", "k2", "k2+"]
)
def test_kl_loss(name):
    """`from_verl` with use_kl_loss: verl's clamps on k3 alone, the gradient of the suffix unclamped."""
    logprob, old, _, advantage, mask = inputs(1)
    ref = logprob + 0.3 * torch.randn_like(logprob)
    ref[0, 0], ref[2, 0] = logprob[0, 0] + 25.0, logprob[2, 0] - 25.0
    config = actor(use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type=name)
    leaf = logprob.clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn("vanilla")(
        old, leaf, advantage, mask, "token-mean", config
    )
    kl = core_algos.agg_loss(core_algos.kl_penalty(leaf, ref, name), mask, "token-mean")
    (loss + 0.05 * kl).backward()
    ours = logprob.clone().requires_grad_()
    found = policy_loss(
        ours,
        advantage,
        mask,
        old_logprob=old,
        ref_logprob=ref,
        objective=Objective.from_verl(config),
    )
    found.loss.backward()
    close(found.loss.detach(), (loss + 0.05 * kl).detach(), "loss")
    close(ours.grad, leaf.grad, "gradient")


CORRECTIONS = {
    "tis-token": {"rollout_is": "token", "rollout_is_threshold": 1.2},
    "icepop": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.2"},
    "tis-sequence": {"rollout_is": "sequence", "rollout_is_threshold": 1.3},
    "normalised": {"rollout_is": "token", "rollout_is_batch_normalize": True},
    "normalised-sequence": {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
    **{
        f"reject-{name}": {"rollout_rs": name, "rollout_rs_threshold": limit}
        for name, limit in (
            ("token_k1", "0.7_1.25"),
            ("token_k1", "1.2"),
            ("token_k2", "0.02"),
            ("token_k3", 0.02),
            ("seq_sum_k1", "0.6_1.1"),
            ("seq_sum_k2", 0.1),
            ("seq_sum_k3", 0.1),
            ("seq_mean_k1", "0.9_1.15"),
            ("seq_mean_k2", 0.02),
            ("seq_mean_k3", 0.02),
            ("seq_max_k2", 0.05),
            ("seq_max_k3", 0.05),
        )
    },
    "both": {
        "rollout_is": "token",
        "rollout_rs": "token_k2,seq_mean_k3",
        "rollout_rs_threshold": "0.05,0.03",
    },
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rollout_correction(name):
    """verl's weights and rejection mask, with its k1 bounds on rollout / old, from the same settings."""
    settings = {"rollout_is": None, "bypass_mode": False, **CORRECTIONS[name]}
    logprob, old, rollout, advantage, mask = inputs(2)
    arguments = {k: v for k, v in settings.items() if k != "bypass_mode"}
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=old, rollout_log_prob=rollout, response_mask=mask, **arguments
    )
    weight = None if weights is None else weights.batch["rollout_is_weights"]
    assert weight is not None or not torch.equal(kept, mask), "the case is void"
    config = actor()
    leaf = logprob.clone().requires_grad_()
    wanted, _ = core_algos.get_policy_loss_fn("vanilla")(
        old, leaf, advantage, kept, "token-mean", config, weight
    )
    wanted.backward()
    objective = objective_from_verl(config, rollout_correction=settings)
    ours = logprob.clone().requires_grad_()
    found = policy_loss(
        ours, advantage, mask, old_logprob=old, rollout_logprob=rollout, objective=objective
    )
    found.loss.backward()
    assert torch.allclose(found.loss, wanted, rtol=3e-8)
    assert torch.allclose(ours.grad, leaf.grad, rtol=3e-8, atol=1e-14)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "ppo_clip"},
        {"loss_type": "reinforce", "rollout_is": None},
        {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.1},
        {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": "0.8_1.2"},
        {"loss_type": "reinforce", "rollout_is": "sequence", "rollout_is_threshold": 1.5},
        {"loss_type": "reinforce", "rollout_is": "sequence", "rollout_is_threshold": "0.5_1.5"},
    ],
    ids=str,
)
def test_bypass_mode(settings):
    logprob, old, _, advantage, mask = inputs(3)
    config = SimpleNamespace(
        policy_loss=SimpleNamespace(get=lambda *_: {"rollout_is": None, **settings}),
        get=lambda name, default: default,
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, global_batch_info={},
    )  # fmt: skip
    leaf = logprob.clone().requires_grad_()
    wanted, _ = core_algos.get_policy_loss_fn("bypass_mode")(
        old, leaf, advantage, mask, "token-mean", config
    )
    wanted.backward()
    objective = objective_from_verl(
        actor(), rollout_correction={"rollout_is": None, **settings, "bypass_mode": True}
    )
    ours = logprob.clone().requires_grad_()
    found = policy_loss(ours, advantage, mask, old_logprob=old, objective=objective)
    found.loss.backward()
    close(found.loss.detach(), wanted.detach(), "loss")
    close(ours.grad, leaf.grad, "gradient")


@pytest.mark.parametrize("scaled", [True, False], ids=["std", "mean-only"])
def test_advantage_estimator(scaled):
    rewards = torch.tensor([[0, 1.0], [0, 0.0], [0, 0.5], [0, 2.0], [0, 0.9], [0, 0.9]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]])
    index = ["a", "a", "a", "alone", "same", "same"]
    wanted, _ = core_algos.compute_grpo_outcome_advantage(
        rewards.clone(), mask, index, norm_adv_by_std_in_grpo=scaled
    )
    found, returns = core_algos.get_adv_estimator_fn("fastgrpo")(
        rewards, mask, index, norm_adv_by_std_in_grpo=scaled
    )
    assert torch.allclose(found[:4], wanted[:4], atol=1e-5)
    assert torch.equal(found[4:], torch.zeros(2, 2)), "equal rewards have exactly no advantage"
    assert returns is found


def test_fused_head_door():
    """verl's models look the symbol up at each call; eager log-softmax is the reference."""
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    hidden, weight = (
        torch.randn(2, 5, 8, requires_grad=True),
        torch.randn(37, 8, requires_grad=True),
    )
    labels = torch.randint(0, 37, (2, 5))
    logprob, entropy = module.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)
    wanted = log_p.gather(-1, labels[..., None]).flatten()
    torch.testing.assert_close(logprob, wanted)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).flatten())
    grads = torch.autograd.grad((logprob + 0.1 * entropy).sum(), (hidden, weight))
    eager = wanted.sum() - 0.1 * (log_p.exp() * log_p).sum()
    for a, b in zip(grads, torch.autograd.grad(eager, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    each = torch.rand(2, 5) + 0.5  # a temperature per token, which verl's kernel refuses
    logprob, _ = module.linear_cross_entropy(hidden, weight, labels, each, "none")
    log_p = (hidden @ weight.T / each[..., None]).log_softmax(-1)
    torch.testing.assert_close(logprob, log_p.gather(-1, labels[..., None]).flatten())
    adapter.disable()
    assert module.linear_cross_entropy is adapter._original_head
    adapter.enable()
    with pytest.raises(ValueError, match="reduction must be none"):
        module.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_fused_head_inside_verls_model_forward():
    """verl's patched Qwen2 forward on a tiny random model equals log-softmax of the logits."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.dense_common import forward_with_triton_backend

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=24, **sizes)
    )
    ids = torch.randint(0, 50, (2, 6))
    out = forward_with_triton_backend(model, input_ids=ids, temperature=0.9, return_dict=True)
    logits = model(input_ids=ids).logits / 0.9
    labels = torch.roll(ids, -1, -1)
    wanted = logits.log_softmax(-1).gather(-1, labels[..., None]).flatten()
    torch.testing.assert_close(out.log_probs.flatten(), wanted, rtol=1e-5, atol=1e-5)


REFUSED = {
    "clip_cov": (actor("clip_cov"), {}, "clip_cov"),
    "token-sum": (actor(loss_agg_mode="token-sum"), {}, "token-sum"),
    "no-scale": (actor(loss_agg_mode="seq-mean-token-sum-norm"), {}, "loss_scale_factor"),
    "full": (actor(use_kl_loss=True, kl_loss_type="full"), {}, "kl_loss_type"),
    "dro-kl": (actor("dro", use_kl_loss=True), {}, "loss_mode='dro'"),
    "sapo-kl": (
        actor("sapo", use_kl_loss=True),
        {},
        "use_kl_loss=True with policy_loss.loss_mode='sapo'",
    ),
    "geo-token-is": (actor("geo_mean"), {"rollout_is": "token"}, "rollout_is='token'"),
    "unknown-rs": (actor(), {"rollout_rs": "token_k9", "rollout_rs_threshold": 1}, "token_k9"),
    "rs-without-limit": (actor(), {"rollout_rs": "token_k2"}, "rollout_rs_threshold"),
    "bypass-rs": (
        actor(),
        {"bypass_mode": True, "rollout_rs": "token_k1", "rollout_rs_threshold": 2},
        "rollout_rs in bypass mode",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_named(name):
    config, correction, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        objective_from_verl(config, rollout_correction=correction or None)
