"""A run that is stopped anywhere and goes on ends with the same bits as one that is not."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastgrpo.trainer.checkpoint.contents import contents, position, restore
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.checkpoint.tree import StateError, decode, encode, same
from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import SMALL, everything, make_run, timeless, train

GRID = list(
    product((1, 2, 4), (1, 2), (12, 5))
)  # steps_per_generation, num_iterations, micro-batch


@pytest.mark.parametrize(("portions", "iterations", "micro"), GRID)
def test_resume_at_every_safe_point_is_exact(portions, iterations, micro, tmp_path, trials):
    """Between steps, after sampling, and after each update: the next checkpoint has the same bits, the step the same
    metrics. By induction so has the end of the run.
    """
    config = replace(
        SMALL,
        max_steps=2,
        prompts_per_step=4,
        steps_per_generation=portions,
        num_iterations=iterations,
        per_device_train_batch_size=micro,
        ref_sync_steps=1,
    )
    store = Store(tmp_path, limit=0)
    state = State(make_run(config))

    ends: list[dict[str, bytes]] = []

    def save() -> None:
        store.save(position(state), contents(state, {}, []))

    save()
    numbers = []
    for step in grpo(state.run, state, save):
        save()
        numbers.append(timeless(step.numbers))
        ends.append(everything(state))
    assert min(step["grad_norm"] for step in numbers) > 0
    paths = [path for path in store.names() if path.name != "step-2"]
    assert len(paths) == config.max_steps * (2 + portions * iterations)
    for path in paths:
        other = State(make_run(config))
        torch.manual_seed(99)
        restore(other, Checkpoint(path), pytest.fail)
        number = other.step
        assert timeless(next(grpo(other.run, other)).numbers) == numbers[number], path.name
        assert everything(other) == ends[number], path.name
    trials("resumed at every safe point of 12 combinations of options", len(paths))


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},  # no reference; rows of zero advantage are left out
        {"sampler": "transformers"},  # random numbers are the global generator's
        {"objective": "gspo", "drop_zero_advantage": True},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"sampling_streams": 3, "max_steps": 2},
        {"beta": 0.0, "temperature": 1e-3},  # no gradient at all: Adam's step counts alone move
    ],
    ids=str,
)
def test_resume_is_exact_whatever_the_options(changes, tmp_path, trials):
    config = replace(SMALL, **changes)
    store = Store(tmp_path, limit=0)
    state = State(make_run(config))
    train(state, lambda: store.save(position(state), contents(state, {}, [])))
    expected = everything(state)
    for path in store.names()[::5]:
        other = State(make_run(config))
        restore(other, Checkpoint(path), pytest.fail)
        train(other)
        assert everything(other) == expected, path.name
    trials("resumed and trained to the end under other options", len(store.names()[::5]))


def test_steps_per_generation_trains_on_every_completion_once_per_iteration():
    run = make_run(replace(SMALL, max_steps=1, beta=0.0, drop_zero_advantage=False))
    state = State(run)
    seen: list[list[int]] = []

    def look() -> None:
        assert state.scored is not None
        portions = state.scored.portions
        seen.append([sum(len(b.advantage) for b in p.batches) for p in portions])
        assert sum(float(p.normalizer) for p in portions) == 12  # completions of the step

    train(state, look)
    assert len(seen) == 1 + 4
    assert seen[0] == seen[-1]


def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path):
    state = State(make_run(SMALL))
    Store(tmp_path, 0).save(position(state), contents(state, {}, []))
    other = make_run(SMALL)
    other.policy.model.model.norm.weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(Unusable, match=r"model.norm.weight has shape \(16,\), expected \(8,\)"):
        restore(State(other), Checkpoint(tmp_path / "step-0"), print)


def test_changed_options_are_said(tmp_path):
    state = State(make_run(SMALL))
    Store(tmp_path, 0).save(position(state), contents(state, {}, []))
    said: list[str] = []
    changed = replace(SMALL, learning_rate=1e-3, save_steps=7, max_steps=9)
    restore(State(make_run(changed)), Checkpoint(tmp_path / "step-0"), said.append)
    assert said == ["note: learning_rate was 0.01 when the checkpoint was saved, now 0.001"]


def whole(value) -> tuple[bytes, bytes]:
    pieces, text = encode(value, "part")
    return b"".join(pieces), text


STATES = [
    {"a": [1, 2.5, None, True, "x"], "b": (1, (2,)), 3: {"$": "tensor"}},
    {"nan": float("nan"), "inf": -float("inf"), "tiny": 5e-324, "bytes": b"\x00\xff"},
    {"empty": torch.empty(0), "scalar": torch.tensor(3), "bool": torch.tensor([True, False])},
    {"nan": torch.tensor([float("nan"), -0.0]), "half": torch.ones(2, 3).bfloat16().T},
    [],
]


@pytest.mark.parametrize("value", STATES, ids=range(len(STATES)))
def test_states_survive_the_round_trip_to_the_bit(value):
    assert same(value, decode(*whole(value))) is None


def test_tensors_that_share_memory_do_so_once():
    base = torch.arange(12.0)
    value = {"a": base, "b": base, "row": base[3:6], "strided": base[::2]}
    tensors, text = whole(value)
    assert same(value, decode(tensors, text)) is None
    assert len(tensors) < 600


def test_other_objects_are_refused_by_place():
    with pytest.raises(StateError, match=r"x.a.1 cannot be stored: object"):
        encode({"a": [1, object()]}, "x")
