"""Failure catalogue N13: rows more than 2^31 elements apart, more rows than a grid axis holds, rows that are one row.

A sparse file holds the logits: gigabytes of addresses, kilobytes on disk. A 32-bit offset would read another place of
the file (zeros) or outside of it.
"""

import os

import pytest
import torch

from fastgrpo import grpo_loss, token_logprob
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import plain_logprob, reference_score, score
from tests.ops.tolerance import Tolerance, assert_scored

VOCABULARY = 1000
STRIDE = (
    1_200_000_000  # row 2 begins at element 2.4e9 > 2^31; in bytes row 1 is beyond 2^31 already
)


def sparse_rows(path, dtype):
    """Logits [3, V] with rows 1.2e9 elements apart, backed by a sparse file."""
    elements = 2 * STRIDE + VOCABULARY
    with open(path, "wb") as file:
        try:
            file.truncate(elements * dtype.itemsize)
        except OSError as error:  # a file system without sparse files, or a quota
            pytest.skip(f"no room for a sparse file: {error}")
    memory = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
    rows = memory.as_strided((3, VOCABULARY), (STRIDE, 1))
    rows.copy_(torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
def test_N13_rows_far_apart(tmp_path, dtype, overwrite):
    far = sparse_rows(tmp_path / "logits", dtype)
    near = far.clone()
    ids = torch.tensor([3, 500, 999])
    leaf = far.requires_grad_()
    out = token_logprob(leaf, ids, with_entropy=True, overwrite_logits=overwrite)
    (out.logprob.sum() + out.entropy.sum()).backward()
    plain = near.double().requires_grad_()
    logprob, entropy = plain_logprob(plain, ids)
    (logprob.sum() + entropy.sum()).backward()
    tol = Tolerance.of(near)
    assert_matches_reference(out.logprob, logprob, atol=tol.logprob)
    assert_matches_reference(out.entropy, entropy, atol=tol.entropy(7.0))
    assert_matches_reference(leaf.grad, plain.grad, atol=tol.dlogits(20.0, dtype))
    assert torch.equal(leaf.detach(), leaf.grad if overwrite else near), (
        "where the gradient was written"
    )
    assert os.stat(tmp_path / "logits").st_blocks * 512 < 1 << 20, (
        "the file stayed sparse: nothing else was written"
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_N13_one_pass_on_rows_far_apart(tmp_path, overwrite):
    far = sparse_rows(tmp_path / "logits", torch.bfloat16)
    near = far.clone()
    ids, mask = torch.tensor([3, 500, 999]), torch.ones(3, dtype=torch.bool)
    options = {"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}
    advantage = torch.tensor([1.0, -2.0])
    expected = reference_score(near, ids, advantage, mask, **options)
    actual = score("one_pass", far, ids, advantage, mask, overwrite_logits=overwrite, **options)
    assert_scored(actual, expected, near, advantage)


# 65,535 is the limit of grid axes 1 and 2 on a GPU, and 2^16 rows overflow any 16-bit count.
@pytest.mark.parametrize("path", ["one_pass", "two_step"])
def test_N13_more_rows_than_a_grid_axis(path):
    data = make_inputs(2, 35_000, 3, seed=2)
    mask = torch.ones(2, 35_000, dtype=torch.bool)
    args = (data.logits, data.token_ids, data.advantage, mask)
    options = {"old_logprob": data.old_logprob}
    actual, expected = score(path, *args, **options), reference_score(*args, **options)
    assert_scored(actual, expected, data.logits, data.advantage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_N13_row_stride_zero(dtype):
    """One row of logits for every token (`expand`): read 1000 times, its gradient summed."""
    row = (torch.randn(1, 501, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    ids = torch.arange(1000) % 501
    leaf = row.clone().requires_grad_()
    token_logprob(leaf.expand(1000, 501), ids).logprob.sum().backward()
    plain = row.double().requires_grad_()
    plain_logprob(plain.expand(1000, 501), ids)[0].sum().backward()
    # autograd sums 1000 gradients in the dtype of the logits
    rounding = 1000 * torch.finfo(dtype).eps
    assert_matches_reference(leaf.grad, plain.grad, atol=rounding, rtol=rounding)
    view = leaf.detach().expand(2, 500, 501).requires_grad_()
    mask = torch.ones(2, 500, dtype=torch.bool)
    grpo_loss(view, ids.view(2, 500), torch.ones(2), mask).loss.backward()
    each = torch.softmax(row.double(), -1) - torch.nn.functional.one_hot(ids, 501)
    assert_matches_reference(view.grad.view(1000, 501), each / 1000, atol=1e-8)
