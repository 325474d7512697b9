"""What a run came to: the record behind summary.json, the closing words and the report."""

from dataclasses import dataclass, field
from typing import Any

from fastgrpo.trainer.evaluation.evaluate import Evaluation
from fastgrpo.trainer.output.close_up import CloseUp
from fastgrpo.trainer.output.plots import Record


@dataclass(slots=True)
class Result:
    """Filled while the run goes on, so that an interrupted one has as much as it got."""

    config: dict[str, Any]
    stopped: str | None = None  # why it ended early
    base: Evaluation | None = None
    final: Evaluation | None = None
    records: list[Record] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    close_up: CloseUp | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The full evaluations that were made, by name."""
        both = {"base": self.base, "final": self.final}
        return {name: evaluation for name, evaluation in both.items() if evaluation is not None}

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        made = self.evaluations
        return {
            "base": self.base.scores if self.base else None,
            "final": self.final.scores if self.final else None,
            "wall_s": self.wall_s,
            "config": self.config,
            "stderr": {name: e.stderr for name, e in made.items()},
            "slices": {name: slices(e) for name, e in made.items() if e.slices},
            "mean_length": {name: e.mean_length for name, e in made.items()},
            "eval_questions": {name: len(e.answered) for name, e in made.items()},
            "cpu_s": self.cpu_s,
            "seconds": self.seconds,
            "memory_bytes": self.memory,
            "stopped": self.stopped,
            "notes": self.notes,
        }


def slices(evaluation: Evaluation) -> dict[str, Any]:
    """Scores, errors and size of every slice."""
    parts = {name: evaluation.part(name) for name in evaluation.slices}
    return {
        name: {"questions": len(part.answered), "scores": part.scores, "stderr": part.stderr}
        for name, part in parts.items()
    }
