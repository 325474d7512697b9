"""Hostile completions through everything that reads, scores, stores or shows one: nothing runs, nothing escapes.

Time is bounded by a CPU timer that is thousands of times what a linear reader needs.
"""

import json
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import pytest
from rich.console import Console

from fastgrpo.trainer.commands.reward import shorten
from fastgrpo.trainer.data.foreign_text import STEERS, presentable, printable
from fastgrpo.trainer.evaluation.calculator import Calculator
from fastgrpo.trainer.evaluation.tools import ToolError
from fastgrpo.trainer.output import display, rundir
from fastgrpo.trainer.output.closing import text as closing_text
from fastgrpo.trainer.output.page import render
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.process import line_ends
from fastgrpo.trainer.rewards.answers import final_number
from fastgrpo.trainer.rewards.library import SoftOverlong, think_format
from fastgrpo.trainer.rewards.process import Grader, ProcessReward
from fastgrpo.trainer.rewards.scoring import ExactAnswer, Rewards
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.custom import Custom, canonical
from fastgrpo.trainer.tasks.gsm8k_equations import equations
from fastgrpo.trainer.tasks.story import Story
from tests.security.completions import code, corpus
from tests.trainer.test_report import Tags, result_with

CANARY = Path(gettempdir()) / f"fastgrpo-canary-of-completions-{os.getpid()}"
CORPUS = corpus(CANARY)
PROBLEM = Problem("2+2", "4", "2+2=4\n#### 4", "2+2")
EOS = 1


@pytest.fixture(autouse=True)
def _nothing_ran():
    CANARY.unlink(missing_ok=True)
    yield
    assert not CANARY.exists(), "a completion was executed"


@contextmanager
def seconds_of_cpu(limit: float):
    """Fails the test if what is inside computes for longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {limit} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def calculator(text: str) -> object:
    try:
        return Calculator().run(text)
    except ToolError as error:
        return str(error)


READERS = {
    "story": Story().parse_answer,
    "story lines": lambda text: Story().line_rewards(PROBLEM, text.split("\n")),
    "final_number": final_number,
    "custom": Custom({}).parse_answer,
    "canonical": canonical,
    "equations": equations,
    "calculator": calculator,
    "think_format": lambda text: think_format(completions=[text]),
    "soft_overlong": lambda text: SoftOverlong(10, 2)(completion_ids=[[0] * min(len(text), 10**6)]),
    "line_ends": lambda text: line_ends(text.splitlines(keepends=True)),
    "shorten": shorten,
    "presentable": presentable,
}


def test_the_corpus_is_large_and_of_many_kinds():
    assert len(CORPUS) >= 200
    assert len({name.split(":")[0] for name in CORPUS}) == 6


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_text(reader):
    for name, text in CORPUS.items():
        with seconds_of_cpu(5):
            try:
                READERS[reader](text)
            except TimeoutError:
                pytest.fail(f"{reader} hangs on {name}")


def test_numbers_are_what_they_look_like_or_none():
    expected = {
        "full width": "42", "arabic": "42", "superscript": None, "roman": None, "homoglyph": None,
        "minus sign": None, "spaces": None, "dollars": None, "units": None, "stated often": "1",
    }  # fmt: skip
    found = {name: final_number(CORPUS[f"mathematics: {name}"]) for name in expected}
    assert found == expected


def test_scores_of_other_completions_do_not_change():
    """Graders keep no state: honest completions have the same scores before, among and after hostile ones."""
    honest = ["2+2=4\n#### 4", "#### 5", "<think>a</think> #### 4", ""]
    rewards = Rewards(
        {
            "exact": ExactAnswer(final_number, EOS),
            "format": think_format,
            "length": SoftOverlong(4, 2),
        }
    )

    def score(texts):
        ids = [[5, EOS]] * len(texts)
        return rewards.score([PROBLEM] * len(texts), texts, ids)

    alone = score(honest)
    hostile = [text for text in CORPUS.values() if len(text) <= 100_000]
    together = score([*hostile[::2], *honest, *hostile[1::2]])
    start = len(hostile[::2])
    assert together[start : start + len(honest)].equal(alone)
    assert score(honest).equal(alone)


def test_completions_without_tokens_are_no_answers():
    assert ExactAnswer(final_number, EOS)(
        completions=["#### 4"] * 3, completion_ids=[[], [EOS], [3]], answer=["4"] * 3
    ) == [0.0, 1.0, 0.0]


# What brings math-verify to a halt (9**9**9**9**9 does) costs its own completion the score, nothing else.
HARD = ["mathematics: tower", "mathematics: brackets", "mathematics: boxes", "pattern: aaaa!"]


def test_math_verify_runs_no_code_and_survives_what_hangs_it():
    pytest.importorskip("math_verify")
    grader = Grader("fastgrpo.trainer.rewards.library:math_verify", 120.0)
    hostile = [*code(CANARY).values(), *(CORPUS[name] for name in HARD)]
    boxed = [f"$\\boxed{{{text}}}$" for text in code(CANARY).values()]
    texts = ["$\\boxed{\\frac{1}{2}}$", *hostile, "$\\boxed{3}$", *boxed, "$\\boxed{0.5}$"]
    found = grader(completions=texts, answer=["1/2"] * len(texts))
    grader.stop()
    assert (found[0], found[-1], found[len(hostile) + 1]) == (1.0, 1.0, 0.0)
    assert set(found) == {0.0, 1.0}
    assert sum(found) == 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_math_verify_on_the_whole_corpus():
    pytest.importorskip("math_verify")
    grader = Grader("fastgrpo.trainer.rewards.library:math_verify", 1500.0)
    texts = [part for text in CORPUS.values() for part in (text, "$\\boxed{7}$")]
    found = grader(completions=texts, answer=["7"] * len(texts))
    grader.stop()
    assert found[1::2] == [1.0] * len(CORPUS)
    assert sum(found[::2]) == 0.0


def short(text: str) -> str:
    return text[:300]


def page_of(texts: list[str]) -> Tags:
    """The report with these texts wherever it shows one; without curves, which take most of its time."""
    result = result_with(texts)
    result.records = []
    page = Tags()
    page.feed(render(result))
    return page


def test_report_shows_them_as_text():
    """No tag, attribute or link of the page comes from a completion, wherever it stands."""
    harmless = page_of(["a"] * 5)
    texts = list(CORPUS.values())
    for start in range(0, len(texts), 5):
        part = [short(text) for text in [*texts, *texts][start : start + 5]]
        page = page_of(part)
        assert page.tags == harmless.tags, part
        assert page.attributes == harmless.attributes, part
        shown = same_lines("".join(page.text))
        assert all(same_lines(text).strip() in shown for text in part), part


def same_lines(text: str) -> str:
    """As a parser of HTML reads it: no NUL, one kind of line end."""
    return text.replace("\x00", "\ufffd").replace("\r\n", "\n").replace("\r", "\n")


def steering(text: str) -> list[str]:
    """Characters other than those that the output itself is made of."""
    return STEERS.findall(text)


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_terminal_is_not_steered(kind, capsys):
    console = Console(force_terminal=True, width=10_000, record=True, color_system=None)
    shown = display.PlainDisplay() if kind == "plain" else display.LiveDisplay(console)
    for text in CORPUS.values():
        shown.note(f"note: {short(text)}")
    shown.close()
    written = capsys.readouterr().out if kind == "plain" else console.export_text(styles=False)
    assert "note: " in written
    if kind == "plain":
        assert not steering(written)
    else:  # Rich itself moves the cursor to draw; what was printed as text must not
        assert not re.findall("[\u202a-\u202e\u2066-\u2069\x9b\x9d\x07]", written)
        assert "[bold red]x[/bold red]" in written
        assert "\\x1b]52;c;" in written


def test_other_commands_do_not_steer_the_terminal_either(tmp_path, capsys, monkeypatch):
    """`fastgrpo reward test` shows completions; usage errors show what was typed; a stop shows a reward's words."""
    from fastgrpo import cli

    monkeypatch.chdir(tmp_path)
    texts = [short(text) for name, text in CORPUS.items() if "surrogate" not in name]
    rows = [{"prompt": text, "completion": text, "answer": text} for text in texts]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "r.py").write_text(
        "def loud(completions, **kwargs):\n    raise ValueError(''.join(completions))\n"
        "def fine(completions, **kwargs):\n    return [float(len(t)) for t in completions]\n"
    )
    for name in ("loud", "fine"):
        cli.main(["reward", "test", f"--reward=r.py:{name}", "--data=d.jsonl"])
    terminal = CORPUS["terminal: title"] + CORPUS["terminal: RLO"]
    cli.main(["train", f"--output-dir={tmp_path}/{terminal}", "--max-steps=x"])
    cli.main(["train", terminal])
    said = capsys.readouterr()
    assert not steering(said.out + said.err)
    stopped = Result({"job": "x"}, stopped=terminal)
    assert not steering(presentable(closing_text(stopped, tmp_path)))


def test_faults_of_rewards_carry_no_control_characters(tmp_path):
    (tmp_path / "r.py").write_text(
        "def loud(completions, **kwargs):\n    raise ValueError(completions[0])\n"
    )
    reward = ProcessReward(f"{tmp_path}/r.py:loud", 30.0)
    rewards = Rewards({"loud": reward}, on_fault="skip")
    for text in ("\x1b[2J\u202e", "\x9b2J"):
        rewards.score([PROBLEM], [text], [[1]])
        assert not steering(rewards.messages[0])
    reward.stop()


def test_files_of_a_run_hold_one_record_per_line(tmp_path):
    """JSON escapes what would begin another line, and what is no character at all."""
    for text in [*CORPUS.values(), "\ud800"]:
        rundir.write_json(tmp_path / "s.json", {"notes": [short(text)]})
        content = (tmp_path / "s.json").read_bytes()
        assert json.loads(content) == {"notes": [short(text)]}
        assert content.count(b"\n") == 5
        assert content.isascii()
    rundir.write_text(tmp_path / "report.html", "\ud800 half a character")
    assert (tmp_path / "report.html").read_text() == "\\ud800 half a character"


def test_printable_leaves_languages_alone():
    for text in ("Größe 12 µm", "答案是 42", "الجواب ٤٢", "תשובה", "हिन्दी", "👩‍👩‍👧", "a\tb\nc"):
        assert printable(text) == text
