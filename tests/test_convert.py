"""`Objective.from_verl` and verl's loss adapter by plain formulas, without verl; parity with verl: integrations."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.choices import KL, Reduce
from fastgrpo.convert import objective_from_verl
from fastgrpo.integrations.verl_loss import MODES, make_policy_loss
from tests import formulas as f
from tests.formulas import Batch, make_batch
from tests.test_losses import check, close

CONFIG = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}


def vanilla(b: Batch) -> Tensor:
    inner = -f.ppo(b, 0.2, 0.28)
    return -torch.where(b.advantage < 0, torch.maximum(inner, 3.0 * b.advantage), inner)


def local_gspo(b: Batch) -> Tensor:
    own = b.logprob - b.old
    s = (f.mean(own, b.mask).detach() + own - own.detach()).clamp(max=10.0).exp()
    return f.clipped(s, b.advantage, 0.2, 0.28)


def geo_mean(b: Batch) -> Tensor:
    unclamped = Batch(b.logprob, b.old, b.ref, b.rollout, b.advantage, b.mask)
    d, sign = unclamped.logprob - unclamped.old, b.advantage.sign()
    pooled = sign * torch.minimum(sign * d, sign * d.clamp(-0.2, 0.28))
    return -b.advantage * f.mean(torch.where(sign == 0, d, pooled), b.mask).exp()


FORMULAS = {
    "vanilla": vanilla,
    "gspo": local_gspo,
    "sapo": f.sapo,
    "gpg": f.reinforce,
    "cispo": lambda b: f.cispo(b, 0.8, 1.28),
    "geo_mean": geo_mean,
    "dro": lambda b: f.dro(b, 0.3),
    "dppo_tv": lambda b: f.dppo_tv(b, 0.2, 0.28, 3.0),
    "dppo_kl": lambda b: f.dppo_kl(b, 0.2, 0.28, 3.0),
}
AGGREGATIONS = {
    "token-mean": {"per": "token"},
    "seq-mean-token-sum": {"per": "sequence", "power": 0.0, "count_empty": False},
    "seq-mean-token-mean": {"per": "sequence", "count_empty": False},
    "seq-mean-token-sum-norm": {"per": "constant", "length": 12, "count_empty": False},
}


def options(mode: str, **more: object) -> dict:
    return {
        **CONFIG,
        "policy_loss": {"loss_mode": mode, "dro_beta": 0.3},
        "loss_scale_factor": 12,
        **more,
    }


def reduction(mode: str, aggregation: str) -> dict:
    if mode == "sapo":
        return AGGREGATIONS["seq-mean-token-mean"]
    return {"per": "sequence"} if mode == "geo_mean" else AGGREGATIONS[aggregation]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", FORMULAS)
def test_modes_and_aggregations_of_verl(mode, aggregation):
    objective = Objective.from_verl(options(mode, loss_agg_mode=aggregation))
    needs = dict(reduction(mode, aggregation))
    per = needs.pop("per")

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        tokens = FORMULAS[mode](b)
        return tokens, f.reduce_tokens(tokens, b.mask, per, **needs)

    check(make_batch(seed=1), objective, expected)


def test_every_mode_is_tested():
    assert set(FORMULAS) == set(MODES)


@pytest.mark.parametrize("aggregation", [*AGGREGATIONS, "token-sum"])
def test_adapter_takes_verls_global_denominators(aggregation):
    """The same loss on a namespace as on verl's configuration: sums over ranks and micro-batches, times dp_size."""
    info = {"dp_size": 4, "batch_num_tokens": 90, "global_batch_size": 24, "loss_scale_factor": 12}
    config = SimpleNamespace(
        **CONFIG, policy_loss=SimpleNamespace(dro_beta=None), global_batch_info=info
    )
    b = make_batch(seed=2)
    loss, metrics = make_policy_loss("vanilla")(
        b.old, b.logprob, b.advantage, b.mask, aggregation, config
    )
    if aggregation == "token-sum":
        wanted = f.reduce_tokens(vanilla(b), b.mask, "token", normalizer=1 / 4)
    else:
        needs = dict(AGGREGATIONS[aggregation])
        total = 90 if needs["per"] == "token" else 24
        wanted = f.reduce_tokens(vanilla(b), b.mask, normalizer=total / 4, **needs)
    close(loss, wanted, "loss")
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_adapter_needs_the_global_count_on_several_ranks():
    config = SimpleNamespace(**CONFIG, policy_loss=None, global_batch_info={"dp_size": 2})
    b = make_batch()
    with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
        make_policy_loss("vanilla")(b.old, b.logprob, b.advantage, b.mask, "token-mean", config)


def test_kl_and_entropy_terms_of_verl():
    objective = Objective.from_verl(
        options(
            "vanilla",
            use_kl_loss=True,
            kl_loss_coef=0.01,
            kl_loss_type="low_var_kl",
            entropy_coeff=0.02,
        )
    )
    assert objective.kl == KL(beta=0.01, estimator="k3", clamp_in=20.0, clamp_out=10.0)
    assert objective.entropy_coef == 0.02
    assert objective.entropy_reduce is None
    plus = Objective.from_verl(options("vanilla", use_kl_loss=True, kl_loss_type="k1+"))
    assert plus.kl == KL(beta=0.001, estimator="k1", gradient="k2", clamp_in=None)
    sapo = Objective.from_verl(options("sapo", entropy_coeff=0.02))
    assert sapo.reduce == Reduce(count_empty=False)
    assert sapo.entropy_reduce == Reduce(per="token"), (
        "sapo forces its own reduction, the entropy keeps verl's"
    )


def test_rejection_bounds_of_verl_stand_on_the_inverse_ratio():
    settings = {"rollout_rs": "token_k1,seq_max_k3", "rollout_rs_threshold": "0.5_1.25,0.3"}
    first, second = objective_from_verl(CONFIG, rollout_correction=settings).gates
    assert (first.low, first.high) == (-math.log(1.25), -math.log(0.5))
    assert (second.stat, second.pool, second.low, second.high) == ("k3", "seq_max", -math.inf, 0.3)
    assert first.scope == second.scope == "mask"


REFUSED = {
    "clip_cov": (options("clip_cov"), None, "clip_cov"),
    "aggregation": (options("vanilla", loss_agg_mode="mean"), None, "loss_agg_mode must be one of"),
    "token-sum": (options("vanilla", loss_agg_mode="token-sum"), None, "token-sum"),
    "norm": (
        {**CONFIG, "loss_agg_mode": "seq-mean-token-sum-norm"},
        None,
        "without loss_scale_factor",
    ),
    "clip_ratio_c": ({**CONFIG, "clip_ratio_c": 1.0}, None, "clip_ratio_c must be > 1"),
    "kl": ({**CONFIG, "use_kl_loss": True, "kl_loss_type": "full"}, None, "kl_loss_type"),
    "dro": ({**CONFIG, "policy_loss": {"loss_mode": "dro"}}, None, "dro_beta must be > 0"),
    "dro-kl": (options("dro", use_kl_loss=True), None, "already pulls to the old policy"),
    "sapo-kl": (options("sapo", use_kl_loss=True), None, "has one of its own"),
    "level": (CONFIG, {"rollout_is": "prompt"}, "rollout_is must be"),
    "threshold": (
        CONFIG,
        {"rollout_is": "token", "rollout_is_threshold": "low"},
        "rollout_is_threshold",
    ),
    "geo_mean": (options("geo_mean"), {"rollout_is": "token"}, "rollout_is='token'"),
    "rs": (CONFIG, {"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2}, "seq_max_k1"),
    "rs-count": (
        CONFIG,
        {"rollout_rs": "token_k2", "rollout_rs_threshold": "1,2"},
        "1 or 1 values",
    ),
    "rs-lower": (
        CONFIG,
        {"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"},
        "one upper bound",
    ),
    "bypass-kind": (CONFIG, {"bypass_mode": True, "loss_type": "cispo"}, "ppo_clip or reinforce"),
    "bypass-rs": (
        CONFIG,
        {"bypass_mode": True, "rollout_rs": "token_k1"},
        "rollout_rs in bypass mode",
    ),
    "bypass-normalise": (
        CONFIG,
        {"bypass_mode": True, "loss_type": "reinforce", "rollout_is_batch_normalize": True},
        "rollout_is_batch_normalize",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_named(name):
    config, correction, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        objective_from_verl(config, rollout_correction=correction)
