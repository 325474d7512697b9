"""An algorithm learns from rewards alone; the table of `make learning` hides nothing."""

import json
from dataclasses import replace

import pytest

from benchmarks import learning
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.setup import make_run
from fastgrpo.trainer.train import grpo


def test_ppo_learns_to_copy_from_random_weights():
    """From one token in twenty right to one in three: a value model, its advantages and two updates per batch."""
    config = replace(
        default_config("copy"), objective="ppo", beta=0.01, num_iterations=2, max_steps=45,
        prompts_per_step=16, lr_scheduler_type="constant",
    )  # fmt: skip
    reward = [step.numbers["reward"] for step in grpo(make_run(config))]
    assert sum(reward[:3]) / 3 < 0.1
    assert sum(reward[-5:]) / 5 > 0.3


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Three algorithms, two seeds: one as good as the default, one short of it, one measured by one seed only."""

    def line(variant, seed, score):
        scores = {"base": {"pass@1": 0.3}, "final": {"pass@1": score}}
        facts = {"mean_length": {"final": 26.0}, "cpu_s": 30.0, "variant": variant, "seed": seed}
        return json.dumps(scores | facts) + "\n"

    path = tmp_path / "learning.jsonl"
    rows = [
        ("outcome", 0, 0.98), ("outcome", 1, 0.90), ("ppo", 0, 0.94), ("ppo", 1, 0.87), ("dapo", 0, 0.92),
        ("dapo", 1, 0.8), ("gspo", 1, 0.86),
    ]  # fmt: skip
    path.write_text("".join(line(*row) for row in rows))
    monkeypatch.setattr(learning, "RESULTS", path)
    return path


def test_shortfalls_are_named(results):
    text = learning.report()
    assert learning.shortfalls(learning.read()) == {"dapo": pytest.approx(0.03)}
    assert "| `--objective=dapo` | 86.0 (80.0-92.0) | -8.0 | -10.0 |" in text
    assert "**no: 3.0 too low**" in text
    assert "**Short of the goal: `--objective=dapo`.**" in text
    assert "| `--objective=ppo` | 90.5 (87.0-94.0) | -3.5 | -4.0 | 26.0 | 30 | yes |" in text
    assert "| `--objective=gspo` | 86.0 (seed 1 only) | -4.0 |" in text  # against the same seed
    assert "| `--objective=cispo` | *not measured* |" in text


def test_the_exit_code_says_whether_an_algorithm_falls_short(results, capsys):
    done = ["--only", "outcome", "dapo", "--seeds", "0", "1"]
    assert learning.main(done) == 1
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(line for line in lines if "dapo" not in line))
    assert learning.main(["--only", "outcome", "ppo", "--seeds", "0", "1"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_committed_results_cover_every_algorithm_and_three_seeds():
    measured = {(run["variant"], run["seed"]) for run in learning.read()}
    for variant in learning.VARIANTS:
        seeds = (0,) if variant.endswith("-twice") else (0, 1, 2)
        assert measured >= {(variant, seed) for seed in seeds}
