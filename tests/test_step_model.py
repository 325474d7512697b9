"""The model of a training step: its arithmetic against counts made by hand, and what it must say."""

import json
from dataclasses import replace

import pytest

from fastgrpo.bench.step_model import (
    MACHINES,
    POLICIES,
    Work,
    backbone_seconds,
    collective_seconds,
    estimate,
    head_seconds,
    main,
    shard_size,
)

H200 = MACHINES[0]
SMALL, MIDDLE, _, LARGE = POLICIES


def test_three_products_of_the_head_take_what_was_counted_by_hand():
    """8192 tokens, V = 151,936, H = 1536: 6NVH = 11.5 TFLOP at 0.9 * 790 TFLOP/s is 16.1 ms, and 3 units 1.7 ms."""
    work = Work(completions=8, completion_tokens=1024, active=1.0)
    assert head_seconds(SMALL, H200, work) == pytest.approx(0.0161 + 0.0017, rel=0.02)


def test_fused_head_saves_products_and_skipping_saves_more():
    dense = Work(active=1.0)
    times = [
        head_seconds(MIDDLE, H200, replace(dense, head=head)) for head in ("fused", "recompute")
    ]
    assert 1.25 < times[1] / times[0] < 1.4  # 4 products instead of 3
    assert head_seconds(MIDDLE, H200, Work(active=0.4)) < 0.65 * times[0]  # 1.8 of 3 products


def test_backbone_is_six_flop_per_parameter_and_token():
    work = Work(prompt_tokens=0, completion_tokens=1, completions=1000, mfu=1.0)
    seconds = backbone_seconds(SMALL, H200, work, 3)
    assert seconds == pytest.approx(
        6 * (SMALL.parameters - SMALL.head) * 1000 / H200.flops, rel=1e-4
    )


def test_one_gpu_sends_nothing_and_large_states_spread_over_nodes():
    assert collective_seconds(SMALL, H200, Work(), 1, 1) == 0
    assert shard_size(SMALL, H200, 1024) == 8
    assert shard_size(LARGE, H200, 1024) == 1024
    assert not estimate(LARGE, H200, Work(), 8).fits
    assert estimate(LARGE, H200, Work(), 64).fits


def test_slow_links_show_when_little_hides_them():
    work = Work(completions=4, completion_tokens=128, overlap=0.0)
    alone, many = (estimate(LARGE, H200, work, n).seconds["collectives"] for n in (1, 1024))
    assert alone == 0
    # 2 gathers and a float32 reduce-scatter of 70.6e9 parameters, less one gather of the head, over 40 GB/s.
    by_hand = (8 * LARGE.parameters - 2 * LARGE.head) / 40e9
    assert many == pytest.approx(by_hand, rel=0.01)


def test_command_prints_assumptions_and_json(capsys):
    assert main(["--model", "qwen2.5-7b", "--gpus", "1,64"]) == 0
    text = capsys.readouterr().out
    assert "not a measurement" in text
    assert "mfu 0.5" in text
    assert main(["--model", "llama-3-70b", "--gpus", "1", "--json", "--active", "0.2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["work"]["active"] == 0.2
    assert row["fits"] is False
    assert main(["--model", "llama-3-70b", "--gpus", "1"]) == 0
    assert "does not fit" in capsys.readouterr().out
