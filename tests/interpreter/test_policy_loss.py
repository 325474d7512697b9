"""`kernels.policy_loss` against the float64 reference over every choice an objective has."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter_helpers import assert_close
from policy_inputs import PRESETS, assert_outputs, random_choice, tokens, without

from fastgrpo import reference
from fastgrpo.kernels import kl_estimate, policy_loss, surrogates
from fastgrpo.objective import Objective
from fastgrpo.spec import NUM_METRICS, Estimator, KLGrad, Surrogate

# One token; several blocks of 32 with a ragged end; an empty sequence; exactly one block.
LENGTHS = [1, 75, 0, 32]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(policy_loss, "_BLOCK", 32)


def _run(values, params, spec, surrogate=""):
    got = policy_loss.policy_loss(*values.values(), params, spec, surrogate)
    gold = [x.double() if x.is_floating_point() else x for x in values.values()]
    return got, reference.policy_loss(*gold, params.double(), spec, surrogate)


@pytest.mark.parametrize("objective", PRESETS, ids=lambda x: x.name)
def test_presets(objective):
    values = without(tokens(LENGTHS, torch.float32), "log_weight", "entropy", "entropy_weight")
    got, want = _run(values, torch.tensor(objective.params()), objective.spec())
    assert_outputs(got, want)


@pytest.mark.parametrize("seed", range(40))
def test_random_specifications(seed):
    spec, params, absent = random_choice(seed)
    dtype = torch.float64 if seed % 4 == 0 else torch.float32
    values = without(tokens(LENGTHS, dtype, seed), *absent)
    got, want = _run(values, torch.tensor(params, dtype=dtype), spec)
    assert_outputs(got, want)


def test_random_specifications_cover_every_choice():
    specs = [random_choice(seed)[0] for seed in range(40)]
    assert [len({s[k] for s in specs}) for k in range(7)] == [3, 2, 2, 3, 5, 4, 2]
    gates = [s[8 + 5 * g : 13 + 5 * g] for s in specs for g in range(s[7])]
    assert [len({g[k] for g in gates}) for k in range(5)] == [7, 2, 4, 3, 2]


@pytest.mark.parametrize("seed", [1, 2, 5, 6, 9, 11])
def test_padded_equals_packed_bitwise(seed):
    spec, params, absent = random_choice(seed)
    params = torch.tensor(params)
    packed = without(tokens(LENGTHS, torch.float32, seed), *absent)
    width, rows = 80, len(LENGTHS)
    ends = packed["cu_seqlens"].tolist()
    padded = {}
    for name, value in packed.items():
        if name == "cu_seqlens" or value.numel() == 0:
            padded[name] = value
            continue
        garbage = False if name == "mask" else 0.0 if name == "weight" else torch.nan
        full = torch.full((rows, width), garbage, dtype=value.dtype)
        for row, length in enumerate(LENGTHS):
            full[row, :length] = value[ends[row] : ends[row + 1]]
        padded[name] = full.flatten()
    padded["cu_seqlens"] = torch.arange(rows + 1, dtype=torch.int32) * width
    one = policy_loss.policy_loss(*packed.values(), params, spec, "")
    two = policy_loss.policy_loss(*padded.values(), params, spec, "")
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[3], two[3])
    for flat, wide in zip(one[1:3], two[1:3], strict=True):
        wide = wide.view(rows, width)
        for row, length in enumerate(LENGTHS):
            assert torch.equal(flat[ends[row] : ends[row + 1]], wide[row, :length])
            assert (wide[row, length:] == 0).all()


@pytest.mark.parametrize("objective", [PRESETS[0], PRESETS[2]], ids=lambda x: x.name)
def test_extreme_live_tokens(objective):  # N16, N17 and faults: same finiteness as the reference
    everything = torch.ones(16, dtype=torch.bool)
    values = tokens([8, 8], torch.float32, mask=everything)
    values = without(values, "log_weight", "entropy", "entropy_weight", "rollout")
    names = ("logprob", "advantage", "weight", "old", "ref", "token_weight", "kl_weight")
    values |= {name: torch.ones(16) for name in names}
    values["logprob"] = torch.tensor(
        [-1.0, -200.0, -1.0, -1e4, -1.0, torch.nan, -torch.inf, -1.0] * 2
    )
    values["old"] = torch.tensor([-1.0, -1.0, -200.0, -1.0, -1e4, -1.0, -1.0, torch.nan] * 2)
    values["ref"][:] = -1.0
    values["advantage"][::3] = -1.0
    values["advantage"][1] = 0.0
    if objective.level == "token":
        values["ref"][0] = torch.inf
    got, want = _run(values, torch.tensor(objective.params()), objective.spec())
    assert_outputs(got, want, factor=1e4)  # exp(20) carries 20 eps * 1.44 and the loss cancels


def test_everything_masked():
    values = tokens([5, 3], torch.float32)
    values["mask"][:] = False
    objective = Objective.grpo(beta=0.1)
    (loss, token_loss, dlogprob, metrics), want = _run(
        values, torch.tensor(objective.params()), objective.spec()
    )
    assert loss == 0
    assert (token_loss == 0).all()
    assert (dlogprob == 0).all()
    assert torch.equal(metrics, want[3])


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no sequence", "empty sequences"])
def test_no_tokens(lengths):
    values = tokens(lengths, torch.float32)
    objective = Objective.grpo()
    got = policy_loss.policy_loss(
        *values.values(), torch.tensor(objective.params()), objective.spec(), ""
    )
    assert got[0] == 0
    assert got[3].shape == (NUM_METRICS, 4)
    assert (got[3] == torch.tensor([0.0, 0.0, torch.inf, -torch.inf])).all()


@triton.jit
def _scaled_log_ratio(log_ratio, advantage, params):
    k = tl.load(params + 1)
    return -advantage * log_ratio * k, -advantage * k


def test_registered_surrogate(monkeypatch):
    name = "scaled_log_ratio"
    monkeypatch.setitem(surrogates.SURROGATES, name, _scaled_log_ratio)
    expression = lambda s, a, user: (-a * s * user[1], -a * user[1].expand_as(s))  # noqa: E731
    monkeypatch.setitem(reference.SURROGATES, name, expression)
    objective = Objective.grpo(beta=0.1)
    spec, params = objective.spec(), torch.tensor(objective.params())
    spec[2] = int(Surrogate.CUSTOM)
    params[18] = 1.7
    got, want = _run(tokens(LENGTHS, torch.float32), params, spec, name)
    assert_outputs(got, want)
    with pytest.raises(ValueError, match="no Triton function"):
        _run(tokens(LENGTHS, torch.float32), params, spec, "unknown")


@pytest.mark.parametrize("gradient", list(KLGrad), ids=lambda x: x.name)
@pytest.mark.parametrize("estimator", list(Estimator)[1:], ids=lambda x: x.name)
def test_kl_estimate(estimator, gradient):
    for dtype in (torch.float32, torch.float64):
        values = tokens([1100], dtype)
        logprob, ref, old = (
            values[k].nan_to_num(-1.0, -2.0, -3.0).clamp(-50, 0) for k in ("logprob", "ref", "old")
        )
        ref[::9] = logprob[::9] + torch.logspace(-7, 1, ref[::9].numel(), dtype=dtype)  # N18
        ref[5], ref[6], logprob[7] = torch.nan, -torch.inf, -torch.inf
        params = torch.tensor([3.0, 0.8, 1.1], dtype=dtype)
        for old_or_none in (old, old.new_empty(0)):
            got = kl_estimate.kl_estimate(
                logprob, ref, old_or_none, params, int(estimator), int(gradient)
            )
            want = reference.kl_estimate(
                logprob.double(), ref.double(), old_or_none.double(), params.double(), int(estimator), int(gradient)
            )  # fmt: skip
            for value, gold in zip(got, want, strict=True):
                # Relative: the difference of close log-probs is exact. The gold itself is good to eps64 * |delta|.
                slack = 1e-15 * (logprob.double() - ref.double()).abs().nan_to_num(0.0, 0.0)
                gold = torch.where((value - gold).abs() <= slack, value.double(), gold)
                assert_close(value, gold, atol=0.0, rtol=32 * torch.finfo(dtype).eps)


def test_kl_estimate_of_nothing():
    empty = torch.empty(0)
    got = kl_estimate.kl_estimate(empty, empty, empty, torch.ones(3), 3, 0)
    assert [x.shape for x in got] == [(0,), (0,)]
