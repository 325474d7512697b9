"""The swap itself: contract, restoring, delegation, the head function against TRL's, ZeRO-3, TRL's other trainers."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'")
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import fastgrpo.integrations.trl as door
from tests.integrations import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save_model(kind, folder) for kind in ("qwen2", "llama")}


@pytest.fixture(autouse=True)
def _trl_is_left_as_it_was():
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    yield
    door.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


# The symbol ----------------------------------------------------------------------------------------------------------


def test_enable_disable_and_nesting():
    assert not door.is_enabled()
    door.enable()
    door.enable()
    assert door.is_enabled()
    with door.use_fastgrpo():
        assert door.is_enabled()
    assert door.is_enabled(), "the block must restore what was there before it"
    door.disable()
    door.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match="inside"), door.use_fastgrpo():
        raise RuntimeError("inside")
    assert not door.is_enabled()


def test_unknown_signature_is_refused_with_the_version(monkeypatch):
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, inv_temperature):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(ImportError, match=r"takes .*'inv_temperature'.*trl .* is installed"):
        door.enable()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match="does not exist"):
        door.enable()


# The function --------------------------------------------------------------------------------------------------------


def head(
    rows: int = 13, hidden: int = 8, vocabulary: int = 37, dtype=torch.float32, bias: bool = True
):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
    ids = torch.randint(0, vocabulary, (rows,), generator=g)
    return make(rows, hidden), make(vocabulary, hidden), make(vocabulary) if bias else None, ids


def run_head(function, hidden, weight, bias, ids, scaling, outputs, upstream) -> tuple:
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    scores = function.apply(hidden, weight, bias, ids, *scaling, outputs)
    total = sum((s * u).sum() for s, u in zip(scores[:2], upstream, strict=True) if s is not None)
    return scores, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy")], ids=["plain", "entropy"]
)
@pytest.mark.parametrize(
    "scaling", [(1.0, 64, None, 1.0), (0.7, 8, 3.0, 1.5)], ids=["unscaled", "softcap"]
)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_head_function_equals_trl(dtype, autocast, scaling, outputs):
    """Values, gradients and dtypes. TRL rounds half-precision logits, ours may not: half an ulp of |x| = 16."""
    hidden, weight, bias, ids = head(dtype=dtype, bias=dtype == torch.float32)
    upstream = torch.randn(2, 13)
    results = []
    for function in (ChunkedLogProbFunction, door.FastLogProbFunction):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results.append(
                run_head(function, hidden, weight, bias, ids, scaling, outputs, upstream)
            )
    (theirs, their_grads), (ours, our_grads) = results
    half = autocast is not None or dtype == torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 16 * 2.0**-8} if half else {"rtol": 1e-5, "atol": 1e-5}
    assert [x is None for x in ours] == [x is None for x in theirs]
    if half:  # rounded logits tie, and argmax of a tie is anybody's
        ours, theirs = ours[:4], theirs[:4]
    for a, b in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **tolerance)


def test_frozen_head_and_no_rows():
    hidden, weight, bias, ids = head()
    frozen = weight.detach()
    logprob, *_ = door.FastLogProbFunction.apply(hidden, frozen, None, ids, 1.0, 64)
    logprob.sum().backward()
    assert hidden.grad is not None
    assert frozen.grad is None
    empty, entropy, *_ = door.FastLogProbFunction.apply(
        hidden[:0], weight, bias, ids[:0], 1.0, 64, None, 1.0, ("log_probs", "entropy")
    )
    assert empty.shape == entropy.shape == (0,)
    empty.sum().backward()
    assert float(weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("changed", ["an output of tomorrow", "scale"])
def test_what_the_head_lacks_goes_to_trl(changed):
    hidden, weight, bias, ids = head()
    scale = 0.0 if changed == "scale" else 1.0
    outputs = ("log_probs",) if changed == "scale" else ("log_probs", changed)
    door.enable()
    before = door.report()
    ours = utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, 1.0, 64, None, scale, outputs
    )
    theirs = ChunkedLogProbFunction.apply(hidden, weight, bias, ids, 1.0, 64, None, scale, outputs)
    assert door.report() == {"fastgrpo": before["fastgrpo"], "trl": before["trl"] + 1}
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_a_weight_sharded_by_zero3_is_gathered_again_in_backward(monkeypatch):
    """DeepSpeed empties the weight after the forward; TRL's context fills it again, in our backward too."""
    hidden, weight, bias, ids = head()
    upstream = torch.randn(2, 13)
    scaling, outputs = (0.7, 64, 3.0, 1.5), ("log_probs", "entropy")
    _, wanted = run_head(
        ChunkedLogProbFunction, hidden, weight, bias, ids, scaling, outputs, upstream
    )
    full, gathered = weight.data.clone(), []
    sharded = torch.nn.Parameter(full.clone())
    sharded.ds_status = "NOT_AVAILABLE"

    @contextmanager
    def gather(*parameters):
        gathered.append(len(parameters))
        sharded.data = full.clone()
        yield
        sharded.data = torch.zeros_like(full)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    with gather(sharded):
        scores = door.FastLogProbFunction.apply(hidden, sharded, bias, ids, *scaling, outputs)
    total = sum((s * u).sum() for s, u in zip(scores[:2], upstream, strict=True))
    grads = torch.autograd.grad(total, (hidden, sharded, bias))
    assert len(gathered) == 2
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_the_batchs_are_left_to_the_plain_head():
    """Prompt-learning PEFT lengthens the sequences: the request does not fit, and nothing is guessed."""
    from fastgrpo import Objective
    from fastgrpo.integrations.trl_loss import LossRequest

    mask = torch.tensor([[True, True, False], [True, False, False]])
    request = LossRequest(
        objective=Objective.grpo(), normalizer=1.0, mask=mask, scored=mask, width=4,
        advantage=torch.ones(2), old_logprob=None, ref_logprob=None, rollout_logprob=None, token_weight=None,
    )  # fmt: skip
    hidden, weight, _, ids = head(rows=11)
    scaling = {"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": None, "bias": None}
    assert request.serve(hidden, weight, ids, **scaling) is None
    assert not request.served
    with door.serving(request), door.use_fastgrpo():
        found = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, 64, None, 1.0, ("log_probs", "entropy")
        )
    assert not request.served
    assert found[0].shape == (11,)
    logprob, _ = request.serve(
        hidden[:3], weight, ids[:3], **scaling
    )  # the three scored rows, packed
    assert request.served
    torch.testing.assert_close(logprob, found[0][:3])
