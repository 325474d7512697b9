"""The report: self-contained, nothing executable, and hostile text is only ever text."""

import re
from dataclasses import asdict
from html.parser import HTMLParser

from fastgrpo.trainer.evaluation.evaluate import Answered, summarise
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.output.closing import table
from fastgrpo.trainer.output.page import render
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.tasks.base import Problem

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "&lt;b&gt; &amp; \x00 \u202e",
    "<!-- --><style>*{display:none}</style>",
]


class Tags(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def result_with(texts):
    problem = Problem(texts[0], texts[1], texts[2], "k", "<i>slice")
    one = Answered(problem, texts[3], texts[1], list(texts), [None] * len(texts), 4.0)
    evaluation = summarise([one, one])
    config = asdict(default_config("story")) | {"output_dir": texts[0]}
    result = Result(
        config,
        base=evaluation,
        final=evaluation,
        notes=list(texts),
        words=list(texts),
    )
    result.records = [
        {"phase": "sft", "step": 1, "loss": 3.0},
        {"phase": "sft", "step": 2, "loss": float("nan")},
        *({"phase": "grpo", "step": s, "reward": 0.1 * s, "kl": 0.0, "entropy": 1.0, "grad_norm": 1.0,
           "completions/mean_length": 5.0 + s} for s in range(3)),
        *({"phase": "eval", "step": s, "greedy": 0.5, "pass@1": 0.4} for s in (0, 2)),
    ]  # fmt: skip
    result.seconds = {"load": 1.0, "train": 3.0}
    return result


def test_hostile_text_stays_text():
    page = Tags()
    html = render(result_with(HOSTILE))
    page.feed(html)
    assert "script" not in page.tags
    assert "svg" not in page.tags
    assert page.tags.count("style") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = "".join(page.text)
    for text in HOSTILE:
        assert text.replace("\x00", "\ufffd") in shown.replace("\x00", "\ufffd")


def test_nothing_is_fetched_and_the_policy_says_so():
    html = render(result_with(HOSTILE))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)[1]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    page = Tags()
    page.feed(html)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) >= 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert html.index("Content-Security-Policy") < html.index("<style")


def test_a_run_that_was_stopped_at_once_still_has_a_page():
    html = render(Result(asdict(default_config("story")), stopped="Stopped."))
    assert "No evaluation was made." in html
    assert "No step was made." in html
    assert "Stopped." in html


def test_the_table_shows_scores_errors_and_slices():
    def evaluation(right):
        rows = [("seen", right), ("unseen", "0")]
        return summarise(
            [
                Answered(Problem("", "1", "", "", part), "", answer, ["", ""], [answer, "1"], 3.0)
                for part, answer in rows
            ]
        )

    text = table({"base": evaluation("0"), "final": evaluation("1")})
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["greedy", "pass@1", "maj@2", "pass@2", "tokens"]
    assert lines[1][:2] == ["base", "0.000"]
    assert lines[2][:4] == ["final", "0.500", "±", "0.500"]
    assert [line[0] + line[1] for line in lines[3:]] == [
        "base,seen",
        "final,seen",
        "base,unseen",
        "final,unseen",
    ]
