"""A sampled batch, divided: into the updates that train on it, and those into micro-batches."""

from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.trainer.microbatch import Portion, denominator, split
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.state import State


def divide(
    state: State, rollout: Rollout, objective: Objective, advantage: Tensor, drop: bool
) -> list[Portion]:
    """The completions by the update that trains on them: whole groups in turn."""
    run, config = state.run, state.run.config
    options = {"pad_id": run.tokenizer.pad_token_id, "device": run.device}
    questions = [i for k in sorted(state.streams) for i in state.questions(k)]
    group = config.num_generations
    portions = []
    for number in range(config.steps_per_generation):
        turn = [n for n, i in enumerate(questions) if i % config.steps_per_generation == number]
        rows = [n * group + g for n in turn for g in range(group)]
        size = state.micro_batch_size
        batches = split(
            rollout, advantage, size=size, drop_zero_advantage=drop, rows=rows, **options
        )
        lengths = [rollout.lengths[i] for i in rows]
        portions.append(Portion(batches, denominator(lengths, objective, run.device)))
    if run.ranks.world_size > 1:
        spare = split(rollout, advantage, size=1, drop_zero_advantage=False, rows=[0], **options)
        most = run.ranks.maxima([len(portion.batches) for portion in portions])
        for portion, passes in zip(portions, most, strict=True):
            portion.pad_to(passes, spare[0])
    return portions
