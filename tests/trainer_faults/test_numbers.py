"""Updates whose numbers are not finite are skipped; memory that runs out costs passes, not the result."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastgrpo.trainer import train as train_module
from fastgrpo.trainer.passes import TrainingStopped, is_out_of_memory
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import SMALL, make_run, train

ONE = replace(SMALL, num_iterations=1, steps_per_generation=1, per_device_train_batch_size=12)


def weights(state: State) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in state.run.policy.parameters()])


def plant(monkeypatch, at: set[int], spoil) -> None:
    """Spoils the gradient of the updates with these numbers."""
    original, calls = train_module.backward, []

    def backward(state, portion, objective):
        tally = original(state, portion, objective)
        calls.append(1)
        if len(calls) - 1 in at:
            spoil(state, tally)
        return tally

    monkeypatch.setattr(train_module, "backward", backward)


def nan_gradient(state, _):
    next(state.run.policy.parameters()).grad.view(-1)[5] = float("nan")


def inf_gradient(state, _):
    list(state.run.policy.parameters())[-1].grad.view(-1)[0] = float("inf")


def nan_loss(_, tally):
    tally.loss = torch.tensor(float("nan"))


@pytest.mark.parametrize("spoil", [nan_gradient, inf_gradient, nan_loss], ids=lambda f: f.__name__)
def test_a_bad_update_leaves_the_weights_to_the_bit_and_is_counted(monkeypatch, spoil):
    plant(monkeypatch, {1}, spoil)
    state = State(make_run(ONE))
    seen, skipped = [weights(state)], []
    for step in grpo(state.run, state):
        seen.append(weights(state))
        skipped.append(step.numbers["skipped_updates"])
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == [False, True, False, False]
    assert skipped == [0, 1, 0, 0]
    assert state.bad_updates == 0


def test_too_many_in_a_row_stop_the_run_by_name(monkeypatch):
    plant(monkeypatch, {1, 2, 3}, nan_gradient)
    state = State(make_run(replace(ONE, max_steps=9, max_bad_steps=3)))
    with pytest.raises(
        TrainingStopped, match=r"3 updates in a row .* not finite .* --learning-rate"
    ):
        train(state)
    assert state.step == 3
    assert torch.isfinite(weights(state)).all()


def test_with_others_in_between_they_do_not(monkeypatch):
    plant(monkeypatch, {0, 1, 3, 4, 6, 7}, nan_gradient)
    assert len(train(State(make_run(replace(ONE, max_steps=9, max_bad_steps=3))))) == 9


def run_out(monkeypatch, largest: int, error: Exception) -> list[int]:
    """Passes over more than `largest` completions with a gradient fail, at the end of the forward."""
    original, sizes = Policy.forward, []

    def forward(self, batch, **options):
        result = original(self, batch, **options)
        if options.get("advantage") is not None:
            sizes.append(len(batch.input_ids))
            if len(batch.input_ids) > largest:
                raise error
        return result

    monkeypatch.setattr(Policy, "forward", forward)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_halves_the_micro_batch_and_not_the_result(monkeypatch, error):
    expected = State(make_run(replace(SMALL, max_steps=2)))
    metrics = train(expected)
    with monkeypatch.context() as patch:
        sizes = run_out(patch, 1, error)
        state = State(make_run(replace(SMALL, max_steps=2)))
        found = train(state)
    assert max(sizes[-4:]) == 1
    assert state.micro_batch_size == 1
    gap = (weights(state) - weights(expected)).abs().max()
    assert (
        gap < 2e-4
    )  # Adam turns rounding of a tiny gradient into a step; the gradients themselves:
    assert found[0]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_the_first_gradient_in_halves_is_the_whole_one(monkeypatch, objective):
    """Process by process: 12 completions at once, and as 1 + 2 + ... after three failures."""
    gradients = []
    for largest in (12, 2):
        with monkeypatch.context() as patch:
            run_out(patch, largest, MemoryError())
            state = State(make_run(replace(ONE, max_steps=1, objective=objective)))
            train(state)
            gradients.append(
                torch.cat([p.grad.flatten() for p in state.named_parameters().values()])
            )
    whole, halves = gradients
    assert torch.linalg.vector_norm(whole - halves) <= 1e-5 * torch.linalg.vector_norm(whole)


def test_nothing_left_to_halve_stops_with_what_to_set(monkeypatch):
    run_out(monkeypatch, 0, MemoryError("no room"))
    with pytest.raises(
        TrainingStopped, match=r"one completion per pass .* --max-completion-length"
    ):
        train(State(make_run(ONE)))


def test_other_errors_are_not_taken_for_it(monkeypatch):
    run_out(monkeypatch, 0, RuntimeError("shapes differ"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(State(make_run(ONE)))
