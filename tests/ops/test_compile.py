"""Failure catalogue N33 and N39: opcheck, fullgraph and dynamic compilation, one compile for all numbers, fakes."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo import (
    Objective,
    group_advantage,
    grpo_loss,
    kl_estimate,
    policy_loss,
    token_logprob,
)
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import OBJECTIVES, bitwise_equal
from tests.ops.samples import op_samples

SAMPLES = op_samples()
OPS = sorted(SAMPLES)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_op_has_samples():
    """A new op must be reached by `samples.py`, or none of the checks below sees it."""
    prefix = "fastgrpo::"
    names = {
        name.removeprefix(prefix)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    }
    assert names - {"linear_grpo_loss", "linear_token_logprob"} == set(OPS)


# One sample of each op through all four utilities; the others below through the cheaper three.
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = getattr(torch.ops.fastgrpo, name).default
    for k, args in enumerate(SAMPLES[name]):
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if k == 0:
            utilities.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, copy.deepcopy(args), test_utils=utilities)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fake_outputs_have_the_shape_dtype_and_strides_of_real_ones(dtype):
    for name, calls in op_samples(dtype).items():
        op = getattr(torch.ops.fastgrpo, name).default
        for args in calls:
            real = op(*copy.deepcopy(args))
            with FakeTensorMode() as mode:
                fake_args = [
                    mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args
                ]
                fake = op(*fake_args)
            if real is None:
                assert fake is None
                continue
            as_tuple = real if isinstance(real, tuple) else (real,)
            fakes = fake if isinstance(fake, tuple) else (fake,)
            for position, (r, f) in enumerate(zip(as_tuple, fakes, strict=True)):
                actual = (r.shape, r.dtype, r.stride(), r.device)
                assert actual == (f.shape, f.dtype, f.stride(), f.device), (
                    f"{name} output {position}"
                )


DATA = make_inputs(3, 4, 23, seed=33)
SIDES = {"old_logprob": DATA.old_logprob, "ref_logprob": DATA.ref_logprob}
PER_ROW = torch.linspace(0.5, 2.0, 12).view(3, 4)
CU_SEQLENS = torch.tensor([0, 4, 8, 12], dtype=torch.int32)


def token_logprob_step(logits):
    out = token_logprob(
        logits, DATA.token_ids, temperature=PER_ROW, mask=DATA.mask, with_entropy=True
    )
    return (out.logprob + 0.1 * out.entropy).sum()


def softcap_step(logits):
    return token_logprob(logits, DATA.token_ids, logit_softcap=5.0, logit_scale=0.7).logprob.sum()


def two_step(logits):
    out = token_logprob(logits, DATA.token_ids, mask=DATA.mask, with_entropy=True)
    loss = policy_loss(
        out.logprob,
        DATA.advantage,
        DATA.mask,
        entropy=out.entropy,
        objective=OBJECTIVES["entropy_bonus"],
        **SIDES,
    )
    return loss.loss


def one_pass_step(logits):
    args = (logits * 1.5, DATA.token_ids, DATA.advantage, DATA.mask)
    return grpo_loss(*args, objective=OBJECTIVES["grpo_kl"], **SIDES).loss


def packed_step(logits):
    return grpo_loss(
        logits.flatten(0, 1), DATA.token_ids.flatten(), DATA.advantage, DATA.mask.flatten(), cu_seqlens=CU_SEQLENS,
        objective=OBJECTIVES["gspo"], normalizer=5.0,
    ).loss  # fmt: skip


def overwriting_step(logits):
    return grpo_loss(logits, DATA.token_ids, DATA.advantage, DATA.mask, overwrite_logits=True).loss


def overwriting_logprob_step(logits):
    return token_logprob(logits * 1.0, DATA.token_ids, overwrite_logits=True).logprob.sum()


def kl_and_advantage_step(logits):
    advantage = group_advantage(logits[:, 0, 0], group_size=3).advantage
    return kl_estimate(logits[..., 0], DATA.ref_logprob).sum() + advantage.square().sum()


STEPS = [
    token_logprob_step,
    softcap_step,
    two_step,
    one_pass_step,
    packed_step,
    overwriting_step,
    overwriting_logprob_step,
    kl_and_advantage_step,
]


def run(step, **options):
    logits = DATA.logits.clone().requires_grad_()
    function = torch.compile(step, fullgraph=True, **options) if options else step
    loss = function(logits)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_N33_fullgraph_equals_eager(step):
    compiled, eager = run(step, dynamic=True, backend="aot_eager"), run(step)
    assert bitwise_equal(compiled[0], eager[0])
    assert bitwise_equal(compiled[1], eager[1])


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_N33_inductor_equals_eager(step):
    compiled, eager = run(step, dynamic=True, backend="inductor"), run(step)
    assert_matches_reference(compiled[0], eager[0].double(), atol=1e-7)
    assert_matches_reference(compiled[1], eager[1].double(), atol=1e-7)


def test_N33_inductor_compiles_a_training_step():
    """The real compiler once: the code around the ops is fused, the ops stay whole."""
    compiled, eager = run(two_step, dynamic=True, backend="inductor"), run(two_step)
    assert_matches_reference(compiled[0], eager[0].double(), atol=1e-7)
    assert_matches_reference(compiled[1], eager[1].double(), atol=1e-7)


def count_compiles(step, calls):
    """Number of graphs that Dynamo makes for these calls, each compared with eager."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for args in calls:
        torch.testing.assert_close(compiled(*args), step(*args), rtol=0, atol=0)
    return counter.frame_count


def test_N33_one_hundred_values_of_every_number():
    """No number is part of a graph: thresholds, beta, temperature, normaliser, scale, softcap change at every call."""

    def step(logits, temperature, softcap, normalizer, objective):
        out = grpo_loss(
            logits, DATA.token_ids, DATA.advantage, DATA.mask, temperature=temperature, logit_softcap=softcap,
            logit_scale=temperature / 2, normalizer=normalizer, objective=objective, **SIDES,
        )  # fmt: skip
        two = token_logprob(logits, DATA.token_ids, temperature=temperature)
        return (
            out.loss
            + policy_loss(two.logprob, DATA.advantage, DATA.mask, objective=objective, **SIDES).loss
        )

    calls = [
        (
            DATA.logits,
            0.5 + k / 50,
            20.0 + k,
            7.5 + k,
            Objective.grpo(
                epsilon=0.1 + k / 500,
                epsilon_high=0.2 + k / 300,
                delta=2.0 + k,
                beta=0.01 * (k + 1),
            ),
        )
        for k in range(100)
    ]
    assert count_compiles(step, calls) <= 2


def test_N33_dynamic_batch_and_length():
    def step(logits, ids, advantage, mask, old):
        return grpo_loss(logits, ids, advantage, mask, old_logprob=old).loss

    calls = []
    for batch, length in ((2, 3), (4, 7), (5, 2), (3, 9), (8, 8), (6, 5)):
        data = make_inputs(batch, length, 17, seed=batch)
        calls.append((data.logits, data.token_ids, data.advantage, data.mask, data.old_logprob))
    assert count_compiles(step, calls) <= 2


def test_N33_lengths_of_dr_grpo_and_estimates():
    def step(logprob, ref, clamp, objective):
        kl = kl_estimate(logprob, ref, clamp_in=clamp)
        return kl.sum() + policy_loss(logprob, DATA.advantage, DATA.mask, objective=objective).loss

    calls = [
        (DATA.old_logprob, DATA.ref_logprob, 10.0 + k, Objective.dr_grpo(100 + k))
        for k in range(30)
    ]
    assert count_compiles(step, calls) <= 2


def test_N39_meta_tensors_give_meta_results():
    meta = DATA.logits.to("meta").requires_grad_()
    sides = {name: value.to("meta") for name, value in SIDES.items()}
    ids, advantage, mask = (x.to("meta") for x in (DATA.token_ids, DATA.advantage, DATA.mask))
    out = grpo_loss(meta, ids, advantage, mask, **sides)
    assert out.loss.device.type == "meta"
    assert out.logprob.shape == (3, 4)
    two = token_logprob(meta, ids, with_entropy=True)
    two.logprob.sum().backward()
    assert meta.grad.shape == DATA.logits.shape


def test_N39_fake_tensors_go_through_the_public_functions():
    """What torch.export and memory estimators do: run the training step without data."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(DATA.logits).requires_grad_()
        args = [mode.from_tensor(x) for x in (DATA.token_ids, DATA.advantage, DATA.mask.long())]
        out = grpo_loss(fake, *args, normalizer=3.0)
        out.loss.backward()
        assert fake.grad.shape == DATA.logits.shape
        packed = policy_loss(
            fake.flatten(0, 1)[:, 0],
            args[1],
            args[2].flatten(),
            cu_seqlens=mode.from_tensor(CU_SEQLENS),
        )
        assert packed.token_loss.shape == (12,)
