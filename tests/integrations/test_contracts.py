"""Probes of hosts: what is installed, what a drifted signature says, and the reversible swap."""

import pytest
import torch

from fastgrpo.integrations import areal, ms_swift, prime_rl
from fastgrpo.integrations.contracts import (
    CONTRACTS,
    Contract,
    HostStatus,
    Signature,
    contract,
    installed,
)
from fastgrpo.integrations.swap import Swap
from tests.integrations.fakes import fake_modules, function_with, method_class

AREAL = "logits labels temperature tp_group chunk_size"


def test_installed_reports_this_machine():
    found = {status.host: status for status in installed()}
    for status in found.values():
        assert status.version
    if "trl" in found:
        assert found["trl"].problem is None, found["trl"].problem
    assert set(found) <= {item.host for item in CONTRACTS}


def test_installed_names_what_is_wrong():
    drifted = Contract("torch", "torch", (Signature("torch.nn.functional", "relu", ("a", "b")),))
    gone = Contract("torch", "torch", (Signature("torch.nn.functional", "rleu", ("a",)),))
    absent = Contract("no-such-host", "no_such_host", ())
    found = installed([drifted, gone, absent])
    assert len(found) == 2
    assert "relu takes" in found[0].problem
    assert torch.__version__.split("+")[0] in found[0].problem
    assert "torch.nn.functional.rleu does not exist" in found[1].problem


def test_a_host_that_does_not_import_is_a_problem_not_a_crash():
    broken = Contract("torch", "torch", (Signature("torch.no_such_module", "f", ("a",)),))
    assert "No module named" in installed([broken])[0].problem


def test_doctor_lists_hosts_and_fails_on_a_mismatch(capsys, monkeypatch):
    from fastgrpo import doctor

    status = [HostStatus("trl", "1.16.0", None), HostStatus("verl", "0.9", "ImportError: gone")]
    monkeypatch.setattr(doctor, "installed", lambda: status)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "adapter matches" in out
    assert "adapter does not match: ImportError: gone" in out
    assert doctor.diagnose().contracts == {}


def test_every_contract_can_be_looked_up():
    assert contract("trl").package == "trl"
    assert len({item.host for item in CONTRACTS}) == len(CONTRACTS)


def test_swap_reaches_every_module_that_imported_the_name():
    original = function_with(AREAL)
    modules = {
        "areal.engine.fsdp_engine": {"gather_logprobs_entropy": original},
        "areal.engine.megatron_engine": {"gather_logprobs_entropy": original},
        "areal.other": {"gather_logprobs_entropy": "something else"},
    }
    with fake_modules(modules):
        import areal.engine.fsdp_engine as one
        import areal.engine.megatron_engine as two
        import areal.other as three

        with areal_swap().use():
            assert one.gather_logprobs_entropy is areal_function()
            assert two.gather_logprobs_entropy is areal_function()
            assert three.gather_logprobs_entropy == "something else"
        assert one.gather_logprobs_entropy is original
        assert two.gather_logprobs_entropy is original
        swap = areal_swap()
        swap.enable()
        swap.enable()
        with swap.use():
            pass
        assert swap.is_enabled
        swap.disable()
        swap.disable()
        assert one.gather_logprobs_entropy is original


def areal_swap() -> Swap:
    return areal.SCORES


def areal_function():
    return areal.gather_logprobs_entropy


@pytest.mark.parametrize(
    ("modules", "enable"),
    [
        (
            {
                "areal.engine.fsdp_engine": {
                    "gather_logprobs_entropy": function_with("logits labels")
                }
            },
            lambda: areal.SCORES.enable(),
        ),
        (
            {
                "prime_rl.trainer.models.layers.lm_head": {
                    "_SequenceChunkedLogProbEntropyFn": method_class("forward", "ctx hidden weight")
                }
            },
            lambda: prime_rl.HEAD.enable(),
        ),
        (
            {
                "swift.rlhf_trainers.grpo_trainer": {
                    "GRPOTrainer": method_class("_get_logps_via_local_forward", "self model")
                }
            },
            ms_swift.enable,
        ),
    ],
    ids=["areal", "prime-rl", "ms-swift"],
)
def test_a_drifted_signature_is_refused_before_anything_changes(modules, enable):
    with fake_modules(modules), pytest.raises(ImportError, match="this adapter knows"):
        enable()
    assert not areal.SCORES.is_enabled
    assert not prime_rl.HEAD.is_enabled
