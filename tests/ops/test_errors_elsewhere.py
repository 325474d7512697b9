"""Bad arguments of everything that is not an op: objectives, advantages, normalisers, metrics, surrogates, policies."""

import re

import numpy as np
import pytest
import torch

from fastgrpo import (
    GRPOLoss,
    Metrics,
    Objective,
    checks,
    global_normalizer,
    group_advantage,
    register_surrogate,
    token_logprob,
)
from fastgrpo.advantages.process import process_advantage
from fastgrpo.choices import KL, Correction, Gamma, Gate, Reduce, Sigmoid
from fastgrpo.functional.checks import _policy_from_environment
from fastgrpo.ops.backend import _backend_from_environment
from tests.ops.bad_arguments import NothingRuns

NAN, INF = float("nan"), float("inf")
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0])
MASK = torch.ones(2, 3, dtype=torch.bool)
META = REWARD.to("meta")
PER_PROMPT = Objective.dapo().replace(reduce=Reduce(per="prompt"))
DATA = torch.zeros(16, 4, dtype=torch.float64)


def refused(call, error, message):
    with NothingRuns(), pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)


OBJECTIVES = {
    "level": (lambda: Objective(level="word"), "level must be one of token, seq_mean, seq_sum, got 'word'"),
    "pool_grad": (lambda: Objective(pool_grad="both"), "pool_grad must be one of shared, local, got 'both'"),
    "positive order": (lambda: Objective(positive=(2.0, 1.0)), r"positive must be a pair .*got \(2.0, 1.0\)"),
    "negative length": (lambda: Objective(negative=(1.0,)), r"negative must be a pair .*got \(1.0,\)"),
    "positive NaN": (lambda: Objective(positive=(NAN, 1.0)), r"positive must be a pair .*got \(nan, 1.0\)"),
    "pool_bounds": (lambda: Objective(pool_bounds=3.0), "pool_bounds must be a pair .*got 3.0"),
    "log_clip": (lambda: Objective(log_clip=(0.4, -0.4)), r"log_clip must be a pair .*got \(0.4, -0.4\)"),
    "d_clamp": (lambda: Objective(d_clamp=-1.0), "d_clamp must be None or > 0, got -1.0"),
    "entropy_coef NaN": (lambda: Objective(entropy_coef=NAN), "entropy_coef must be finite, got nan"),
    "entropy_coef inf": (lambda: Objective(entropy_coef=INF), "entropy_coef must be finite, got inf"),
    "surrogate_params": (lambda: Objective(surrogate_params=(1.0,)), "surrogate_params belong to a registered"),
    "9 parameters": (lambda: Objective(surrogate="x", surrogate_params=(0.0,) * 9), "at most 8 numbers"),
    "shape and bounds": (lambda: Objective(shape=Sigmoid(), positive=(0.0, 1.0)), "a shape replaces the bounds"),
    "custom and bounds": (lambda: Objective(surrogate="x", negative=(0.0, 1.0)), "does its own clipping"),
    "5 gates": (lambda: Objective(gates=(Gate(stat="k1", high=1.0),) * 5), "at most 4 gates .*got 5"),
    "epsilon": (lambda: Objective.dapo(epsilon=1.0), r"epsilon must be in \[0, 1\), got 1.0"),
    "epsilon_high": (lambda: Objective.gspo(epsilon_high=-1e-3), "epsilon_high must be >= 0, got -0.001"),
    "beta": (lambda: Objective.dapo(beta=-0.1), "KL.beta must be finite and >= 0, got -0.1"),
    "estimator": (lambda: KL(estimator="k5"), "KL.estimator must be one of k1, k2, k3, abs, got 'k5'"),
    "gradient": (lambda: KL(gradient="none"), "KL.gradient must be one of path, k2, ratio, ratio_detached"),
    "target": (lambda: KL(target="rollout"), "KL.target must be one of ref, old, got 'rollout'"),
    "clamp_in": (lambda: KL(clamp_in=0.0), "KL.clamp_in must be None or > 0, got 0.0"),
    "clamp_out": (lambda: KL(clamp_out=NAN), "KL.clamp_out must be None or > 0, got nan"),
    "ratio_cap": (lambda: KL(ratio_cap=0.0), "KL.ratio_cap must be > 0, got 0.0"),
    "stat": (lambda: Gate(stat="k9"), "Gate.stat must be one of ratio, k1"),
    "between": (lambda: Gate(stat="k1", between="a_b"), "Gate.between must be one of theta_old"),
    "pool": (lambda: Gate(stat="k1", pool="batch"), "Gate.pool must be one of token, seq_sum"),
    "when": (lambda: Gate(stat="k1", when="zero"), "Gate.when must be one of always, positive, negative"),
    "scope": (lambda: Gate(stat="k1", scope="all"), "Gate.scope must be one of policy, policy_and_kl, mask"),
    "gate without bounds": (lambda: Gate(stat="k1"), "Gate needs low or high: without a bound it never closes"),
    "gate bounds": (lambda: Gate(stat="k1", low=1.0, high=0.0), r"Gate \(low, high\) must be a pair"),
    "mask scope": (lambda: Gate(stat="k1", high=1.0, scope="mask"), "Gate.scope='mask' needs between='old_rollout'"),
    "entropy gate": (lambda: Gate(stat="entropy", low=1.0, between="old_rollout"), "Gate.stat='entropy' measures"),
    "correction level": (lambda: Correction(level="word"), "Correction.level must be one of token, seq_sum"),
    "correction mode": (lambda: Correction(mode="clip"), "Correction.mode must be one of truncate, mask"),
    "correction bounds": (lambda: Correction(low=-0.5), "Correction.low must be >= 0, got -0.5"),
    "correction order": (lambda: Correction(low=3.0), r"Correction \(low, high\) must be a pair"),
    "per": (lambda: Reduce(per="batch"), "Reduce.per must be one of token, sequence, prompt, constant"),
    "length missing": (lambda: Reduce(per="constant"), "Reduce.length must be > 0, got None"),
    "length 0": (lambda: Objective.dr_grpo(0), "Reduce.length must be > 0, got 0"),
    "length unused": (lambda: Reduce(length=5), "Reduce.length belongs to per='constant', got 5"),
    "sigmoid": (lambda: Sigmoid(negative=-1.0), "Sigmoid.negative must be > 0, got -1.0"),
    "gamma": (lambda: Gamma(positive=(0.0, 1.0)), "Gamma.positive must be two numbers > 0"),
}  # fmt: skip


# What a configuration file or a command line may hand over: text, flags, a number where a record belongs.
OBJECTIVE_TYPES = {
    "epsilon": (
        lambda: Objective.grpo(epsilon="0.2"),
        "epsilon must be a number, got str '0.2'",
    ),
    "epsilon_high": (
        lambda: Objective.dapo(epsilon_high=None),
        "epsilon_high must be a number, got NoneType None",
    ),
    "delta": (lambda: Objective.grpo(delta="2"), "delta must be a number, got str '2'"),
    "beta": (lambda: Objective.grpo(beta="0.04"), "KL.beta must be a number, got str '0.04'"),
    "kl": (lambda: Objective(kl=0.04), "Objective.kl must be KL, got float 0.04"),
    "reduce": (
        lambda: Objective(reduce="token"),
        "Objective.reduce must be Reduce, got str 'token'",
    ),
    "gates": (
        lambda: Objective(gates=Gate(stat="k1", high=1.0)),
        "Objective.gates must be tuple, got Gate",
    ),
    "shape": (
        lambda: Objective(shape="sigmoid"),
        "Objective.shape must be Sigmoid or Gamma, got str 'sigmoid'",
    ),
    "correction": (
        lambda: Objective(correction=True),
        "Objective.correction must be Correction, got bool True",
    ),
    "d_clamp": (
        lambda: Objective(d_clamp="20"),
        "Objective.d_clamp must be a number, got str '20'",
    ),
    "entropy_coef": (
        lambda: Objective(entropy_coef=True),
        "Objective.entropy_coef must be a number, got bool True",
    ),
    "surrogate": (lambda: Objective(surrogate=3), "Objective.surrogate must be str, got int 3"),
    "positive": (
        lambda: Objective(positive=("0", 1.0)),
        "positive limit must be a number, got str '0'",
    ),
    "gate": (lambda: Gate(stat="k1", high="1"), "Gate.high must be a number, got str '1'"),
    "length": (lambda: Objective.dr_grpo(100.5), "Reduce.length must be int, got float 100.5"),
    "count_empty": (
        lambda: Reduce(count_empty="no"),
        "Reduce.count_empty must be bool, got str 'no'",
    ),
    "tau": (
        lambda: Objective.sapo(tau_negative="1"),
        "Sigmoid.negative must be a number, got str '1'",
    ),
    "gamma": (
        lambda: Gamma(positive=(1.0, "2")),
        "Gamma.positive entry must be a number, got str '2'",
    ),
}


@pytest.mark.parametrize("name", OBJECTIVE_TYPES)
def test_objective_refuses_types(name):
    refused(OBJECTIVE_TYPES[name][0], TypeError, OBJECTIVE_TYPES[name][1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_refuses(name):
    refused(OBJECTIVES[name][0], ValueError, OBJECTIVES[name][1])


def ints(count):
    return torch.zeros(count, dtype=torch.int64)


def steps(ends, **options):
    return process_advantage(REWARD, ints(ends), ints(4), group_size=1, **options)


ADVANTAGES = {
    "reward list": (lambda: group_advantage([0.0], group_size=1), TypeError, "reward must be a float16"),
    "reward int": (lambda: group_advantage(REWARD.long(), group_size=2), TypeError, r"reward .*torch.int64"),
    "reward 0-dim": (lambda: group_advantage(torch.tensor(1.0), group_size=1),
        ValueError, r"reward must have shape \[B\]"),
    "reward 3-dim": (lambda: group_advantage(REWARD.view(2, 2, 1), group_size=1), ValueError, r"\(2, 2, 1\)"),
    "K = 0": (lambda: group_advantage(REWARD.view(4, 1)[:, :0], group_size=1), ValueError, r"K >= 1.*\(4, 0\)"),
    "N26 inf": (lambda: group_advantage(REWARD / 0, group_size=2), ValueError, "reward must not be infinite"),
    "no group": (lambda: group_advantage(REWARD), ValueError, "exactly one of group_size and group_ids .*neither"),
    "two groups": (lambda: group_advantage(REWARD, group_size=2, group_ids=REWARD.long()), ValueError, "got both"),
    "N27 not divisible": (lambda: group_advantage(REWARD, group_size=3),
        ValueError, "4 rows are not divisible by group_size=3"),
    "group_size 0": (lambda: group_advantage(REWARD, group_size=0), ValueError, "group_size must be >= 1, got 0"),
    "group_size float": (lambda: group_advantage(REWARD, group_size=2.0), TypeError, "group_size must be an integer"),
    "group_ids float": (lambda: group_advantage(REWARD, group_ids=REWARD),
        TypeError, "group_ids must be an int64 or int32"),
    "N27 group_ids length": (lambda: group_advantage(REWARD, group_ids=ints(3)),
        ValueError, r"group_ids must have shape \(4,\)"),
    "group_ids device": (lambda: group_advantage(REWARD, group_ids=META.long()),
        ValueError, "group_ids must be on the device"),
    "baseline": (lambda: group_advantage(REWARD, group_size=2, baseline="median"),
        ValueError, "baseline must be one of 'mean'"),
    "scale": (lambda: group_advantage(REWARD, group_size=2, scale="iqr"), ValueError, "scale must be one of 'group'"),
    "eps": (lambda: group_advantage(REWARD, group_size=2, eps=-1.0), ValueError, "eps must be >= 0 and finite"),
    "ddof": (lambda: group_advantage(REWARD, group_size=2, ddof=2), ValueError, "ddof must be 0 or 1, got 2"),
    "weights": (lambda: group_advantage(REWARD, group_size=2, reward_weights=[1.0, 2.0]),
        ValueError, r"reward_weights must have shape \(1,\)"),
    "weights NaN": (lambda: group_advantage(REWARD, group_size=2, reward_weights=[NAN]),
        ValueError, "reward_weights must be finite"),
    "step shape": (lambda: steps(3, length=4, num_sequences=1), ValueError, r"step_end must have shape \(4,\)"),
    "step sequences": (lambda: steps(4, length=4), ValueError, "num_sequences must be given"),
    "step length": (lambda: steps(4, length=-1, num_sequences=1), ValueError, "length must be an integer >= 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_refuse(name):
    refused(*ADVANTAGES[name])


def expression(log_ratio, advantage, params):
    return -advantage * log_ratio.exp(), -advantage * log_ratio.exp()


OTHERS = {
    "normalizer mask list": (lambda: global_normalizer([[1]], Objective.dapo()),
        TypeError, "mask must be a bool or integer tensor, got list"),
    "normalizer mask float": (lambda: global_normalizer(MASK.float(), Objective.dapo()),
        TypeError, r"mask .*\(2, 3\), torch.float32, on cpu"),
    "normalizer mask shape": (lambda: global_normalizer(MASK[0], Objective.dapo()),
        ValueError, r"mask must be \[B, T\], or \[N\] with cu_seqlens, got .*\(3,\)"),
    "normalizer mask values": (lambda: global_normalizer(MASK.long() * 3, Objective.dapo()),
        ValueError, "mask must hold 0 and 1 only"),
    "normalizer objective": (lambda: global_normalizer(MASK, "dapo"),
        TypeError, "objective must be a fastgrpo Objective, got str 'dapo'"),
    "normalizer offsets": (lambda: global_normalizer(MASK[0], Objective.dapo(), cu_seqlens=torch.tensor([0, 2])),
        ValueError, r"cu_seqlens must rise from 0 to the number of tokens \(3\)"),
    "normalizer prompts": (lambda: global_normalizer(MASK, PER_PROMPT),
        ValueError, "needs group_size or group_ids, got neither"),
    "normalizer group_size": (lambda: global_normalizer(MASK, PER_PROMPT, group_size=3),
        ValueError, "group_size must divide the 2 sequences, got 3"),
    "merge type": (lambda: Metrics(DATA).merge(DATA), TypeError, "other must be Metrics, got Tensor"),
    "merge rows": (lambda: Metrics(DATA).merge(Metrics(DATA[:1], ("kl",))),
        ValueError, r"other must have the same rows .*got \('kl',\)"),
    "surrogate name type": (lambda: register_surrogate(3, None, expression),
        TypeError, "name must be a string, got int 3"),
    "surrogate name": (lambda: register_surrogate("a b", None, expression),
        ValueError, "name must be a new identifier .*got 'a b'"),
    "surrogate built in": (lambda: register_surrogate("ratio", None, expression),
        ValueError, "name must be a new identifier .*got 'ratio'"),
    "surrogate expression": (lambda: register_surrogate("mine", None, "exp"),
        TypeError, "expression must be a function, got str 'exp'"),
    "surrogate jit": (lambda: register_surrogate("mine", expression, expression),
        TypeError, "jit must be a @triton.jit function or None"),
    "module objective": (lambda: GRPOLoss("grpo"), TypeError, "objective must be a fastgrpo Objective, got str 'grpo'"),
    "checks": (lambda: checks("loud").__enter__(),
        ValueError, "checks policy must be one of flag, off, strict, got 'loud'"),
    "checks None": (lambda: checks(None).__enter__(),
        ValueError, "checks policy must be one of flag, off, strict, got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_refuse(name):
    refused(*OTHERS[name])


def test_unknown_metric_lists_the_known_ones():
    with pytest.raises(
        KeyError, match=r"unknown metric 'klx'; known: policy_loss, kl, .*actor/ppo_kl"
    ):
        Metrics(DATA)["klx"]


@pytest.mark.parametrize(
    ("variable", "read"),
    [
        ("FASTGRPO_CHECKS", _policy_from_environment),
        ("FASTGRPO_BACKEND", _backend_from_environment),
    ],
)
def test_environment_switches_are_checked(monkeypatch, variable, read):
    monkeypatch.setenv(variable, "fast")
    refused(read, ValueError, f"{variable} must be one of .*got 'fast'")


def test_register_surrogate_refuses_a_second_registration():
    from fastgrpo.reference import SURROGATES

    register_surrogate("test_errors_once", None, expression)
    try:
        refused(
            lambda: register_surrogate("test_errors_once", None, expression),
            ValueError,
            "must be a new identifier",
        )
    finally:
        del SURROGATES["test_errors_once"]


def test_arrays_of_others_and_long_values_are_described_shortly():
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"got numpy\.ndarray of shape \(2, 5000\), float64$"):
        token_logprob(np.zeros((2, 5000)), ids)
    with pytest.raises(TypeError, match=r"got list \[\[0\.0.{0,100}\.\.\.$"):
        token_logprob([[0.0] * 5000] * 2, ids)


def test_N39_sharded_tensors_are_refused_with_the_fix():
    class Sharded(torch.Tensor):
        """Looks like a DTensor: what makes one is its full_tensor()."""

        def full_tensor(self):
            return self

    logits = torch.randn(2, 7).as_subclass(Sharded)
    refused(
        lambda: token_logprob(logits, torch.zeros(2, dtype=torch.int64)),
        TypeError,
        r"logits must be a plain tensor, got a DTensor of shape \(2, 7\); pass logits.full_tensor\(\)",
    )
