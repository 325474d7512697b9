"""OpenRLHF's own loss and log-probs, loaded from its files, against the adapter's."""

import importlib
import sys
import types
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from fastgrpo.integrations import openrlhf as adapter
from tests.formulas import make_batch

WHY = "OpenRLHF is not installed; its files are enough: pip install --no-deps --target DIR openrlhf, DIR on PYTHONPATH"
ARGUMENTS = {
    "token": {},
    "sequence": {"token_level_loss": False},
    "dual-clip": {"dual_clip": 2.0, "clip_eps_high": 0.28},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo-rollout": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "tis": {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.9, 1.1),
    },
    "icepop": {"is_correction_level": "token", "is_correction_threshold": (0.9, 1.1)},
    "sequence-gate": {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.05)},
    "tv": {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0, 0.03),
    },
    "binary-kl": {
        "is_correction_level": "token",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0, 0.002),
    },
}


@pytest.fixture(scope="module")
def host():
    """loss.py and utils.py of the installed package, without the parts of it that need a GPU."""
    place = find_spec("openrlhf")
    if place is None:
        pytest.skip(WHY)
    folder = Path(place.submodule_search_locations[0]) / "models"
    stubs = {"deepspeed": types.ModuleType("deepspeed")}
    package = types.ModuleType("openrlhf_files")
    package.__path__ = [str(folder)]
    stubs["openrlhf_files"] = package
    sys.modules |= stubs
    try:
        for name in ("utils", "loss"):
            spec = spec_from_file_location(f"openrlhf_files.{name}", folder / f"{name}.py")
            module = module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        yield types.SimpleNamespace(
            loss=sys.modules["openrlhf_files.loss"], utils=sys.modules["openrlhf_files.utils"]
        )
    finally:
        for name in [*stubs, "openrlhf_files.utils", "openrlhf_files.loss"]:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("totals", [{}, {"dp_size": 4, "batch_num_tokens": 90.0, "global_batch_size": 24.0}],
                         ids=["local", "global"])  # fmt: skip
@pytest.mark.parametrize("name", ARGUMENTS)
def test_policy_loss_equals_openrlhfs(name, totals, host):
    b = make_batch(seed=1, noise=0.2, per_token=True)
    logprob = b.logprob.clamp(min=-3)
    old, rollout = (
        (logprob + 0.15 * torch.randn(logprob.shape, dtype=torch.float64)).clamp(max=-1e-3)
        for _ in range(2)
    )
    results = []
    for module in (host.loss.PolicyLoss, adapter.PolicyLoss):
        leaf = logprob.clone().requires_grad_()
        loss, *metrics = module(**ARGUMENTS[name])(
            leaf, old, b.advantage, b.mask.long(), rollout_log_probs=rollout, **totals
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    (theirs, their_grad, their_metrics), (ours, our_grad, our_metrics) = results
    assert torch.allclose(ours, theirs, rtol=3e-8)
    assert torch.allclose(our_grad, their_grad, rtol=3e-8, atol=1e-14)
    close = {"rtol": 1e-6, "atol": 1e-9}
    assert torch.allclose(our_metrics[1], their_metrics[1], **close), "ppo_kl"
    if name not in ("gspo", "gspo-rollout"):  # there OpenRLHF's ratio is 0 on masked tokens
        assert torch.allclose(our_metrics[0], their_metrics[0].double(), **close), "clip_ratio"
    assert (our_metrics[2] is None) == (their_metrics[2] is None)
    if our_metrics[2] is not None:
        assert torch.allclose(our_metrics[2], their_metrics[2], **close), "vllm_kl"
        if (
            ARGUMENTS[name]["is_correction_level"] == "token"
        ):  # OpenRLHF counts sequences at sequence level
            assert torch.allclose(our_metrics[3], their_metrics[3].double(), **close), "filtered"


def test_recorded_signatures_are_those_of_the_installed_files(host):
    import inspect

    from fastgrpo.integrations.contracts import contract

    found = {
        "log_probs_from_logits": host.utils.log_probs_from_logits,
        "PolicyLoss.forward": host.loss.PolicyLoss.forward,
    }
    for signature in contract("openrlhf").signatures:
        parameters = tuple(inspect.signature(found[signature.attribute]).parameters)
        assert parameters == signature.parameters


def test_log_probs_from_logits(host):
    logits, ids = torch.randn(2, 5, 31, requires_grad=True), torch.randint(31, (2, 5))
    theirs = host.utils.log_probs_from_logits(logits.detach().clone(), ids, 0.7)
    kept = logits.detach().clone()
    ours = adapter.log_probs_from_logits(logits, ids, 0.7)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits, kept), "the logits are left as they are"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy_loss_type": "cispo"}, "policy_loss_type"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "clip needs level token"),
        (
            {
                "is_correction_level": "seq",
                "is_correction_gating": "tv",
                "is_correction_threshold": (0, 1),
            },
            "is not covered",
        ),
        ({"is_correction_level": "prompt"}, "is unknown"),
    ],
)
def test_what_is_not_covered_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapter.PolicyLoss(**arguments)


def test_enable_needs_the_host():
    if find_spec("openrlhf") is None:
        with pytest.raises(ImportError):
            adapter.enable()
    assert not adapter.LOSS.is_enabled
    importlib.invalidate_caches()
