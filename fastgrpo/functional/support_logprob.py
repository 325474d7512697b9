"""Log-probs over a replayed support: the tokens that the sampler's top-k or top-p had kept at each position.

The sampler drew from the renormalised kept set; scoring over the whole vocabulary biases every ratio by the kept mass
(0.9 at top_p = 0.9). Only the kept entries are read: k logits, or k rows of the head, per token instead of V.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo.functional.checks import (
    INTEGERS,
    as_mask,
    describe,
    flatten,
    require_device,
    require_float,
    require_number,
    require_shape,
    require_tensor,
    require_token_ids,
)
from fastgrpo.functional.token_logprob import check_logits, rows, temperature_tensor
from fastgrpo.reference.token_logprob import accumulate_dtype


def support_logprob(
    logits: Tensor,  # [..., V] float
    token_ids: Tensor,  # [...] integer
    support_ids: Tensor,  # [K] integer: kept token ids of all positions, one after the other
    support_offsets: Tensor,  # [N + 1] integer: where each position's ids begin
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...] bool
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:  # [...] float32 (float64 for float64 logits)
    """Log-probability of each token among the ids that were kept at its position (CSR layout, as vLLM returns them).

    logprob_i = x_i[token_i] - logsumexp of x_i over the kept ids, x as in `token_logprob`. A live token outside its own
    support, or an id outside [0, V), gives NaN in that row. Masked positions may have an empty support.

    Args:
        logits: Scores over the vocabulary.
        token_ids: The sampled tokens; each must be among its position's kept ids.
        support_ids: Kept ids, ragged, flattened in the order of the positions.
        support_offsets: First index of each position's ids in `support_ids`, and their total at the end.
        temperature: See `token_logprob`.
        mask: See `token_logprob`.
        logit_scale: See `token_logprob`.
        logit_softcap: See `token_logprob`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range.

    Source: "keep sampling mask" of DeepSeek-V3.2 (arXiv:2512.02556).
    """
    logits = check_logits(logits, overwrite_logits=False)
    shape = logits.shape[:-1]
    ids = require_token_ids(token_ids, shape, logits, "logits")
    kept, offsets = _check_support(support_ids, support_offsets, ids.numel(), logits)
    flat, vocabulary = rows(logits), logits.shape[-1]
    scores = flat[_position(kept, offsets), kept.clamp(0, vocabulary - 1)]
    scale = temperature_tensor(temperature, shape, logits)
    live = _live(mask, shape, logits, "logits")
    return _normalise(
        scores, ids, kept, offsets, live, scale, logit_scale, logit_softcap, vocabulary
    ).view(shape)


def linear_support_logprob(
    hidden: Tensor,  # [..., H] float
    weight: Tensor,  # [V, H], dtype of hidden
    token_ids: Tensor,  # [...] integer
    support_ids: Tensor,  # [K] integer
    support_offsets: Tensor,  # [N + 1] integer
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rows_per_chunk: int = 65_536,
) -> Tensor:  # [...] float32 (float64 for float64 input)
    """`support_logprob` from hidden states: only the kept rows of the head are multiplied.

    Args:
        hidden: Hidden states.
        weight: Weight of the LM head.
        token_ids: See `support_logprob`, as for all arguments up to `logit_softcap`.
        support_ids: See `support_logprob`.
        support_offsets: See `support_logprob`.
        temperature: See `support_logprob`.
        mask: See `support_logprob`.
        logit_scale: See `support_logprob`.
        logit_softcap: See `support_logprob`.
        rows_per_chunk: Rows of the head gathered at a time, in forward and again in backward: bounds the memory.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range.
    """
    hidden, weight = require_float("hidden", hidden), require_float("weight", weight)
    require_shape("weight", weight, (*weight.shape[:1], hidden.shape[-1]), "[V, H], H of hidden")
    require_device("weight", weight, hidden, "hidden")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden ({hidden.dtype}), got {describe(weight)}"
        )
    shape, vocabulary = hidden.shape[:-1], weight.shape[0]
    ids = require_token_ids(token_ids, shape, hidden, "hidden")
    kept, offsets = _check_support(support_ids, support_offsets, ids.numel(), hidden)
    flat, safe = hidden.reshape(-1, hidden.shape[-1]), kept.clamp(0, vocabulary - 1)
    parts = [
        checkpoint(_products, flat, weight, row, token, use_reentrant=False)
        for row, token in zip(
            _position(kept, offsets).split(rows_per_chunk), safe.split(rows_per_chunk), strict=True
        )
    ]
    scores = torch.cat(parts) if parts else flat.new_empty(0)
    scale = temperature_tensor(temperature, shape, hidden)
    live = _live(mask, shape, hidden, "hidden")
    return _normalise(
        scores, ids, kept, offsets, live, scale, logit_scale, logit_softcap, vocabulary
    ).view(shape)


def _products(hidden: Tensor, weight: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """hidden[row] . weight[token], products and sum in the accumulation dtype."""
    dtype = accumulate_dtype(hidden.dtype)
    return (hidden[row].to(dtype) * weight[token].to(dtype)).sum(-1)


def _position(kept: Tensor, offsets: Tensor) -> Tensor:
    """The position that each kept id belongs to, [K]."""
    entry = torch.arange(kept.numel(), device=kept.device)
    return torch.searchsorted(offsets[1:].contiguous(), entry, right=True).clamp(
        max=max(offsets.numel() - 2, 0)
    )


def _live(mask: Tensor | None, shape: torch.Size, like: Tensor, like_name: str) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device).reshape(-1)
    return flatten(as_mask(mask, shape, like, like_name), torch.bool)


def _check_support(
    support_ids: Tensor, support_offsets: Tensor, num_positions: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    kept = require_tensor("support_ids", support_ids, INTEGERS, "integer")
    offsets = require_tensor("support_offsets", support_offsets, INTEGERS, "integer")
    if kept.dim() != 1:
        raise ValueError(f"support_ids must have shape [K], got {describe(kept)}")
    require_shape(
        "support_offsets", offsets, (num_positions + 1,), "one entry per position, and the total"
    )
    require_device("support_ids", kept, like, "the scores")
    require_device("support_offsets", offsets, like, "the scores")
    offsets = offsets.to(torch.int64)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        rises = bool((offsets[1:] >= offsets[:-1]).all())
        if not rises or int(offsets[0]) != 0 or int(offsets[-1]) != kept.numel():
            raise ValueError(
                f"support_offsets must rise from 0 to the number of support_ids ({kept.numel()}), "
                f"got {offsets[:8].tolist()}..."
            )
    return kept.to(torch.int64), offsets


def _normalise(
    scores: Tensor,  # [K] logits of the kept ids
    ids: Tensor,  # [N]
    kept: Tensor,  # [K]
    offsets: Tensor,  # [N + 1]
    live: Tensor,  # [N] bool
    temperature: Tensor,  # [1] or [N]
    logit_scale: float,
    logit_softcap: float | None,
    vocabulary: int,
) -> Tensor:  # [N]
    """Log-softmax over each position's segment at the sampled token, the target left out of the normaliser."""
    require_number("logit_scale", logit_scale, above=0.0, rule="> 0 and finite")
    position = _position(kept, offsets)
    usable = live[position]
    u = torch.where(usable, scores.to(accumulate_dtype(scores.dtype)), 0.0) * logit_scale
    if logit_softcap is not None:
        require_number("logit_softcap", logit_softcap, above=0.0, rule="None, or > 0 and finite")
        u = logit_softcap * torch.tanh(u / logit_softcap)
    is_target = usable & (kept == ids[position]) & (kept >= 0) & (kept < vocabulary)

    def over_segments(value: Tensor, reduce: str) -> Tensor:
        return torch.segment_reduce(value, reduce, offsets=offsets, unsafe=True)

    peak = over_segments(u.detach(), "max")
    peak = torch.where(peak.isfinite(), peak, 0.0)
    x = (u - peak[position]) / temperature.expand(ids.numel())[position]
    rest = over_segments(torch.where(is_target, 0.0, torch.exp(x)), "sum")
    target = over_segments(torch.where(is_target, x, 0.0), "sum")
    found = over_segments(is_target.to(x.dtype), "sum") == 1
    only = rest == 0  # nothing else was kept: probability 1
    log_rest = torch.log(torch.where(only, 1.0, rest))
    odds = torch.where(only, -torch.inf, log_rest - target)
    logprob = -torch.nn.functional.softplus(odds, threshold=1e30)
    return torch.where(live, torch.where(found, logprob, torch.nan), 0.0)
