"""Metrics: definitions, exact merging over micro-batches and ranks, TRL's and verl's names."""

import pytest
import torch

from fastgrpo import Metrics, Objective, policy_loss
from fastgrpo.choices import KL, Correction, Gate
from fastgrpo.metrics import ALIASES, DEFINITIONS
from fastgrpo.rollout_correction import ROLLOUT_METRICS
from fastgrpo.spec import METRICS
from tests import formulas as f
from tests.formulas import make_batch
from tests.test_losses import Layout, close


def metrics_of(batch, objective, *, packed: bool = False, **extra) -> Metrics:
    layout = Layout(batch, packed, True)
    arguments = layout.arguments(batch)
    if objective.correction is None and not objective.gates:
        del arguments["rollout_logprob"]
    return policy_loss(
        layout.pack(batch.logprob), objective=objective, **arguments, **extra
    ).metrics


def test_every_row_has_a_definition():
    assert set(DEFINITIONS) == {*METRICS, *ROLLOUT_METRICS}
    assert {alias.row for alias in ALIASES.values()} <= DEFINITIONS.keys()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_rows_by_their_definitions(packed):
    batch = make_batch(seed=1, per_token=True)
    kl = KL(beta=0.1, clamp_in=1.0)
    objective = Objective.ppo(epsilon=0.2, dual_clip=2.0).replace(kl=kl)
    m = metrics_of(batch, objective, packed=packed)
    live, advantage = batch.mask, batch.advantage
    d = batch.logprob - batch.old
    r = f.log_ratio(batch).exp()
    low, high, dual = (
        (advantage < 0) & (r < 0.8),
        (advantage > 0) & (r > 1.2),
        (advantage < 0) & (r > 2.0),
    )
    gain = torch.where(low | high | dual | (advantage == 0), 0.0, r)
    delta = batch.ref - batch.logprob
    estimate = torch.expm1(delta.clamp(-1, 1)) - delta.clamp(-1, 1)
    rows = {
        "policy_loss": f.dual_clip(batch, 2.0),
        "kl": estimate,
        "ratio": r,
        "coefficient": gain,
        "log_ratio": d,
        "clip_low": low,
        "clip_high": high,
        "clip_region": low | high,
        "clip_dual": dual,
        "gate_closed": torch.zeros_like(r),
        "clamp_log_ratio": d.abs() > 20,
        "clamp_kl": delta.abs() > 1,
        "logprob": batch.logprob,
        "fault": torch.zeros_like(r),
    }
    for name, row in rows.items():
        values = row.double()[live]
        close(m[name], values.mean(), name)
        close(m.sum(name), values.sum(), name)
        close(m.min(name), values.min(), name)
        close(m.max(name), values.max(), name)
        assert int(m.count(name)) == int(live.sum())


def test_active_counts_tokens_with_a_gradient():
    batch = make_batch(seed=2)
    leaf = batch.logprob.clone().requires_grad_()
    layout = Layout(batch, False, False)
    arguments = layout.arguments(batch)
    del arguments["rollout_logprob"]
    out = policy_loss(leaf, objective=Objective.grpo(), **arguments)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert int(out.metrics.sum("active")) == int((gradient != 0).sum())
    assert int(out.metrics.sum("active")) < int(batch.mask.sum()), (
        "clipped and zero-advantage tokens"
    )


def test_gate_and_entropy_rows():
    batch = make_batch(seed=3)
    entropy = torch.rand(batch.mask.shape, dtype=torch.float64)
    objective = Objective.grpo().replace(gates=(Gate(stat="entropy", low=0.5),))
    m = metrics_of(batch, objective, entropy=entropy)
    close(m["gate_closed"], (entropy[batch.mask] < 0.5).double().mean(), "gate")
    close(m["entropy"], entropy[batch.mask].mean(), "entropy")


def test_fault_counts_live_tokens_only():
    batch = make_batch(seed=4)
    logprob = batch.logprob.clone()
    logprob[0, 1] = float("nan")
    advantage = torch.ones(6, dtype=torch.float64)
    m = policy_loss(logprob, advantage, batch.mask, old_logprob=batch.old).metrics
    assert int(m.sum("fault")) == 1


def test_merge_is_exact_over_any_split():
    """Not a mean of means: sums, counts and extremes of unequal micro-batches add up to those of the whole."""
    batch = make_batch(seed=5)
    objective = Objective.dapo()
    whole = metrics_of(batch, objective)
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        out = policy_loss(
            batch.logprob[rows], batch.advantage[rows], batch.mask[rows],
            old_logprob=batch.old[rows], ref_logprob=batch.ref[rows], objective=objective,
        )  # fmt: skip
        parts.append(out.metrics)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for name in METRICS:
        for statistic in ("sum", "count", "min", "max"):
            close(getattr(merged, statistic)(name), getattr(whole, statistic)(name), name)
    corrected = metrics_of(batch, objective.replace(correction=Correction()))
    with pytest.raises(ValueError, match="same rows"):
        merged.merge(corrected)


def test_empty_metrics_are_neutral():
    batch = make_batch(seed=6)
    objective = Objective.grpo()
    whole = metrics_of(batch, objective)
    nothing = policy_loss(
        batch.logprob, batch.advantage, torch.zeros_like(batch.mask), objective=objective
    ).metrics
    assert float(nothing["ratio"]) == 0.0
    assert torch.equal(whole.merge(nothing).data, whole.data)


def test_all_reduce_over_one_process_changes_nothing(tmp_path):
    batch = make_batch(seed=7)
    m = metrics_of(batch, Objective.grpo())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert torch.equal(m.all_reduce().data, m.data)
    finally:
        torch.distributed.destroy_process_group()


def test_names_and_dictionary():
    batch = make_batch(seed=8)
    plain = metrics_of(batch, Objective.grpo())
    corrected = metrics_of(batch, Objective.grpo().replace(correction=Correction()))
    assert "rollout_corr/kl" not in plain.aliases()
    assert set(corrected.aliases()) == set(ALIASES)
    host = corrected.to_dict()
    assert set(host) == {*METRICS, *ROLLOUT_METRICS, *ALIASES}
    assert host["actor/ppo_kl"] == pytest.approx(-host["log_ratio"])
    assert host["actor/pg_clipfrac"] == host["clip_region"]
    assert list(plain) == list(METRICS)
    assert len(plain) == len(METRICS)
    with pytest.raises(KeyError, match="unknown metric 'clip'; known: policy_loss"):
        plain["clip"]
    assert "Metrics(policy_loss" in repr(plain)
