"""Drawing tokens from logits with a generator of one's own."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 4096
"""Vocabulary from which a row draws one random number instead of one per token."""
BLOCK = 256  # tokens


def noise_buffer(rows: int, logits: Tensor) -> Tensor:
    """Room for the random numbers of one draw per row: see `choose`."""
    if logits.shape[1] < LARGE:
        return logits.new_empty(rows, logits.shape[1])
    return logits.new_empty(rows, dtype=torch.float64)


def draw_noise_(noise: Tensor, generator: torch.Generator) -> Tensor:
    """Fills the buffer."""
    if noise.dim() == 2:
        return noise.exponential_(generator=generator)
    return noise.uniform_(generator=generator)


def choose(
    logits: Tensor, temperature: float, noise: Tensor | None
) -> tuple[Tensor, Tensor]:  # [B, V] -> ids [B], log-probabilities [B]
    """Draws a token per row; without noise takes the likeliest.

    Exponential noise [B, V]: Gumbel argmax, `argmax(logprob - log(noise))`. Uniform noise [B], for large vocabularies,
    where the random numbers would take most of the time: the inverse of the distribution function, found in two
    levels, first among blocks of tokens, then in the block.
    """
    scaled = logits / (temperature or 1.0)
    if noise is not None and noise.dim() == 1:
        return _invert(scaled, noise)
    logprob = torch.log_softmax(scaled, -1)
    score = logprob if noise is None else logprob - noise.log()
    token_ids = score.argmax(-1)
    return token_ids, logprob.gather(-1, token_ids[:, None])[:, 0]


def _invert(scaled: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at which the distribution functions pass `uniform`, and their log-probabilities."""
    below_1 = uniform[:, None].clamp(max=1 - 2.0**-50)  # rounding must not lead past the last token
    top = scaled.amax(-1, keepdim=True)
    weight = torch.exp(scaled - top)
    blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    upto = blocks.sum(-1).double().cumsum(-1)
    total = upto[:, -1:]
    target = below_1 * total
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
    share = (target - before) / (upto.gather(1, block) - before)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    target = share.clamp(0, 1 - 2.0**-50) * inside[:, -1:]
    place = torch.searchsorted(inside, target, right=True).clamp_(max=BLOCK - 1)
    token_ids = (block * BLOCK + place).clamp_(max=scaled.shape[1] - 1)
    logprob = scaled.gather(1, token_ids) - top - total.log().to(scaled.dtype)
    return token_ids[:, 0], logprob[:, 0]
