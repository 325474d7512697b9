"""Process supervision: which lines earn, which tokens they end at, and that training uses it token by token."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastgrpo.trainer.data.text import encode_completions, encode_prompts
from fastgrpo.trainer.microbatch import split
from fastgrpo.trainer.options.jobs import default_config, make_task
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.process import line_ends, reward_lines
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.story import Story
from fastgrpo.trainer.train import grpo
from tests.trainer.conftest import tiny_llama

PROBLEM = Problem(
    "Q: Ada has 7 coins, finds 2, loses 3. How many?\nA:\n", "6", "7+2=9\n9-3=6\n#### 6", "7+2-3"
)


@pytest.mark.parametrize(
    ("lines", "rewards"),
    [
        (["7+2=9", "9-3=6", "#### 6"], [1, 1, 1]),
        (["7+2=9", "9-3=5", "#### 5"], [1, 0, 0]),
        (["#### 6"], [1]),  # a bare answer that is right
        (["#### 7"], [0]),
        (["9-3=6", "7+2=9", "#### 6"], [0, 0, 1]),  # in the wrong place
        (["7+2=9", "7+2=9", "7+2=9", "#### 6"], [1, 0, 0, 1]),  # repetition does not pay
        (
            ["7+2=9", "9-3=6", "1+1=2", "#### 6"],
            [1, 1, 0, 1],
        ),  # nor do true lines that lead nowhere
        (["#### 6", "#### 6", "7+2=9"], [1, 0, 0]),  # nor answers after the first
    ],
)
def test_story_lines(story, lines, rewards):
    assert story.line_rewards(PROBLEM, lines) == rewards


def test_line_ends():
    assert line_ends(["7", "+", "2", "\n", "#### ", "9", ""]) == (["7+2", "#### 9"], [3, 6])
    assert line_ends(["\n", "\n"]) == (["", ""], [0, 1])
    assert line_ends(["x"]) == (["x"], [0])


def rollout_of(tokenizer, texts, cut=()):
    ids = encode_completions(tokenizer, texts)
    prompt = encode_prompts(tokenizer, [PROBLEM.prompt])[0]
    return Rollout([prompt] * len(texts), ids, None, [i in cut for i in range(len(texts))])


def test_a_token_is_worth_the_lines_that_end_at_or_after_it(story, tokenizer):
    texts = ["7+2=9\n9-3=6\n#### 6", "7+2=9\n9-3=5\n#### 5"]
    rollout = rollout_of(tokenizer, texts)
    lines = reward_lines(story, tokenizer, [PROBLEM] * 2, rollout)
    advantage = lines.advantage(group_size=2)
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 0])  # six lines in the group
    z = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    first, second = advantage.split(rollout.lengths)
    # 6 tokens for each step with its line break, then "#### ", the number and the end.
    for own, worth in ((first, z[:3]), (second, z[3:])):
        assert len(own) == 15
        assert torch.allclose(own[:6], worth.sum().expand(6), atol=1e-5)
        assert torch.allclose(own[6:12], worth[1:].sum().expand(6), atol=1e-5)
        assert torch.allclose(own[12:], worth[2].expand(3), atol=1e-5)
    assert lines.reward.tolist() == rewards.tolist()
    tokens = torch.zeros(30)
    tokens[[5, 11, 14, 20]] = 1.0  # under PPO a line's reward stands on its last token
    assert torch.equal(lines.per_token(), tokens)


def test_a_line_that_was_cut_earns_nothing(story, tokenizer):
    rollout = rollout_of(tokenizer, ["7+2=9\n9-3=6\n#### 6", "7+2=9\n9-3=6\n#### 6"], cut={1})
    lines = reward_lines(story, tokenizer, [PROBLEM] * 2, rollout)
    assert lines.reward.tolist() == [1, 1, 1, 1, 1, 0]


def test_micro_batches_keep_each_tokens_advantage_with_its_token(story, tokenizer):
    texts = ["7+2=9\n9-3=6\n#### 6", "#### 7", "7+2=9\n#### 9", "#### 6"]
    rollout = rollout_of(tokenizer, texts)
    advantage = torch.arange(float(sum(rollout.lengths)))
    options = {"drop_zero_advantage": False, "pad_id": 0, "device": torch.device("cpu")}
    parts = dict(
        zip(map(tuple, rollout.completion_ids), advantage.split(rollout.lengths), strict=True)
    )

    def check(batch):
        bounds = batch.tokens.cu_seqlens.tolist()
        for a, b in pairwise(bounds):
            assert torch.equal(
                batch.advantage[a:b], parts[tuple(batch.tokens.token_ids[a:b].tolist())]
            )

    for batch in split(rollout, advantage, size=3, **options):
        check(batch)
        for half in batch.halves():
            check(half)


def test_without_kl_a_completion_is_left_out_only_if_all_its_tokens_are_worth_nothing(
    story, tokenizer
):
    rollout = rollout_of(tokenizer, ["#### 7", "#### 6"])
    advantage = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    (batch,) = split(
        rollout, advantage, size=4, drop_zero_advantage=True, pad_id=0, device=torch.device("cpu")
    )
    assert batch.tokens.token_ids.tolist() == rollout.completion_ids[1]


def test_a_step_of_training_under_process_supervision(tokenizer):
    config = replace(
        default_config("story"),
        supervision="process",
        prompts_per_step=2,
        num_generations=4,
        max_steps=2,
        max_completion_length=12,
        learning_rate=1e-2,
    )
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48)
    before = [p.detach().clone() for p in model.parameters()]

    class LongLines(Story):  # something that random completions can earn
        def line_rewards(self, problem, lines):
            return [float(len(line) > 8) for line in lines]

    run = Run(config, LongLines(), tokenizer, Policy(model), torch.device("cpu"))
    steps = list(grpo(run))
    assert all(0 <= step.numbers["step_reward"] <= 1 for step in steps)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_jobs_without_lines_say_so():
    config = replace(default_config("copy"), supervision="process")
    with pytest.raises(
        ValueError, match="supervision must be outcome: the job copy cannot reward lines"
    ):
        make_task(config)
