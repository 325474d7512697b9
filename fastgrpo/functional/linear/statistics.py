"""Further statistics of the policy at each token, taken from a chunk of logits while it exists."""

import torch
from torch import Tensor

from fastgrpo.functional.linear.gradients import Rows
from fastgrpo.reference.token_logprob import accumulate_dtype

OUTPUTS = ("log_sum_sq_probs", "mean_logit", "is_top1")
BLOCK_BYTES = 16 << 20  # of logits in the accumulation dtype at a time


def scaled_logits(logits: Tensor, temperature: Tensor, logit_params: Tensor) -> Tensor:
    """x = softcap * tanh(scale * z / softcap) / temperature in the accumulation dtype."""
    x = logits.to(accumulate_dtype(logits.dtype))
    if logit_params.numel() == 2:
        scale, softcap = logit_params
        x = softcap * torch.tanh(scale * x / softcap)
    elif logit_params.numel():
        x = x * logit_params
    return x / temperature[:, None]


def row_statistics(x: Tensor, target: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """The asked-for statistics of rows of scaled logits [n, V]."""
    found = {}
    if "log_sum_sq_probs" in outputs:
        log_p = x.log_softmax(-1)
        found["log_sum_sq_probs"] = torch.logsumexp(2 * log_p, -1)
    if "mean_logit" in outputs:
        found["mean_logit"] = x.mean(-1)
    if (
        "is_top1" in outputs
    ):  # argmax takes the first maximum: a tie with an earlier token is not top 1
        found["is_top1"] = x.argmax(-1) == target
    return found


class StatisticsVisitor:
    """Collects statistics over the chunks of a forward pass."""

    def __init__(self, outputs: tuple[str, ...], total: int, logit_params: Tensor) -> None:
        """Results are [total], 0 (False) for rows that are never visited."""
        self.outputs, self.logit_params = outputs, logit_params
        dtypes = {"is_top1": torch.bool}
        self.results = {
            name: torch.zeros(total, dtype=dtypes.get(name, logit_params.dtype), device=logit_params.device)
            for name in outputs
        }  # fmt: skip

    def __call__(self, logits: Tensor, rows: Rows, temperature: Tensor) -> None:
        """Take the statistics of a chunk, a block of rows at a time."""
        count, vocabulary = logits.shape
        temperature = temperature.expand(count)
        size = max(BLOCK_BYTES // (8 * vocabulary), 1)
        blocks = []
        for start in range(0, count, size):
            block = slice(start, start + size)
            x = scaled_logits(logits[block], temperature[block], self.logit_params)
            blocks.append(row_statistics(x, rows.target[block], self.outputs))
        for name, full in self.results.items():
            rows.selection.put_into(full, torch.cat([block[name] for block in blocks]))

    def masked(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The results, 0 where `mask` [N] ([0]: nowhere) is False."""
        found = self.results.values()
        return (
            tuple(found)
            if not mask.numel()
            else tuple(torch.where(mask, v, torch.zeros_like(v)) for v in found)
        )
