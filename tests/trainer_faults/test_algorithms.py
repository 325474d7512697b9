"""PPO and rewards that learn: restarts to the bit, several processes as one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.contents import contents, position, restore
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store, name_of
from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.parallel import distributed
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.rewards.process import RewardFault
from fastgrpo.trainer.state import State
from tests.trainer_faults.runs import SMALL, everything, make_run, train, wait
from tests.trainer_faults.test_ranks import (
    FIVE,
    difference,
    five_steps,
    fork_ranks,
    numbers_of,
    train_ranks,
)

PPO = replace(SMALL, objective="ppo", max_steps=2, ref_sync_steps=1)


def saves(config, folder: Path, *only: str) -> tuple[Store, State, list[dict]]:
    """A run that saves at every safe point, or at some."""
    store, state = Store(folder, limit=0), State(make_run(config))

    def save() -> None:
        if not only or name_of(position(state)) in only:
            store.save(position(state), contents(state, {}, []))

    return store, state, train(state, save)


def restarted(config, checkpoint: Path) -> State:
    state = State(make_run(config))
    torch.manual_seed(99)
    restore(state, Checkpoint(checkpoint), pytest.fail)
    train(state)
    return state


def test_ppo_resumes_to_the_bit(tmp_path):
    """Between steps, after sampling and after each update."""
    config = replace(PPO, per_device_train_batch_size=5)
    store, state, numbers = saves(config, tmp_path)
    assert min(step["loss/value_avg"] for step in numbers) > 0
    expected = everything(state)
    assert "critic.safetensors" in expected
    assert len(store.names()) == 2 * 5
    for path in store.names()[::2]:
        assert everything(restarted(config, path)) == expected, path.name


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("grpo", "ppo", "it has no critic: it was saved with another objective than ppo"),
        ("ppo", "grpo", "it has a critic: it was saved with objective ppo"),
    ],
)
def test_ppo_and_other_objectives_do_not_go_on_from_each_other(before, after, message, tmp_path):
    state = State(make_run(replace(PPO, objective=before)))
    path = Store(tmp_path, 0).save(position(state), contents(state, {}, []))
    other = State(make_run(replace(PPO, objective=after)))
    with pytest.raises(Unusable, match=message):
        restore(other, Checkpoint(path), lambda text: None)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_by_ppo_as_one_does(tmp_path, kind):
    """Values, whitening over all tokens, the value model's gradient: weights to 1e-5, every metric too."""
    config = replace(FIVE, objective="ppo", parallel=kind, max_steps=3)
    five_steps(config, Ranks(), tmp_path / "alone")
    train_ranks(config, 2, tmp_path / "two")
    assert difference(tmp_path / "two", tmp_path / "alone") <= 1e-5
    pairs = zip(numbers_of(tmp_path / "two"), numbers_of(tmp_path / "alone"), strict=True)
    for mine, theirs in pairs:
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_mean_over_ranks_counts_every_entry_once(tmp_path):
    """Rank 0 has 1, 2, 3, rank 1 has 10: the mean reward of a line under process supervision."""

    def action() -> int:
        ranks = distributed.start("ddp", dead_after=30)
        mean = ranks.mean(torch.tensor([10.0]) if ranks.rank else torch.tensor([1.0, 2.0, 3.0]))
        ranks.stop()
        return int(mean)

    assert [wait(pid) for pid in fork_ranks(action, 2, tmp_path / "log")] == [4, 4]


LEARNER = """
class Liking:
    '''Likes what earlier completions had many of: a reward model in miniature.'''

    def __init__(self):
        self.counts, self.sizes = {}, []

    def __call__(self, completions, **columns):
        total = sum(self.counts.values()) or 1
        return [sum(self.counts.get(c, 0) for c in text) / total for text in completions]

    def refit(self, prompts, completions, rewards, replay, answer, **columns):
        assert len(prompts) == len(completions) == len(rewards) == len(answer)
        assert set(replay) == {"prompts", "completions", "rewards", "answer", *columns}
        self.sizes.append([len(completions), len(replay["completions"])])
        for text in completions + replay["completions"]:
            for c in text:
                self.counts[c] = self.counts.get(c, 0) + 1

    def state_dict(self):
        return {"counts": dict(self.counts), "sizes": self.sizes}

    def load_state_dict(self, state):
        self.counts, self.sizes = state["counts"], state["sizes"]

class Failing(Liking):
    def refit(self, **columns):
        self.counts["1"] = 1000
        raise ValueError("no data")

class Stateless:
    def __call__(self, completions, **columns):
        return [0.0] * len(completions)

    def refit(self, **columns):
        pass

liking, failing, stateless = Liking(), Failing(), Stateless()
"""


@pytest.fixture
def learner(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(LEARNER)
    return path


def learned(state: State) -> dict:
    """What the reward has learned, as a checkpoint holds it."""
    (reward,) = state.run.rewards.learning.values()
    return tree.from_bytes(reward.state)


def test_rewards_learn_at_the_end_of_every_outer_iteration_with_a_tenth_of_the_past(
    learner, tmp_path
):
    config = replace(
        SMALL, reward=f"{learner}:liking", ref_sync_steps=3, max_steps=6, prompts_per_step=15
    )
    names = "step-2.u4", "step-5.u1"  # the last safe point before a refit, and one after it
    store, state, numbers = saves(config, tmp_path / "c", *names)
    assert learned(state)["sizes"] == [[180, 0], [180, 20]]
    assert [step["reward"] for step in numbers[:3]] == [0, 0, 0]
    assert min(step["reward"] for step in numbers[3:]) > 0
    expected = everything(state)
    for path in store.names():
        other = restarted(config, path)
        assert everything(other) == expected, path.name
        assert learned(other) == learned(state)
    assert len(store.names()) == 2


def test_a_reward_process_that_is_started_afresh_knows_what_it_had_learned(learner):
    state = State(
        make_run(replace(SMALL, reward=f"{learner}:liking", ref_sync_steps=1, max_steps=1))
    )
    train(state)
    (reward,) = state.run.rewards.learning.values()
    arguments = {"completions": ["1", "2"], "prompts": ["", ""], "answer": ["", ""]}
    before = reward(**arguments)
    assert sum(before) > 0
    reward.stop()  # what a time-out or a crash does
    assert reward(**arguments) == before


def test_a_refit_that_fails_stops_the_run_or_leaves_the_reward_as_it_was(learner):
    config = replace(SMALL, reward=f"{learner}:failing", ref_sync_steps=1, max_steps=2)
    with pytest.raises(RewardFault, match="reward failing failed: ValueError: no data"):
        train(State(make_run(config)))
    state = State(make_run(replace(config, on_reward_fault="skip")))
    numbers = train(state)
    assert [step["reward"] for step in numbers] == [0, 0]  # not half trained
    assert state.run.rewards.messages == ["reward failing failed: ValueError: no data (mine.py:29)"]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("stateless", 1, "it has refit but no state_dict and no load_state_dict"),
        ("liking", 0, "--ref-sync-steps must be above 0: reward liking has refit"),
    ],
)
def test_rewards_that_could_not_learn_are_refused(learner, name, steps, message):
    with pytest.raises(ValueError, match=message):
        make_run(replace(SMALL, reward=f"{learner}:{name}", ref_sync_steps=steps))


def test_two_ranks_teach_the_same(learner, tmp_path):
    config = replace(FIVE, reward=f"{learner}:liking", ref_sync_steps=2)
    five_steps(config, Ranks(), tmp_path / "alone")
    train_ranks(config, 2, tmp_path / "two")
    assert difference(tmp_path / "two", tmp_path / "alone") <= 1e-5
    mine, theirs = (numbers_of(tmp_path / name)[-1] for name in ("two", "alone"))
    assert mine["reward"] == pytest.approx(theirs["reward"], rel=1e-4)
