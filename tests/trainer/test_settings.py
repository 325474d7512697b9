"""Options: names, types, files and ranges are checked, and an error says what was meant."""

from dataclasses import fields

import pytest

from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.settings import (
    SettingsError,
    describe,
    parse_train,
    read_yaml,
    to_yaml,
)


def test_the_job_is_the_first_word_and_story_without_one():
    assert parse_train([]).job == "story"
    assert parse_train(["copy", "--seed", "3"]).seed == 3
    assert parse_train(["copy"]).sft_steps == 0


def test_flags_beat_the_file_and_the_file_beats_the_job(tmp_path):
    path = tmp_path / "c.yaml"
    # PyYAML reads 2e-4 as text; as an option it is a number all the same.
    path.write_text(
        "job: copy\nlearning_rate: 2e-4\nseed: 5\noverwrite: true\nreport: false\nepsilon: null\n"
    )
    config = parse_train(["--config", str(path), "--seed=6"])
    assert (config.job, config.learning_rate, config.seed) == ("copy", 2e-4, 6)
    assert (config.overwrite, config.report, config.epsilon) == (True, False, None)
    assert config.max_completion_length == 4
    assert parse_train(["story", "--config", str(path)]).job == "story"


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = parse_train(["copy", "--beta", "0.1", "--ref-sync-steps", "3", "--no-report"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse_train(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "no option 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("num_generation: 1", "Did you mean 'num_generations'?"),
        ("- a", "expected `option: value` lines, got list"),
        ("seed: [1, 2]", "seed must be a single value, got [1, 2]"),
        ("seed: {", "config file"),
        (
            "job: stori",
            "no job 'stori'. Did you mean 'story'? Jobs: story, copy, gsm8k-equations, gsm8k, custom",
        ),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        parse_train(["--config", str(path)])
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(SettingsError, match="--config needs a value"):
        parse_train(["--config"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning-rate", "1"], "no option '--lerning-rate'. Did you mean '--learning-rate'?"),
        (["copy"], "no option 'copy'"),
        (["--max-steps", "x"], "--max-steps must be a whole number, got 'x'"),
        (["--beta", "x"], "--beta must be a number, got 'x'"),
        (["--seed"], "--seed needs a value"),
        (["--supervision", "x"], "--supervision must be one of 'outcome', 'process', got 'x'"),
        (["--objective", "grp"], "--objective must be one of 'grpo', 'dr_grpo', 'dapo'"),
        (["--num-generations", "1"], "--num-generations must be at least 2: a completion is compared"),
        (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--beta", "-1"], "--beta must be at least 0, got -1.0"),
        (["--epsilon", "3"], "--epsilon must be below 1, got 3.0"),
        (["--epsilon", "nan"], "--epsilon must be at least 0, got nan"),
        (["--objective=cispo", "--epsilon=0.2"], "--epsilon does not belong to --objective cispo"),
        (["--steps-per-generation=17"], "--steps-per-generation must be at most 16 (--prompts-per-step)"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_explained_in_one_line(flags, message, capsys):
    with pytest.raises(SettingsError) as error:
        parse_train(["story", *flags])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("(fastgrpo train story --help)")
    assert capsys.readouterr() == ("", "")


def test_every_option_has_help_and_there_are_not_too_many(capsys):
    assert len(fields(TrainConfig)) <= 75
    with pytest.raises(SystemExit) as stop:
        parse_train(["story", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    for field in fields(TrainConfig):
        if field.name != "job":
            assert f"--{field.name.replace('_', '-')}" in shown


def test_help_shows_the_defaults_of_the_job_and_says_that_they_differ(capsys):
    with pytest.raises(SystemExit):
        parse_train(["copy", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert (
        "Defaults differ by job; those below are copy's. Other jobs: story, gsm8k-equations"
        in shown
    )
    assert "each samples fresh completions once. (default: 200)" in shown  # story has 50


def test_the_printed_config_marks_what_differs():
    text = describe(parse_train(["story", "--seed", "4"]))
    assert "*seed=4" in text
    assert " beta=0.04" in text
    assert max(map(len, text.splitlines())) <= 110
