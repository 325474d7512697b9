"""Scores against brute force, and the evaluation loop against a sampler whose answers are known."""

import itertools
import math
import random

import pytest

from fastgrpo.trainer.evaluation.evaluate import (
    Answered,
    evaluate,
    majority,
    pass_at_k,
    standard_error,
    summarise,
)
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.tasks.base import Problem


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (8, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, right):
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, right, k):
    with pytest.raises(ValueError, match="need 0 <= right <= n"):
        pass_at_k(n, right, k)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["1", "2"], "1"),  # a tie goes to the earliest
        ([None, None, "3"], "3"),  # no answer, no vote
        ([None, None], None),
        ([], None),
    ],
)
def test_majority(answers, winner):
    assert majority(answers) == winner


def test_standard_error_is_that_of_the_mean():
    assert standard_error([1.0, 0.0, 0.0, 1.0]) == pytest.approx(math.sqrt((1 / 3) / 4))
    assert math.isnan(standard_error([1.0]))


def answered(gold, greedy, answers, part=None):
    return Answered(
        Problem("?", gold, "", gold, part), "", greedy, [""] * len(answers), answers, 3.0
    )


def test_scores_of_known_answers():
    evaluation = summarise(
        [
            answered("1", "1", ["1", "1", "2", None], "seen"),  # pass@1 .5, majority right
            answered(
                "2", "1", ["3", "3", "2", "3"], "unseen"
            ),  # pass@1 .25, majority wrong, pass@4 right
            answered("3", None, ["4", "4", "4", "4"], "unseen"),  # nothing right
        ]
    )
    assert evaluation.scores == {
        "greedy": pytest.approx(1 / 3),
        "pass@1": pytest.approx(0.25),
        "maj@4": pytest.approx(1 / 3),
        "pass@4": pytest.approx(2 / 3),
    }
    assert evaluation.stderr["pass@1"] == pytest.approx(standard_error([0.5, 0.25, 0.0]))
    assert evaluation.slices == ["seen", "unseen"]
    assert evaluation.part("unseen").scores["pass@1"] == pytest.approx(0.125)


class Scripted:
    """A sampler that answers prompt `p` with `p` + 1 greedily, and with a given cycle of tokens when it samples."""

    name = "scripted"

    def __init__(self):
        self.calls = []

    def refresh(self):
        pass

    def sample(self, prompts, *, num_samples, max_new_tokens, temperature):
        self.calls.append((len(prompts), num_samples, temperature))
        rows = [
            [p[0] + 1 + (s % 2 if temperature else 0)] for p in prompts for s in range(num_samples)
        ]
        cut = [bool(temperature) and row[0] == 12 for row in rows]
        return Rollout([list(p) for p in prompts for _ in range(num_samples)], rows, None, cut)


class Numbers:
    """Prompts and completions are single numbers."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[int(text)] for text in texts]}

    def batch_decode(self, ids, skip_special_tokens):
        return [str(row[0]) for row in ids]


class Echo:
    def parse_answer(self, completion):
        return completion


def test_evaluation_pairs_completions_with_their_questions_over_batches():
    problems = [Problem(str(i), str(i + 1), "", str(i)) for i in range(100)]
    sampler, seen = Scripted(), []
    evaluation = evaluate(
        sampler, Echo(), Numbers(), problems, samples=4, max_new_tokens=1, temperature=0.9,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(64, 100), (100, 100)]
    assert sampler.calls == [(64, 1, 0.0), (64, 4, 0.9), (36, 1, 0.0), (36, 4, 0.9)]
    assert evaluation.scores["greedy"] == 1.0
    # Every second sample is right, except where the right answer is 12: those completions were cut.
    assert evaluation.scores["pass@1"] == pytest.approx((99 * 0.5) / 100)
    assert [a.problem.prompt for a in evaluation.answered] == [p.prompt for p in problems]


def test_no_samples_means_greedy_only():
    evaluation = evaluate(
        Scripted(), Echo(), Numbers(), [Problem("1", "2", "", "1")], samples=0, max_new_tokens=1
    )
    assert evaluation.scores == {"greedy": 1.0}


def test_the_sampler_of_a_real_model_is_evaluated_repeatably(model, tokenizer, story):
    from fastgrpo.trainer.sampling.sampler import KVSampler

    problems = story.sample("test", random.Random(0), 6)

    def run():
        sampler = KVSampler(
            model, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, seed=0
        )
        return evaluate(sampler, story, tokenizer, problems, samples=2, max_new_tokens=6)

    assert [a.samples for a in run().answered] == [a.samples for a in run().answered]
