"""Log-probs and entropies of selected rows, chunk by chunk, and the backward that recomputes the logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.linear.gradients import HeadGradients, Rows
from fastgrpo.functional.linear.plan import pieces_of_rows
from fastgrpo.functional.linear.rows import Selection
from fastgrpo.functional.linear.workspace import Workspace
from fastgrpo.ops import token_logprob as ops


class Scored(NamedTuple):
    """Row statistics."""

    logprob: Tensor  # [n]
    entropy: Tensor  # [n] or [0]
    lse: Tensor  # [n]


class Upstream(NamedTuple):
    """Gradients that arrive at log-probs and entropies; [0] is zero."""

    dlogprob: Tensor
    dentropy: Tensor

    def active(self) -> Tensor:
        """Rows [n] with something to pass on; NaN counts."""
        masks = [value != 0 for value in self if value.numel()]
        return masks[0] | masks[-1] if masks else self.dlogprob != 0


@dataclass(frozen=True)
class Scoring:
    """Tokens of a batch to score and how logits become log-probs."""

    hidden: Tensor  # [N, H]
    token_ids: Tensor  # [N]
    temperature: Tensor  # [1] or [N]
    logit_params: Tensor  # [0], [1] or [2]
    with_entropy: bool

    def temperature_of(self, selection: Selection) -> Tensor:
        """Temperature of the selected rows."""
        return (
            self.temperature if self.temperature.numel() == 1 else selection.take(self.temperature)
        )

    def rows(self, selection: Selection, workspace: Workspace) -> tuple[Rows, Tensor]:
        """Hidden states and tokens of the selected rows, and their logits in the workspace."""
        rows = Rows(
            workspace.head.rows(selection.take(self.hidden)),
            selection.take(self.token_ids),
            selection,
        )
        return rows, workspace.logits(rows.hidden)

    def gradient(self, logits: Tensor, rows: Rows, scored: Scored, upstream: Upstream) -> None:
        """Turn the logits of rows into their gradient in place."""
        ops.token_logprob_bwd(
            logits,
            rows.target,
            self.temperature_of(rows.selection),
            self.logit_params,
            *scored,
            *upstream,
            logits,
        )


def nothing_to_flush() -> None:
    """Passes that make no gradients leave nothing waiting."""


Visit = Callable[[Tensor, Rows, Tensor], None]  # logits of a chunk, its rows, their temperature


def score_rows(
    scoring: Scoring, selection: Selection, workspace: Workspace, visit: Visit | None = None
) -> Scored:
    """Score the selected rows. `visit` sees the logits of each chunk."""
    parts = []
    for chunk in pieces_of_rows(selection.count, workspace.room, nothing_to_flush):
        piece = selection.piece(chunk)
        rows, logits = scoring.rows(piece, workspace)
        temperature = scoring.temperature_of(piece)
        every_row = torch.empty(0, dtype=torch.bool, device=logits.device)
        parts.append(ops.token_logprob_fwd(
            logits, rows.target, every_row, temperature, scoring.logit_params, scoring.with_entropy
        ))  # fmt: skip
        if visit is not None:
            visit(logits, rows, temperature)
    if not parts:
        empty = scoring.temperature.new_empty(0)
        return Scored(empty, empty, empty)
    return Scored(*(torch.cat(values) for values in zip(*parts, strict=True)))


def add_score_gradient(
    scoring: Scoring, selection: Selection, scored: Scored, upstream: Upstream, gradients: HeadGradients
) -> None:  # fmt: skip
    """Recompute the logits of the selected rows and add their gradients; `scored` and `upstream` are theirs."""
    workspace = gradients.workspace
    for chunk in pieces_of_rows(selection.count, workspace.room, gradients.flush):
        piece, within = selection.piece(chunk), Selection.every(selection.count).piece(chunk)
        rows, logits = scoring.rows(piece, workspace)
        part = Upstream(*(within.take(value) for value in upstream))
        scoring.gradient(logits, rows, Scored(*(within.take(value) for value in scored)), part)
        gradients.add(logits, rows, part.active())
