"""Forward and backward of `linear_token_logprob` on flat tensors, results and gradients of full size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import Head
from fastgrpo.functional.linear.gradients import HeadGradients, Needs, Originals
from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.plan import PlannedRows
from fastgrpo.functional.linear.rows import Selection
from fastgrpo.functional.linear.score import (
    Scored,
    Scoring,
    Upstream,
    Visit,
    add_score_gradient,
    score_rows,
)
from fastgrpo.functional.linear.workspace import Workspace
from fastgrpo.ops.report import note_path


def select_rows(wanted: Tensor, total: int, capacity: int | None) -> Selection:
    """Rows where `wanted` [N] holds ([0]: all), one sync on a GPU; or `capacity` rows, wanted ones first, no sync."""
    every = Selection.every(total)
    if not wanted.numel() or (capacity is not None and capacity >= total):
        return every
    if capacity is None:
        return every.then(wanted)
    return Selection.of(total, torch.sort(wanted, descending=True, stable=True).indices[:capacity])


def poison(values: Sequence[Tensor], live: Tensor, capacity: int | None) -> list[Tensor]:
    """Make live entries NaN where more rows are live than `capacity` holds: loud, and without a sync."""
    if capacity is None or capacity >= live.numel():
        return list(values)
    too_many = live & (live.sum() > capacity)
    return [torch.where(too_many, torch.nan, value) if value.numel() else value for value in values]


def logprob_forward(
    head: Head,
    scoring: Scoring,
    mask: Tensor,
    options: LinearOptions,
    visit: Visit | None = None,
) -> Scored:
    """Score the live rows; results are [N], exactly 0 where masked."""
    total = scoring.hidden.shape[0]
    selection = select_rows(mask, total, options.capacity)
    workspace = Workspace(head, options.workspace_bytes, selection.count, with_gradient=False)
    scored = score_rows(scoring, selection, workspace, visit)
    workspace.release()
    note_path(
        "linear_token_logprob", f"{head.describe()}, up to {workspace.room.limit} rows at a time"
    )
    logprob, lse = selection.put(scored.logprob), selection.put(scored.lse)
    entropy = selection.put(scored.entropy) if scoring.with_entropy else logprob.new_empty(0)
    values = [logprob, entropy, lse]
    if mask.numel() and options.capacity is not None:
        values = [value.where(mask, 0.0) if value.numel() else value for value in values]
        values = poison(values, mask, options.capacity)
    return Scored(*values)


def power_of_two(upstream: Upstream) -> Tensor:
    """Scale [1] that brings the largest upstream gradient near 1, lest float16 gradients of logits underflow."""
    largest = torch.stack([value.abs().amax() for value in upstream if value.numel()]).amax()
    usable = (largest > 0) & largest.isfinite()
    return torch.exp2(torch.round(-torch.log2(torch.where(usable, largest, 1.0)))).reshape(1)


def logprob_backward(
    head: Head, like: Originals, scoring: Scoring, scored: Scored, upstream: Upstream, mask: Tensor, needs: Needs,
    options: LinearOptions, weight_buffer: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden states, weight and bias; only rows with an upstream gradient that is not 0 are recomputed."""
    total = scoring.hidden.shape[0]
    if mask.numel():
        upstream = Upstream(
            *(value.where(mask, 0.0) if value.numel() else value for value in upstream)
        )
    active = upstream.active()
    upstream = Upstream(*poison(upstream, active, options.capacity))
    selection = select_rows(active, total, options.capacity)
    scale = None
    if head.dtype == torch.float16 and weight_buffer is None and total:
        scale = power_of_two(upstream)
        upstream = Upstream(*(value * scale for value in upstream))
    workspace = Workspace(head, options.workspace_bytes, selection.count, with_gradient=True)
    products, _ = PlannedRows(selection).rehearse(workspace.room)
    gradients = HeadGradients(
        workspace,
        needs,
        like,
        products,
        keep_wide=scale is not None,
        weight_buffer=weight_buffer,
    )
    scored = Scored(*(selection.take(value) for value in scored))
    upstream = Upstream(*(selection.take(value) for value in upstream))
    add_score_gradient(scoring, selection, scored, upstream, gradients)
    gradients.flush()
    found = gradients.finish()
    if scale is None:
        return found
    originals = (like.hidden, like.weight, like.bias)
    return tuple(  # type: ignore[return-value]
        None if g is None or t is None else (g.float() / scale).to(t.dtype)
        for g, t in zip(found, originals, strict=True)
    )
