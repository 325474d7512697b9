"""Weights on a GPU: what a save writes, waiting or in the background, is what they were."""

import pytest
import torch

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.staging import Staging
from fastgrpo.trainer.checkpoint.weights import part_files
from fastgrpo.trainer.parallel.distributed import Ranks
from tests.gpu.common import real_gpu

pytestmark = real_gpu


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_files_hold_what_the_weights_were(background):
    weights = {
        "a": torch.randn(257, 33, device="cuda"),
        "b": torch.randn(5, device="cuda").bfloat16(),
        "c": torch.tensor(3.0, device="cuda"),
        "t": torch.randn(8, 4, device="cuda").T,
    }
    expected = b"".join(tree.Pieces({name: w.cpu() for name, w in weights.items()}))
    staging = Staging()
    for _ in range(2):  # the second time in memory that is there already
        if background:
            files = staging.collect(lambda keep: part_files("model", weights, Ranks(), keep))
            assert all(copy.is_pinned() for copy in staging._buffers.values())
            kept = {name: w.clone() for name, w in weights.items()}
            for w in weights.values():
                w.fill_(7.0)
            [(name, content)] = [(name, b"".join(content)) for name, content in files]
            for key, w in weights.items():
                w.copy_(kept[key])
        else:
            files = part_files("model", weights, Ranks(), lambda name, tensor: tensor)
            [(name, content)] = [(name, b"".join(content)) for name, content in files]
        assert name == "model.safetensors"
        assert content == expected
