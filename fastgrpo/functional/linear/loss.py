"""The one-pass loss on flat tensors: chunk of logits -> loss and gradient in place -> gradient products.

Three products per active row (two for a frozen head), one per row that is only scored. A sequence-level objective needs
whole sequences in a chunk; one that does not fit is scored first and recomputed for its gradient (a fourth product).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import Head
from fastgrpo.functional.linear.gradients import HeadGradients, Needs, Originals
from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.plan import PlannedRows, RowClasses
from fastgrpo.functional.linear.rows import Chunk, Selection
from fastgrpo.functional.linear.score import (
    Scored,
    Scoring,
    Upstream,
    add_score_gradient,
    nothing_to_flush,
    score_rows,
)
from fastgrpo.functional.linear.workspace import Workspace
from fastgrpo.ops.report import note_path
from fastgrpo.ops.surrogates import run_grpo_loss, run_policy_loss
from fastgrpo.spec import NUM_METRICS


class TokenInputs(NamedTuple):
    """Per-token tensors of the loss in the order of the ops' schemas: [N], all but the first three may be [0]."""

    advantage: Tensor
    mask: Tensor
    weight: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    log_weight: Tensor
    token_weight: Tensor
    kl_weight: Tensor
    entropy_weight: Tensor

    def select(self, selection: Selection) -> "TokenInputs":
        """Entries of the selected rows."""
        return TokenInputs(*(selection.take(value) for value in self))

    def chunk(self, chunk: Chunk) -> "TokenInputs":
        """Entries of a chunk of the selected rows."""
        return TokenInputs(*(value[chunk.start : chunk.stop] for value in self))


@dataclass(frozen=True)
class Formula:
    """The objective as the ops take it, and the factor folded into stored gradients ([1], or [0]: 1)."""

    params: Tensor
    spec: list[int]
    surrogate: str
    grad_scale: Tensor


class Part(NamedTuple):
    """Results for some rows, in their order."""

    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: Tensor


def merge_metrics(parts: list[Tensor], like: Tensor) -> Tensor:
    """Sums, counts, minima and maxima of all parts together, [NUM_METRICS, 4] float64."""
    if not parts:
        row = torch.tensor(
            [0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64, device=like.device
        )
        return row.expand(NUM_METRICS, 4).clone()
    data = torch.stack(parts)
    low, high = data[..., 2].amin(0), data[..., 3].amax(0)
    return torch.cat([data[..., :2].sum(0), low[:, None], high[:, None]], dim=1)


class OnePass:
    """Works through planned rows in one workspace."""

    def __init__(
        self, scoring: Scoring, tokens: TokenInputs, formula: Formula, workspace: Workspace
    ) -> None:
        """Keep the full batch [N]; `run` selects from it."""
        self.scoring, self.tokens, self.formula, self.workspace = (
            scoring,
            tokens,
            formula,
            workspace,
        )

    def run(self, planned: PlannedRows, gradients: HeadGradients | None) -> list[Part]:
        """Results of the planned rows, piece by piece."""
        room = self.workspace.room
        flush = nothing_to_flush if gradients is None else gradients.flush
        parts = []
        for piece in planned.pieces(room, flush):
            work = self._one_pass if piece.size <= room.rows else self._two_steps
            parts.append(work(planned, piece, gradients))
        flush()
        return parts

    def _one_pass(
        self, planned: PlannedRows, piece: Chunk, gradients: HeadGradients | None
    ) -> Part:
        selection, scoring, formula = planned.selection.piece(piece), self.scoring, self.formula
        tokens = self.tokens.select(selection)
        rows, logits = scoring.rows(selection, self.workspace)
        _, token_loss, logprob, entropy, dlogprob, metrics = run_grpo_loss(
            logits,
            rows.target,
            scoring.temperature_of(selection),
            scoring.logit_params,
            *tokens,
            planned.piece_offsets(piece, logits.device),
            formula.params,
            formula.grad_scale,
            formula.spec,
            formula.surrogate,
            scoring.with_entropy,
            logits.new_empty(0) if gradients is None else logits,
        )
        if gradients is not None:
            active = Upstream(dlogprob, tokens.entropy_weight).active()
            gradients.add(logits, rows, active)
        return Part(token_loss, logprob, entropy, metrics)

    def _two_steps(
        self, planned: PlannedRows, piece: Chunk, gradients: HeadGradients | None
    ) -> Part:
        selection, formula = planned.selection.piece(piece), self.formula
        tokens = self.tokens.select(selection)
        if gradients is not None:
            gradients.flush()
        scored = score_rows(self.scoring, selection, self.workspace)
        _, token_loss, dlogprob, metrics = run_policy_loss(
            scored.logprob,
            *tokens[:-1],
            scored.entropy,
            tokens.entropy_weight,
            planned.piece_offsets(piece, scored.logprob.device),
            formula.params,
            formula.spec,
            formula.surrogate,
        )
        if gradients is not None:
            self._recompute(
                selection, scored, Upstream(dlogprob, -tokens.entropy_weight), gradients
            )
        logprob, entropy = (
            value.where(tokens.mask, 0.0) if value.numel() else value for value in scored[:2]
        )
        return Part(token_loss, logprob, entropy, metrics)

    def _recompute(
        self, selection: Selection, scored: Scored, upstream: Upstream, gradients: HeadGradients
    ) -> None:
        """Second step: gradients of the rows that have one (of all rows where looking would be a sync)."""
        active = upstream.active()
        if active.device.type == "cpu":
            inner = Selection.every(selection.count).then(active)
            scored = Scored(*(inner.take(value) for value in scored))
            upstream = Upstream(*(inner.take(value) for value in upstream))
            selection = selection.then(active)
        if self.formula.grad_scale.numel():
            upstream = Upstream(*(value * self.formula.grad_scale for value in upstream))
        add_score_gradient(self.scoring, selection, scored, upstream, gradients)


class Outcome(NamedTuple):
    """Everything that a call returns; gradients are None where not wanted."""

    loss: Tensor  # []
    token_loss: Tensor  # [N]
    logprob: Tensor  # [N]
    entropy: Tensor  # [N] or [0]
    metrics: Tensor  # [NUM_METRICS, 4]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def weighted_sum(token_loss: Tensor, entropy: Tensor, tokens: TokenInputs) -> Tensor:
    """Share of the loss, [] float64: summed over the rows themselves, so without regard to chunks or padding."""
    weight, entropy_weight = tokens.weight, tokens.entropy_weight
    loss = torch.where(weight != 0, weight * token_loss, 0.0).double().sum()
    if entropy_weight.numel():
        bonus = torch.where(entropy_weight != 0, entropy_weight * entropy, 0.0)
        loss = loss - bonus.double().sum()
    return loss


def linear_loss(
    head: Head, scoring: Scoring, tokens: TokenInputs, formula: Formula, classes: RowClasses, like: Originals,
    needs: Needs, options: LinearOptions, weight_buffer: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """Loss of the planned rows, and the gradients that `needs` asks for."""
    wanted = any(needs)
    most = max(classes.active.selection.count, classes.scored.selection.count)
    workspace = Workspace(head, options.workspace_bytes, most, wanted)
    gradients = None
    if wanted:
        products, _ = classes.active.rehearse(workspace.room)
        gradients = HeadGradients(
            workspace,
            needs,
            like,
            products,
            keep_wide=formula.grad_scale.numel() > 0,
            weight_buffer=weight_buffer,
        )
    one_pass = OnePass(scoring, tokens, formula, workspace)
    loss = torch.zeros((), dtype=torch.float64, device=scoring.hidden.device)
    full = [
        scoring.temperature.new_zeros(scoring.hidden.shape[0])
        for _ in range(3 if scoring.with_entropy else 2)
    ]
    metrics = []
    for planned, sink in ((classes.active, gradients), (classes.scored, None)):
        parts = one_pass.run(planned, sink)
        if not parts:
            continue
        token_loss, logprob, entropy = (torch.cat([part[k] for part in parts]) for k in range(3))
        loss = loss + weighted_sum(token_loss, entropy, tokens.select(planned.selection))
        metrics += [part.metrics for part in parts]
        for target, values in zip(full, (token_loss, logprob, entropy), strict=False):
            planned.selection.put_into(target, values)
    note_path("linear_grpo_loss", f"{head.describe()}, {classes.describe(workspace.room)}")
    workspace.release()
    return Outcome(
        loss.to(full[0].dtype),
        full[0],
        full[1],
        full[2] if scoring.with_entropy else full[1].new_empty(0),
        merge_metrics(metrics, loss),
        gradients.finish() if gradients is not None else (None, None, None),
    )
