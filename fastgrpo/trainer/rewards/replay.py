"""What a learned reward is trained on in iterative GRPO: the completions of this iteration, and some of earlier ones.

Algorithm 1 of DeepSeekMath ends every outer iteration by training the reward model on, "using a replay mechanism that
incorporates 10% of historical data" (section 4.1.4, Shao et al. 2024, arXiv:2402.03300): here a tenth of what the
reward is trained on are completions that it was trained on before, each equally likely.
"""

import random
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
"""A completion: the columns that rewards are given, and "rewards", what each made of it by name."""
SHARE = 0.1
LARGEST_PAST = 10_000
"""Completions of earlier iterations that are kept: a uniform sample, if there were more."""


@dataclass(slots=True)
class Replay:
    """Completions that have been scored."""

    fresh: list[Record] = field(default_factory=list)  # in this outer iteration
    past: list[Record] = field(default_factory=list)
    num_past: int = 0  # that `past` is a sample of

    def turn(self, rng: random.Random) -> tuple[list[Record], list[Record]]:
        """Ends an outer iteration: (its completions, those of earlier ones to mix in). They become past ones."""
        fresh, self.fresh = self.fresh, []
        wanted = round(len(fresh) * SHARE / (1 - SHARE))
        mixed_in = rng.sample(self.past, min(wanted, len(self.past)))
        for record in fresh:  # reservoir sampling (Vitter 1985, algorithm R)
            self.num_past += 1
            if len(self.past) < LARGEST_PAST:
                self.past.append(record)
            elif (place := rng.randrange(self.num_past)) < LARGEST_PAST:
                self.past[place] = record
        return fresh, mixed_in
