"""Prints a digest of the results of all objectives and of the refusal of bad arguments: equal under `python -O`."""

import hashlib

import torch

from fastgrpo import grpo_loss
from fastgrpo.testing import make_inputs
from tests.ops.bad_arguments import BAD_HEADS, BAD_MASKS, valid_arguments
from tests.ops.common import LINEAR_PATHS, OBJECTIVES, PATHS, score


def main() -> None:
    """Hash every output bit and every message."""
    digest = hashlib.sha256()
    data = make_inputs(3, 4, 37, seed=1)
    for path in (*PATHS, *LINEAR_PATHS):
        for objective in OBJECTIVES.values():
            out = score(
                path, data.logits, data.token_ids, data.advantage, data.mask, old_logprob=data.old_logprob,
                ref_logprob=data.ref_logprob, rollout_logprob=data.old_logprob, group_size=1, objective=objective,
            )  # fmt: skip
            for value in out.tensors().values():
                digest.update(value.contiguous().numpy().tobytes())
    for bad in (*BAD_HEADS, *BAD_MASKS):
        try:
            grpo_loss(**{**valid_arguments(grpo_loss), bad.name: bad.value})
        except (ValueError, TypeError) as error:
            digest.update(f"{type(error).__name__}: {error}".encode())
        else:
            digest.update(b"accepted")
    print(digest.hexdigest())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
