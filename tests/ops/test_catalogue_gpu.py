"""Failure catalogue N34 and N35 on a GPU: graph replays, side streams, other devices, CPU tensors mixed in.

These need hardware and are skipped, saying so, where there is none; everything else in this folder runs anywhere.
"""

import pytest
import torch

from fastgrpo import Objective, grpo_loss, policy_loss, token_logprob
from fastgrpo.testing import make_inputs
from tests.ops.common import PATHS, assert_same_bits, bitwise_equal, score

pytestmark = pytest.mark.gpu
SECOND = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")


def batch(device="cuda", seed=34):
    return make_inputs(4, 33, 5003, torch.bfloat16, device=device, seed=seed)


def run(path, data, **options):
    args = (data.logits, data.token_ids, data.advantage, data.mask)
    sides = {"old_logprob": data.old_logprob, "ref_logprob": data.ref_logprob}
    return score(path, *args, objective=Objective.grpo(beta=0.04), **sides, **options)


@pytest.mark.parametrize("path", PATHS)
def test_N34_graph_replays_follow_the_data(path):
    """One hundred replays on changing inputs give the bits of eager calls."""
    static = batch()
    logits = static.logits.clone().requires_grad_()

    def step():
        logits.grad = None
        args = (static.token_ids, static.advantage, static.mask)
        if path == "one_pass":
            out = grpo_loss(logits, *args, old_logprob=static.old_logprob, normalizer=8.0)
        else:
            scored = token_logprob(logits, args[0], mask=static.mask)
            out = policy_loss(
                scored.logprob, *args[1:], old_logprob=static.old_logprob, normalizer=8.0
            )
        out.loss.backward()
        return out.loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    gradient = logits.grad
    for seed in range(100):
        fresh = batch(seed=seed)
        with torch.no_grad():
            logits.copy_(fresh.logits)
            for name in ("token_ids", "advantage", "mask", "old_logprob"):
                getattr(static, name).copy_(getattr(fresh, name))
        graph.replay()
        replayed = captured.clone(), gradient.clone()
        assert bitwise_equal(replayed[0], step().detach())
        assert bitwise_equal(replayed[1], logits.grad)


@pytest.mark.parametrize("path", PATHS)
def test_N34_side_stream(path):
    data = batch()
    expected = run(path, data)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run(path, data)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(actual, expected)


@SECOND
@pytest.mark.parametrize("path", PATHS)
def test_N34_tensors_on_a_device_that_is_not_current(path):
    expected = run(path, batch("cuda:0"))
    with torch.cuda.device(0):
        actual = run(path, batch("cuda:1"))
    for name, value in actual.tensors().items():
        assert value.device.index == 1
        assert bitwise_equal(value.to("cuda:0"), expected.tensors()[name]), name


@SECOND
def test_N34_two_devices_mixed():
    data = batch("cuda:0")
    with pytest.raises(ValueError, match=r"token_ids must be on the device of logits \(cuda:0\)"):
        token_logprob(data.logits, data.token_ids.to("cuda:1"))


@pytest.mark.parametrize("name", ["token_ids", "mask", "advantage", "old_logprob", "ref_logprob"])
def test_N34_cpu_tensor_mixed_in(name):
    data = batch()
    arguments = {"token_ids": data.token_ids, **data.loss_arguments()}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(
        ValueError, match=rf"{name} must be on the device of .*\(cuda:0\), got .* on cpu"
    ):
        grpo_loss(data.logits, **arguments)


@pytest.mark.parametrize("path", PATHS)
def test_N35_one_hundred_runs_in_deterministic_mode(path):
    data = batch()
    expected = run(path, data)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(100):
            assert_same_bits(run(path, data), expected)
    finally:
        torch.use_deterministic_algorithms(False)
