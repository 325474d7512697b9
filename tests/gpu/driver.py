"""Every CUDA and Triton op once at small, odd sizes: what compute-sanitizer watches (`benchmarks/gpu_check.sh`).

python -m tests.gpu.driver [cuda|cpu]; exit code 1 if a result is not finite. Sizes are small because racecheck is slow,
and odd because out-of-bounds accesses live in tails.
"""

import sys

import torch

from fastgrpo import (
    Objective,
    group_advantage,
    grpo_loss,
    kl_estimate,
    process_advantage,
    token_logprob,
)
from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.testing import make_inputs


def losses(device: str, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probs and losses with gradients, out of place and in place, on token and on sequence level."""
    x = make_inputs(3, 5, vocabulary, dtype, device=device)
    results = []
    for objective in (Objective.grpo(beta=0.04), Objective.gspo()):
        for overwrite in (False, True):
            logits = x.logits.clone().requires_grad_()
            out = grpo_loss(
                logits,
                x.token_ids,
                **x.loss_arguments(),
                objective=objective,
                overwrite_logits=overwrite,
            )
            out.loss.backward()
            results += [out.loss, logits.grad]
    logits = x.logits.clone().requires_grad_()
    score = token_logprob(logits, x.token_ids, temperature=0.7, mask=x.mask, with_entropy=True)
    (score.logprob.sum() + score.entropy.sum()).backward()
    results += [score.logprob, logits.grad]
    hidden = torch.randn(3, 5, 16, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 16, device=device, dtype=dtype, requires_grad=True)
    out = linear_grpo_loss(hidden, head, x.token_ids, **x.loss_arguments())
    (2.0 * out.loss).backward()  # an upstream gradient that has to be multiplied in
    return [*results, out.loss, hidden.grad, head.grad, kl_estimate(x.old_logprob, x.ref_logprob)]


def advantages(device: str) -> list[torch.Tensor]:
    """Groups of one size, ragged groups, several rewards, and rewards of steps."""
    reward = torch.randint(0, 3, (24,), device=device).float()
    ragged = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 7, 13, 3])).to(device)
    end = torch.tensor([1, 4, 2], device=device)
    of = torch.tensor([0, 0, 1], device=device)
    return [
        group_advantage(reward, group_size=8).advantage,
        group_advantage(reward, group_ids=ragged, baseline="leave_one_out").advantage,
        group_advantage(reward.view(8, 3), group_size=4, scale="batch").advantage,
        process_advantage(reward[:3], end, of, group_size=2, length=5, num_sequences=2),
    ]


def main() -> int:
    """Run everything; print one line."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    torch.manual_seed(0)
    results = advantages(device)
    # 77: one masked tail; 2053: whole tiles and an unaligned tail.
    for vocabulary, dtype in ((77, torch.float32), (2053, torch.bfloat16)):
        results += losses(device, vocabulary if device == "cuda" else 33, dtype)
    bad = sum(not bool(result.isfinite().all()) for result in results)
    print(f"driver: {len(results)} results, {bad} not finite")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
