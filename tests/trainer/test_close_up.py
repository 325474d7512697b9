"""The step seen from near: the question that taught most, and log-ratios of the right tokens."""

from dataclasses import asdict, replace

import pytest
import torch

from fastgrpo.trainer.memory import memory_of
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.output.close_up import COMPLETIONS, CloseUp, close_up
from fastgrpo.trainer.output.page import close_up as render
from fastgrpo.trainer.setup import make_run
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo

SMALL = replace(
    default_config("copy"),
    max_steps=1,
    prompts_per_step=4,
    num_generations=12,
    warmup_steps=0,
    seed=3,
)


@pytest.fixture(scope="module")
def seen():
    run = make_run(SMALL)
    state = State(run)
    (step,) = grpo(run, state)
    return state, step, close_up(run, 1, step.portions)


def test_tokens_are_those_of_one_question_and_their_log_ratios_add_up(seen):
    """By the text: prompt and tokens of each shown completion are one of the step's, with the policies' difference."""
    state, step, near = seen
    run, rollout = state.run, step.rollout
    texts = {
        (run.tokenizer.decode(p), run.tokenizer.decode(c)): i
        for i, (p, c) in enumerate(zip(rollout.prompt_ids, rollout.completion_ids, strict=True))
    }
    assert 2 <= len(near.completions) <= COMPLETIONS
    for one in near.completions:
        i = texts[near.prompt, "".join(one.tokens)]
        ids = torch.tensor([rollout.prompt_ids[i] + rollout.completion_ids[i]])
        logits = run.policy.model(ids).logits[0, len(rollout.prompt_ids[i]) - 1 : -1]
        new = logits.log_softmax(-1).gather(-1, ids[0, len(rollout.prompt_ids[i]) :, None])[:, 0]
        expected = new - rollout.logprob[i]
        assert torch.allclose(torch.tensor(one.log_ratio), expected, atol=1e-5)
        assert any(r != 0 for r in one.log_ratio)  # the step has moved the policy
    first, second = (sum(one.advantage) for one in near.completions[:2])
    assert first > 0 > second  # best and worst take turns


def test_it_goes_into_a_checkpoint_and_the_page(seen):
    _, _, near = seen
    assert CloseUp.of(asdict(near)) == near
    page = render(replace(near, prompt="<b>", completions=[*near.completions, near.completions[0]]))
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    different = {tuple(one.tokens) for one in near.completions}
    assert page.count("<pre><span") == len(different)
    assert "2 times" in page


def test_memory_is_that_of_the_tensors(seen):
    state, _, _ = seen
    parts = memory_of(state)
    size = sum(p.numel() for p in state.run.policy.parameters()) * 4
    assert parts["weights"] == parts["gradients"] == size
    assert 2 * size <= parts["moments of the optimizer"] < 2.01 * size  # and a step count each
    assert parts["peak of the process"] > 4 * size
