"""`fastgrpo reward test`: what it says about good, broken and exploitable rewards."""

import json

import pytest

from fastgrpo import cli

FUNCTIONS = """
import random, time

def exact(completions, answer, **kwargs):
    return [float(text.endswith(gold)) for text, gold in zip(completions, answer)]

def shortest(completions, **kwargs):
    return [-float(len(text)) for text in completions]

def constant(completions, **kwargs):
    return [1.0 for _ in completions]

def dice(completions, **kwargs):
    return [random.random() for _ in completions]

def nan(completions, **kwargs):
    return [float("nan"), 1.0, 0.0]

def level(completions, level):
    return [0.0 for _ in completions]

def slow(completions, **kwargs):
    time.sleep(100)
"""
ROWS = [
    {"question": "2+2?", "completion": "it is 4", "answer": "4"},
    {"question": "2+3?", "completion": "it is 6", "answer": "5"},
    {"question": "1+1?", "completion": "so we have 2", "answer": "2"},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("exact", 0, "min 0.000  mean 0.667  max 1.000"),
        ("shortest", 1, "NOTE  an empty completion earns more than your samples (0.000 > -8.667)"),
        ("constant", 1, "NOTE  all values are 1: equal rewards teach nothing"),
        ("dice", 1, "NOTE  the same completions got other values the second time"),
        ("nan", 1, "NOTE  some values are NaN: return None"),
        (
            "level",
            1,
            "FAULT  reward level failed: it wants level, and what there is is answer, completion",
        ),
        ("slow", 1, "FAULT  reward slow took longer than 1 s"),
    ],
)
def test_verdicts(name, code, words, capsys):
    assert (
        cli.main(["reward", "test", f"--reward=mine.py:{name}", "--data=d.jsonl", "--timeout=1"])
        == code
    )
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reward"], "usage: fastgrpo reward test"),
        (["reward", "tset"], "usage: fastgrpo reward test"),
        (
            ["reward", "test", "--reward=mine.py:exact", "--data=none.jsonl"],
            "error: --data: no file 'none.jsonl'",
        ),
    ],
)
def test_usage(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err
