"""What a run says while it works: not too often, in plain words, and each thing once."""

from collections import deque
from dataclasses import replace

import pytest

from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.output import display
from fastgrpo.trainer.output.diagnostics import FINDINGS, Diagnostics

CALM = {
    "loss": 0.2,
    "grad_norm": 0.5,
    "frac_groups_all_best": 0.1,
    "frac_groups_all_worst": 0.1,
    "completions/clipped_ratio": 0.0,
    "kl": 0.01,
    "kl/max": 0.2,
    "sampling/sampling_logp_difference/mean": 1e-7,
    "fault": 0.0,
}


def test_plain_lines_come_at_most_once_a_second_and_the_last_always(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    plain = display.PlainDisplay()
    plain.phase("grpo", 30)
    for done in range(1, 31):
        now[0] += 0.3
        plain.advance(done, "x")
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[1].split("/")[0]) for line in lines]
    assert counts[0] == 1
    assert counts[-1] == 30
    assert 7 <= len(counts) <= 10  # 9 seconds
    assert lines[0].endswith("eta 0:08")


def test_a_step_is_shown_with_the_numbers_it_has(capsys):
    plain = display.PlainDisplay()
    plain.phase("grpo", 1)
    plain.advance(1, numbers={"reward": 0.5, "frac_reward_zero_std": 0.25, "step_time": 1.234})
    assert "reward 0.500  equal groups 25%  s/step 1.23" in capsys.readouterr().out


def test_live_table_draws_the_last_rows_and_bar():
    from rich.console import Console

    console = Console(force_terminal=True, width=110, record=True)
    live = display.LiveDisplay(console)
    live.phase("grpo", 20)
    for done in range(1, 13):
        live.advance(done, numbers={"reward": done / 12, "step_time": 0.1})
    live.note("a [note] with brackets")
    live.close()
    text = console.export_text()
    assert "a [note] with brackets" in text
    assert "reward" in text
    assert "12" in text


@pytest.mark.parametrize(
    ("values", "bars"),
    [([0.0, 0.5, 1.0], "▁▅█"), ([], ""), ([2.0, 4.0], "▅█"), ([-1.0, 1.0], "▁█")],
)
def test_sparkline(values, bars):
    assert display.sparkline(deque(values)) == bars


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": 1e-9}, "about 0 by construction"),
        ({"frac_groups_all_best": 0.71}, "71% of groups are all correct"),
        ({"frac_groups_all_worst": 0.8}, "80% of groups have no correct completion"),
        ({"completions/clipped_ratio": 0.35}, "35% of completions were cut at 40 tokens"),
        ({"kl": 1.5, "kl/max": 80.0}, "KL to the reference is 1.50 (largest token 80.0)"),
        ({"sampling/sampling_logp_difference/mean": 0.3}, "disagree on log-probabilities by 0.300"),
        ({"fault": 3.0}, "3 tokens gave"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_advice_is_given_once_and_only_where_it_applies(changes, words):
    diagnostics = Diagnostics(default_config("story"))
    assert diagnostics.advice(CALM) == []
    (text,) = diagnostics.advice(CALM | changes)
    assert words in text
    assert diagnostics.advice(CALM | changes) == []


def test_a_mismatch_with_vllm_has_a_remedy():
    config = replace(
        default_config("story"), sampler="vllm", vllm_server_base_url="http://127.0.0.1:1"
    )
    apart = CALM | {"sampling/sampling_logp_difference/mean": 0.02}
    (text,) = Diagnostics(config).advice(apart)
    assert "--vllm-importance-sampling-correction makes up for it" in text
    corrected = replace(config, vllm_importance_sampling_correction=True)
    assert Diagnostics(corrected).advice(apart) == []


def test_a_loss_of_0_needs_no_excuse_off_policy_or_without_gradient():
    still = CALM | {"loss": 0.0, "grad_norm": 0.0}
    assert Diagnostics(default_config("story")).advice(still) == []
    off_policy = replace(default_config("story"), num_iterations=2)
    assert Diagnostics(off_policy).advice(CALM | {"loss": 0.0}) == []


def test_advice_survives_metrics_that_are_not_there():
    bare = {k: v for k, v in CALM.items() if not k.startswith(("kl", "sampling", "fault"))}
    assert Diagnostics(default_config("copy")).advice(bare) == []
    assert len(FINDINGS) == 8
