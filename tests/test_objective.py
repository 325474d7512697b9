"""The objective as data: presets, conflicts, what is refused by name, registered surrogates, the generated docs."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from fastgrpo import Objective, grpo_loss, policy_loss
from fastgrpo.choices import KL, Correction, Gamma, Gate, Reduce, Sigmoid
from fastgrpo.reference import SURROGATES
from fastgrpo.spec import NUM_PARAMS, PARAMS, SPEC_GATE, SPEC_HEAD, Level, Stat
from fastgrpo.surrogates import register_surrogate
from fastgrpo.testing import check_surrogate
from tests import formulas as f
from tests.formulas import make_batch
from tests.test_losses import Layout, check, reduced

PRESETS = {
    "grpo": Objective.grpo(),
    "dapo": Objective.dapo(),
    "bnpo": Objective.bnpo(),
    "dr_grpo": Objective.dr_grpo(64),
    "ppo": Objective.ppo(),
    "gspo": Objective.gspo(),
    "gspo_token": Objective.gspo_token(),
    "luspo": Objective.luspo(),
    "gmpo": Objective.gmpo(),
    "cispo": Objective.cispo(),
    "sapo": Objective.sapo(),
    "vespo": Objective.vespo(),
    "rloo": Objective.rloo(),
    "reinforce": Objective.reinforce(),
    "gpg": Objective.gpg(),
    "topr": Objective.topr(),
    "dppo_tv": Objective.dppo_tv(),
    "dppo_kl": Objective.dppo_kl(),
    "dro": Objective.dro(beta=0.1),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_frozen_data(name):
    objective = PRESETS[name]
    assert objective.name == name
    assert hash(objective) == hash(replace(objective))
    with pytest.raises(FrozenInstanceError):
        objective.level = "token"
    spec, params = objective.spec(), objective.params()
    assert len(spec) == SPEC_HEAD + SPEC_GATE * len(objective.policy_gates)
    assert all(isinstance(code, int) for code in spec)
    assert len(params) == NUM_PARAMS
    assert not any(math.isnan(x) for x in params)


def test_every_preset_is_listed():
    made = {
        name
        for name, value in vars(Objective).items()
        if isinstance(value, classmethod) and not name.startswith(("_", "from_"))
    }
    assert made == set(PRESETS)


def test_codes_and_numbers_of_one_objective():
    gate = Gate(stat="tv", high=0.3, when="positive")
    objective = Objective.gspo(epsilon=0.1, epsilon_high=0.2, beta=0.5).replace(gates=(gate,))
    spec, params = objective.spec(), dict(zip(PARAMS, objective.params(), strict=False))
    assert spec[0] == Level.SEQ_MEAN
    assert spec[SPEC_HEAD] == Stat.TV
    assert params["pos_high"] == pytest.approx(1.2)
    assert params["neg_low"] == pytest.approx(0.9)
    assert params["neg_high"] == math.inf
    assert params["beta"] == 0.5
    assert params["d_clamp"] == params["kl_clamp_in"] == 20.0
    assert objective.params()[len(PARAMS) : len(PARAMS) + 2] == [-math.inf, 0.3]


def test_clip_bounds_of_the_literature():
    assert Objective.dapo().positive[1] == pytest.approx(1.28)
    assert Objective.gspo().negative[0] == pytest.approx(1 - 3e-4)
    assert Objective.grpo(delta=0.9).positive[1] == 0.9
    assert Objective.grpo(delta=0.9).negative == (0.8, 1.2), (
        "delta caps one branch of the minimum only"
    )
    assert Objective.ppo(dual_clip=1.1).negative == (0.8, 1.1)
    assert Objective.cispo().positive == (0.0, 5.0)
    assert Objective.grpo().kl.beta == 0.0


def test_token_local_means_no_look_at_the_sequence():
    assert Objective.grpo().is_token_local
    assert Objective.dppo_tv().is_token_local
    assert not Objective.gspo().is_token_local
    opsm = Gate(stat="k1", low=-0.1, pool="seq_mean")
    assert not Objective.grpo().replace(gates=(opsm,)).is_token_local


CONFLICTS = {
    "level": (lambda: Objective(level="sequence"), "level must be one of"),
    "pool_grad": (lambda: Objective(level="seq_mean", pool_grad="own"), "pool_grad must be"),
    "local-without-pool": (lambda: Objective(pool_grad="local"), "pool_grad='local' needs"),
    "d_clamp": (lambda: Objective(d_clamp=0.0), "d_clamp must be None or > 0"),
    "d_clamp-nan": (lambda: Objective(d_clamp=math.nan), "d_clamp"),
    "bounds-order": (lambda: Objective(positive=(1.2, 0.8)), "positive must be a pair"),
    "bounds-nan": (lambda: Objective(negative=(math.nan, 1.0)), "negative must be a pair"),
    "bounds-number": (lambda: Objective(positive=1.2), "positive must be"),
    "pool_bounds": (lambda: Objective(pool_bounds=(1.0, -1.0)), "pool_bounds must be a pair"),
    "log_clip": (lambda: Objective(log_clip=(0.4, -0.4)), "log_clip must be a pair"),
    "entropy_coef": (lambda: Objective(entropy_coef=math.inf), "entropy_coef must be finite"),
    "shape-and-bounds": (
        lambda: Objective(positive=(0.0, 1.0), shape=Sigmoid()),
        "a shape replaces the bounds",
    ),
    "surrogate-and-bounds": (
        lambda: Objective(surrogate="mine", negative=(0.0, 1.0)),
        "does its own clipping",
    ),
    "surrogate-and-shape": (
        lambda: Objective(surrogate="mine", shape=Gamma()),
        "does its own clipping",
    ),
    "params-without-surrogate": (
        lambda: Objective(surrogate_params=(1.0,)),
        "surrogate_params belong",
    ),
    "too-many-params": (
        lambda: Objective(surrogate="mine", surrogate_params=(0.0,) * 9),
        "at most 8 numbers",
    ),
    "too-many-gates": (
        lambda: Objective(gates=(Gate(stat="k1", high=1.0),) * 5),
        "at most 4 gates",
    ),
    "bypass-and-stored-gate": (
        lambda: Objective(
            correction=Correction(bypass=True),
            gates=(Gate(stat="k1", high=1.0, between="old_rollout"),),
        ),
        "with Correction.bypass the old policy is the rollout",
    ),
    "gamma-and-kl-weight": (
        lambda: Objective.vespo().replace(correction=Correction(applies_to="policy_and_kl")),
        "a Gamma shape takes the correction",
    ),
    "epsilon": (lambda: Objective.grpo(epsilon=1.0), r"epsilon must be in \[0, 1\)"),
    "epsilon_high": (lambda: Objective.grpo(epsilon_high=-0.1), "epsilon_high must be >= 0"),
    "delta": (lambda: Objective.grpo(delta=0.0), "delta must be > 0"),
    "dual_clip": (lambda: Objective.ppo(dual_clip=1.0), "dual_clip must be > 1"),
    "beta": (lambda: Objective.grpo(beta=-0.1), "KL.beta must be finite and >= 0"),
    "beta-nan": (lambda: KL(beta=math.nan), "KL.beta"),
    "estimator": (lambda: KL(estimator="k4"), "KL.estimator must be one of"),
    "kl-gradient": (lambda: KL(gradient="straight"), "KL.gradient must be one of"),
    "kl-target": (lambda: KL(target="rollout"), "KL.target must be one of"),
    "clamp_in": (lambda: KL(clamp_in=-1.0), "KL.clamp_in must be None or > 0"),
    "clamp_out": (lambda: KL(clamp_out=0.0), "KL.clamp_out must be None or > 0"),
    "ratio_cap": (lambda: KL(ratio_cap=0.0), "KL.ratio_cap must be > 0"),
    "gate-stat": (lambda: Gate(stat="k9", high=1.0), "Gate.stat must be one of"),
    "gate-pool": (lambda: Gate(stat="k1", high=1.0, pool="mean"), "Gate.pool must be one of"),
    "gate-when": (lambda: Gate(stat="k1", high=1.0, when="bad"), "Gate.when must be one of"),
    "gate-bounds": (
        lambda: Gate(stat="k1", low=1.0, high=0.0),
        r"Gate \(low, high\) must be a pair",
    ),
    "gate-without-bounds": (lambda: Gate(stat="k1"), "without a bound it never closes"),
    "gate-mask": (lambda: Gate(stat="k1", high=1.0, scope="mask"), "denominators are fixed before"),
    "gate-entropy": (
        lambda: Gate(stat="entropy", high=1.0, between="old_rollout"),
        "measures the policy",
    ),
    "correction-level": (lambda: Correction(level="sequence"), "Correction.level must be one of"),
    "correction-mode": (lambda: Correction(mode="clip"), "Correction.mode must be one of"),
    "correction-order": (lambda: Correction(low=3.0), r"Correction \(low, high\)"),
    "correction-negative": (lambda: Correction(low=-1.0), "Correction.low must be >= 0"),
    "correction-clamp": (lambda: Correction(log_clamp=0.0), "Correction.log_clamp"),
    "bypass-and-weights": (lambda: Correction(bypass=True, high=5.0), "bypass excludes"),
    "reduce-per": (lambda: Reduce(per="batch"), "Reduce.per must be one of"),
    "reduce-length": (lambda: Reduce(per="constant"), "Reduce.length must be > 0"),
    "reduce-length-elsewhere": (
        lambda: Reduce(length=8),
        "Reduce.length belongs to per='constant'",
    ),
    "reduce-power-elsewhere": (lambda: Reduce(per="token", power=0.0), "Reduce.power belongs to"),
    "reduce-power": (lambda: Reduce(power=math.inf), "Reduce.power must be finite"),
    "sigmoid": (lambda: Sigmoid(negative=0.0), "Sigmoid.negative must be > 0"),
    "gamma": (lambda: Gamma(positive=(0.0, 1.0)), "Gamma.positive must be two numbers > 0"),
    "gamma-count": (lambda: Gamma(negative=(1.0,)), "Gamma.negative must be two numbers > 0"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_cannot_be_meant_is_refused_by_name(name):
    build, message = CONFLICTS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_misspelt_names_get_the_closest_one():
    with pytest.raises(
        AttributeError, match=r"no preset 'grop'\. Did you mean 'grpo'\? Presets: grpo, dapo"
    ):
        Objective.grop()
    with pytest.raises(
        TypeError, match=r"no field 'levl'\. Did you mean 'level'\? Fields: name, level"
    ):
        Objective.grpo().replace(levl="seq_sum")
    with pytest.raises(
        TypeError, match=r"no field 'beta'\. Pass it to a preset, as in Objective\.grpo\(beta"
    ):
        Objective.grpo().replace(beta=0.1)
    assert not hasattr(Objective, "grop")


def test_a_name_instead_of_an_objective_says_what_to_pass():
    arguments = (torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"got str 'dapo'; pass fastgrpo\.Objective\.dapo\(\)"):
        policy_loss(*arguments, objective="dapo")


def test_missing_tensors_are_refused_by_name():
    b = make_batch()
    arguments = {"advantage": b.advantage, "mask": b.mask}
    with pytest.raises(ValueError, match=r"ref_logprob is required by objective.kl.beta = 0.04"):
        policy_loss(b.logprob, objective=Objective.grpo(beta=0.04), **arguments)
    with pytest.raises(ValueError, match=r"entropy .* is required by objective.entropy_coef"):
        policy_loss(b.logprob, objective=Objective(entropy_coef=0.1), **arguments)
    gated = Objective(gates=(Gate(stat="entropy", low=0.1),))
    with pytest.raises(ValueError, match="entropy is required by an entropy gate"):
        policy_loss(b.logprob, objective=gated, **arguments)
    with pytest.raises(ValueError, match=r"objective\.surrogate must be ratio, logp or a name"):
        policy_loss(b.logprob, objective=Objective(surrogate="nobody"), **arguments)
    with pytest.raises(TypeError, match="objective must be a fastgrpo Objective"):
        policy_loss(b.logprob, objective="grpo", **arguments)


# Registered surrogates -----------------------------------------------------------------------------------------------


@pytest.fixture
def huber():
    """The ten-line example of the documentation: a quadratic penalty around ratio 1 that turns linear."""

    def expression(log_ratio, advantage, params):
        limit = params[0]
        size = log_ratio.abs()
        penalty = torch.where(size < limit, size**2 / 2, limit * (size - limit / 2))
        slope = log_ratio.clamp(-limit, limit)
        return -advantage * log_ratio + penalty, -advantage + slope

    register_surrogate("huber", None, expression)
    yield "huber"
    del SURROGATES["huber"]


@pytest.mark.parametrize("level", ["token", "seq_mean", "seq_sum"])
def test_registered_surrogate_is_a_policy_term_like_any_other(huber, level):
    batch = make_batch(seed=1, noise=0.3)
    objective = Objective(surrogate=huber, surrogate_params=(0.25,), level=level)

    def token_loss(b):
        own = f.log_ratio(b)
        pooled = {"token": own, "seq_mean": f.mean(own, b.mask), "seq_sum": f.total(own, b.mask)}
        d = pooled[level].expand_as(own)
        penalty = torch.where(d.abs() < 0.25, d**2 / 2, 0.25 * (d.abs() - 0.125))
        return -b.advantage * d + penalty

    check(batch, objective, reduced(token_loss, "sequence"))
    check_surrogate(huber, params=(0.25,))


def test_registered_surrogate_in_the_one_pass_loss(huber):
    batch = make_batch(seed=2, noise=0.1)
    objective = Objective(surrogate=huber, surrogate_params=(0.5,))
    logits = torch.randn(6, 7, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (6, 7))
    arguments = Layout(batch, False, False).arguments(batch)
    loss = grpo_loss(logits, ids, objective=objective, **arguments).loss
    (one,) = torch.autograd.grad(loss, logits)
    logprob = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    two = policy_loss(logprob, objective=objective, **arguments).loss
    assert torch.allclose(loss, two, rtol=1e-9)
    assert torch.allclose(one, torch.autograd.grad(two, logits)[0], rtol=1e-9, atol=1e-12)


def test_a_wrong_derivative_is_found():
    register_surrogate("wrong", None, lambda d, a, p: (-a * d.exp(), -a))
    try:
        with pytest.raises(AssertionError, match="derivative differs"):
            check_surrogate("wrong")
    finally:
        del SURROGATES["wrong"]


@pytest.mark.parametrize("name", ["ratio", "logp", "two words", "1st", ""])
def test_surrogate_names_that_are_taken_or_no_names(name):
    with pytest.raises(ValueError, match="name must be a new identifier"):
        register_surrogate(name, None, lambda d, a, p: (d, d))


def test_surrogate_registration_is_checked(huber):
    with pytest.raises(ValueError, match="name must be a new identifier"):
        register_surrogate(huber, None, lambda d, a, p: (d, d))
    with pytest.raises(TypeError, match="expression must be a function"):
        register_surrogate("other", None, 3)
    with pytest.raises(TypeError, match=r"jit must be a @triton\.jit function or None"):
        register_surrogate("other", lambda d, a, p: (d, d), lambda d, a, p: (d, d))
    with pytest.raises(ValueError, match="is not registered"):
        check_surrogate("nobody")


# Documentation -------------------------------------------------------------------------------------------------------


def test_the_generated_tables_are_up_to_date():
    docs = Path(__file__).resolve().parent.parent / "docs"
    run = subprocess.run(
        [sys.executable, str(docs / "generate_objectives.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout == (docs / "objectives.md").read_text(encoding="utf-8"), (
        "run: python docs/generate_objectives.py > docs/objectives.md"
    )
