"""Times the launch table's alternatives, to refresh `fastgrpo/kernels/launch.py`: the table is checked in, never tuned
at run time.

python -m benchmarks.gpu.tune OUT/tune.jsonl
"""

import sys
from itertools import product
from pathlib import Path

import torch

from benchmarks.gpu.common import DEVICE, DRY, TOKENS, VOCABULARY, Results, milliseconds, normal
from fastgrpo import grpo_loss, token_logprob
from fastgrpo.kernels import grpo_loss as one_pass_module
from fastgrpo.kernels import token_logprob as logprob_module
from fastgrpo.kernels.launch import RowConfig, row_config
from fastgrpo.testing import make_inputs

# In order of value: the largest common vocabularies first, so that a stage cut short has what matters.
VOCABULARIES = (VOCABULARY,) if DRY else (151_936, 32_000, 128_256)
CONFIGS = [RowConfig(w, l, 64) for w, l in product((4, 8, 16, 32), (2, 4))]
EXTRA = [RowConfig(16, 2, 128), RowConfig(8, 8, 96), RowConfig(4, 8, 96)]


def main() -> int:
    """Time forward, backward and one pass per vocabulary, dtype and configuration; say which is best."""
    results = Results(Path(sys.argv[1]))
    options = CONFIGS[:1] if DRY else CONFIGS + EXTRA
    dtypes = (torch.bfloat16,) if DRY else (torch.bfloat16, torch.float32)
    for vocabulary, dtype in product(VOCABULARIES, dtypes):
        rows = TOKENS if dtype == torch.bfloat16 else TOKENS // 2
        logits = normal(1, rows, vocabulary, dtype=dtype, scale=3.0)
        x = make_inputs(1, rows, 64, dtype, device=DEVICE)
        now = {
            "forward": row_config(logits[0], False),
            "backward": row_config(logits[0], False),
            "one pass": row_config(logits[0], False, one_pass=True),
        }
        for name, current in now.items():
            timed = {}
            for config in dict.fromkeys([current, *options]):
                ms = _time(name, logits, x, config)
                timed[config] = ms
                results.add(
                    what=name, vocabulary=vocabulary, dtype=str(dtype), config=str(config), ms=ms,
                    in_table=config == current,
                )  # fmt: skip
            best = min(timed, key=timed.__getitem__)
            gain = timed[current] / timed[best]
            results.add(
                what=name, vocabulary=vocabulary, dtype=str(dtype), best=str(best), gain=gain
            )
    return 0


def _time(name: str, logits: torch.Tensor, x: object, config: RowConfig) -> float:
    def chosen(*_args: object, **_options: object) -> RowConfig:
        return config

    before = logprob_module.row_config, one_pass_module.row_config
    logprob_module.row_config = one_pass_module.row_config = chosen  # type: ignore[assignment]
    ids, sides = x.token_ids, x.loss_arguments()  # type: ignore[attr-defined]
    try:
        if name == "forward":
            return milliseconds(lambda: token_logprob(logits, ids, with_entropy=True), None, 0.15)
        if name == "backward":
            leaf = logits.detach().requires_grad_()
            score = token_logprob(leaf, ids).logprob.sum()
            backward = lambda: torch.autograd.grad(score, leaf, retain_graph=True)  # noqa: E731
            return milliseconds(backward, None, 0.15)

        def loss() -> None:
            leaf = logits.detach().requires_grad_()
            grpo_loss(leaf, ids, **sides, overwrite_logits=True).loss.backward()

        return milliseconds(loss, None, 0.15)
    finally:
        logprob_module.row_config, one_pass_module.row_config = before


if __name__ == "__main__":
    sys.exit(main())
