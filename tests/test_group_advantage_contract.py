# ruff: noqa: E501
"""group_advantage as a citizen: bad arguments, torch.library, torch.compile, no host sync, no data race."""

import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgrpo
from fastgrpo.advantages import (
    dynamic_sampling_filter,
    gae,
    group_advantage,
    process_advantage,
    whiten,
)
from fastgrpo.functional.groups import group_layout
from fastgrpo.masks import (
    clip_cov_weight,
    fipo_weight,
    kl_cov_weight,
    m2po_weight,
    off_policy_sequence_weight,
    top_entropy_weight,
)
from fastgrpo.ops import group_advantage as ops
from fastgrpo.ops import segment_scan as scan_ops

R = torch.rand(6)
IDS = torch.arange(6)
ROOT = Path(__file__).resolve().parent.parent

BAD: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("list", TypeError, r"reward .*list", lambda: group_advantage([1.0], group_size=1)),
    ("integers", TypeError, r"reward .*int64", lambda: group_advantage(IDS, group_size=2)),
    ("three dims", ValueError, r"reward .*\(1, 2, 3\)", lambda: group_advantage(R.view(1, 2, 3), group_size=1)),
    ("no column", ValueError, r"reward .*\(6, 0\)", lambda: group_advantage(R.new_empty(6, 0), group_size=2)),
    ("infinite", ValueError, r"reward must not be infinite", lambda: group_advantage(R / 0, group_size=2)),
    ("-infinite", ValueError, r"reward must not be infinite", lambda: group_advantage(-R / 0, group_size=2)),
    ("no groups", ValueError, r"group_size and group_ids.*neither", lambda: group_advantage(R)),
    ("both", ValueError, r"group_size and group_ids.*both", lambda: group_advantage(R, group_size=2, group_ids=IDS)),
    ("zero", ValueError, r"group_size must be >= 1, got 0", lambda: group_advantage(R, group_size=0)),
    ("bool", TypeError, r"group_size .*True", lambda: group_advantage(R, group_size=True)),
    ("float", TypeError, r"group_size .*2\.0", lambda: group_advantage(R, group_size=2.0)),
    ("remainder", ValueError, r"6 rows .*group_size=4", lambda: group_advantage(R, group_size=4)),
    ("few ids", ValueError, r"group_ids .*\(6,\).*\(5,\)", lambda: group_advantage(R, group_ids=IDS[:5])),
    ("float ids", TypeError, r"group_ids .*float32", lambda: group_advantage(R, group_ids=R)),
    ("list ids", TypeError, r"group_ids .*list", lambda: group_advantage(R, group_ids=[0] * 6)),
    ("ids device", ValueError, r"group_ids .*device.*meta", lambda: group_advantage(R, group_ids=IDS.to("meta"))),
    ("baseline", ValueError, r"baseline must be one of .*'mean'", lambda: group_advantage(R, group_size=2, baseline="avg")),
    ("baseline shape", ValueError, r"baseline .*\(6,\).*\(3,\)", lambda: group_advantage(R, group_size=2, baseline=R[:3])),
    ("baseline nan", ValueError, r"baseline must be finite", lambda: group_advantage(R, group_size=2, baseline=R / 0)),
    ("scale", ValueError, r"scale must be one of .*'group'", lambda: group_advantage(R, group_size=2, scale=True)),
    ("mixed", ValueError, r"baseline='batch' needs scale", lambda: group_advantage(R, group_size=2, baseline="batch")),
    ("combine", ValueError, r"combine must be one of", lambda: group_advantage(R, group_size=2, combine="mean")),
    ("gdpo", ValueError, r"normalize_then_sum.*'none'", lambda: group_advantage(R, group_size=2, scale="none", combine="normalize_then_sum")),
    ("singleton", ValueError, r"singleton must be one of", lambda: group_advantage(R, group_size=2, singleton="drop")),
    ("eps", ValueError, r"eps must be >= 0.*-1", lambda: group_advantage(R, group_size=2, eps=-1.0)),
    ("eps nan", ValueError, r"eps must be >= 0.*nan", lambda: group_advantage(R, group_size=2, eps=math.nan)),
    ("eps str", TypeError, r"eps must be a number", lambda: group_advantage(R, group_size=2, eps="1e-4")),
    ("ddof", ValueError, r"ddof must be 0 or 1, got 2", lambda: group_advantage(R, group_size=2, ddof=2)),
    ("tie", ValueError, r"tie_tolerance must be < 1", lambda: group_advantage(R, group_size=2, tie_tolerance=1.0)),
    ("weights", ValueError, r"reward_weights .*\(1,\).*\(2,\)", lambda: group_advantage(R, group_size=2, reward_weights=[1, 2])),
    ("weight type", TypeError, r"reward_weights .*str", lambda: group_advantage(R, group_size=2, reward_weights="a")),
    ("weight inf", ValueError, r"reward_weights must be finite", lambda: group_advantage(R, group_size=2, reward_weights=[math.inf])),
    ("weight grad", ValueError, r"reward_weights .*no gradient", lambda: group_advantage(R, group_size=2, reward_weights=torch.ones(1, requires_grad=True))),
    ("lengths", ValueError, r"lengths must be given with", lambda: group_advantage(R, group_size=2, baseline="length_weighted")),
    ("lengths unused", ValueError, r"lengths must be given with", lambda: group_advantage(R, group_size=2, lengths=IDS)),
    ("lengths sign", ValueError, r"lengths must be >= 0", lambda: group_advantage(R, group_size=2, baseline="length_weighted", lengths=-IDS)),
    ("lengths shape", ValueError, r"lengths .*\(6,\).*\(2,\)", lambda: group_advantage(R, group_size=2, baseline="length_weighted", lengths=IDS[:2])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_half_types_are_computed_in_float32() -> None:
    reward = torch.rand(8).bfloat16().requires_grad_()
    out = group_advantage(reward, group_size=4)
    assert out.advantage.dtype == torch.float32
    assert torch.equal(
        out.advantage, group_advantage(reward.detach().float(), group_size=4).advantage
    )
    out.advantage[0].backward()
    assert reward.grad is not None
    assert reward.grad.dtype == torch.bfloat16


def test_kernel_refuses_other_dtypes_by_name() -> None:
    order, offsets, size = group_layout(4, R, "reward", 2, None)
    params = torch.tensor([1e-4, 1.0, 0.0], dtype=torch.float64)
    nothing = torch.empty(0, dtype=torch.float16)
    if torch._C._dispatch_has_kernel_for_dispatch_key("fastgrpo::group_advantage_fwd", "CPU"):
        with pytest.raises(RuntimeError, match="float32 or float64"):
            ops.group_advantage_fwd(
                torch.ones(4, 1).half(),
                nothing,
                nothing,
                order,
                offsets,
                params,
                size,
                [0, 0, 0, 0],
            )


def test_empty_batch() -> None:
    for kwargs in ({"group_size": 4}, {"group_ids": IDS[:0]}):
        reward = torch.empty(0, 2, requires_grad=True)
        for scale in ("group", "batch"):
            out = group_advantage(reward, scale=scale, **kwargs)
            assert out.advantage.shape == (0,)
            assert out.num_active == 0
            out.advantage.sum().backward()


def test_only_advantage_is_differentiable() -> None:
    out = group_advantage(torch.rand(4, requires_grad=True), group_size=2)
    assert out.advantage.requires_grad
    assert not any(field.requires_grad for field in out[1:])
    with torch.no_grad():
        assert not group_advantage(torch.rand(4, requires_grad=True), group_size=2)[0].requires_grad


def test_second_backward_and_double_backward() -> None:
    reward = torch.rand(4, dtype=torch.float64, requires_grad=True)
    out = group_advantage(reward, group_size=4).advantage
    (first,) = torch.autograd.grad(out[0], reward, retain_graph=True)
    (second,) = torch.autograd.grad(out[0], reward, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out[0], reward, create_graph=True)


def test_results_repeat_bit_by_bit() -> None:
    reward, ids = torch.rand(500, 2), torch.randint(0, 40, (500,))
    once = group_advantage(reward, group_ids=ids, scale="batch")
    for _ in range(10):
        again = group_advantage(reward, group_ids=ids, scale="batch")
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_opcheck() -> None:
    params = torch.tensor([1e-4, 1.0, 0.0], dtype=torch.float64)
    for spec, ids in itertools.product(([0, 0, 0, 0], [2, 1, 0, 1], [0, 0, 1, 0]), (True, False)):
        reward = torch.rand(6, 2)
        layout = group_layout(6, reward, "reward", None if ids else 3, IDS // 2 if ids else None)
        length = torch.ones(6) if spec[0] == 2 else reward.new_empty(0)
        given = (reward, torch.ones(2), length, *layout[:2], params, layout[2], spec)
        torch.library.opcheck(torch.ops.fastgrpo.group_advantage_fwd, given)
        out = ops.group_advantage_fwd(*given)
        saved = (torch.ones(6), out[0], out[6], out[7], *given)
        torch.library.opcheck(torch.ops.fastgrpo.group_advantage_bwd, saved)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fastgrpo.segment_scan, (R, R, ends, True))
    assert scan_ops.segment_scan(R, R, ends, False).shape == (6,)


def test_compiles_once_for_all_numbers_and_sizes() -> None:
    """At most 2 graphs over 30 values of eps and batch sizes, without a graph break, with the same bits."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(reward: torch.Tensor, ids: torch.Tensor, eps: float) -> torch.Tensor:
        return group_advantage(reward, group_ids=ids, eps=eps).advantage

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=True)
    for case in range(30):
        reward, ids = torch.rand(10 + case, 2), torch.randint(0, 4, (10 + case,))
        eps = 1e-4 * (1 + case)
        assert torch.equal(compiled(reward, ids, eps), run(reward, ids, eps))
    assert graphs <= 2


def test_no_host_sync() -> None:
    """Fake tensors raise on anything that needs a value, which is what a host sync is."""
    with FakeTensorMode():
        rows, length = 6, 5
        reward = torch.empty(rows)
        ids = torch.empty(rows, dtype=torch.int64)
        out = group_advantage(reward, group_ids=ids)
        group_advantage(reward, group_size=2, scale="batch", reward_weights=[2.0])
        dynamic_sampling_filter(out.is_degenerate)
        process_advantage(reward, ids, ids, group_size=2, num_sequences=rows, length=length)
        tokens = torch.empty(rows, length)
        mask = torch.empty(rows, length, dtype=torch.bool)
        gae(tokens, tokens, mask, gamma=0.9, lam=0.9)
        whiten(tokens, mask)
        flat, flat_mask = tokens.flatten(), mask.flatten()
        ends = torch.empty(3, dtype=torch.int32)
        process_advantage(reward, ids, ids, group_ids=ids[:2], cu_seqlens=ends, length=30)
        gae(flat, flat, flat_mask, bootstrap=reward[:2], cu_seqlens=ends)
        top_entropy_weight(tokens, mask)
        kl_cov_weight(tokens, tokens, mask)
        clip_cov_weight(tokens, tokens, mask)
        m2po_weight(tokens, tokens, mask)
        fipo_weight(tokens, tokens, tokens, mask)
        off_policy_sequence_weight(tokens, tokens, reward, mask, threshold=0.1)


def test_teams_of_threads_do_not_race(tmp_path: Path) -> None:
    """The arithmetic header under ThreadSanitizer, with threads that meet at reductions as lanes of a GPU do."""
    compiler = shutil.which("c++")
    source = ROOT / "tests" / "native" / "advantage_teams.cpp"
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path / "teams"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        [compiler, *flags, str(source), "-o", str(binary)], capture_output=True, text=True
    )
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not start on this kernel")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "88 cases" in run.stdout


def test_strict_checks_keep_good_data_going() -> None:
    with fastgrpo.checks("strict"):
        assert group_advantage(R, group_size=3).num_fault == 0
