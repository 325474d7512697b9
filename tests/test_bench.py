"""The benchmark: it judges before it ranks, names who is missing, and its files hold what it printed."""

import json
from dataclasses import replace

import pytest
import torch

from fastgrpo.bench import step
from fastgrpo.bench.goals import verdicts
from fastgrpo.bench.main import cases, main
from fastgrpo.bench.options import parse
from fastgrpo.bench.problems import Case, make_problem
from fastgrpo.bench.providers import PROVIDERS
from fastgrpo.bench.providers.base import Contestant, Provider, Unavailable
from fastgrpo.bench.report import cells, markdown
from fastgrpo.bench.rows import Row, compare, read_jsonl
from fastgrpo.bench.run import environment, run_case

CPU = torch.device("cpu")
SMALL = Case("logprob", "train", 64, 257, 0, torch.float32)


def _provider(name, make, ours=False):
    return Provider(name, make, ours, False, True, "", "")


def _right(problem):
    def run():
        logits = problem.logits.detach().requires_grad_()
        logprob = logits.log_softmax(-1).gather(-1, problem.token_ids[..., None])[..., 0]
        torch.where(problem.mask, logprob * problem.advantage[:, None], 0.0).sum().backward()
        return {"logprob": logprob, "dlogits": logits.grad}

    return Contestant(run)


def _planted(change):
    """A provider whose answer is right but for one change, and very fast."""

    def make(problem):
        outputs = dict(_right(problem).run())
        change(outputs)
        return Contestant(lambda: outputs)

    return make


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out["logprob"].detach().add_(1.0),  # a wrong value
        lambda out: out["dlogits"].zero_(),  # a gradient that trains on nothing
        lambda out: out["dlogits"].mul_(1.2),  # a wrong normaliser
        lambda out: out["dlogits"][0, 0].fill_(float("nan")),  # NaN in one row
        lambda out: out.pop("dlogits"),  # no gradient at all: nothing that could be wrong
    ],
    ids=["logprob+1", "zero gradient", "scaled gradient", "nan", "no gradient"],
)
def test_a_wrong_provider_is_marked_and_never_ranked(change):
    providers = [
        _provider("ours", _right, ours=True),
        _provider("peer", _right),
        _provider("planted", _planted(change)),
    ]
    rows = run_case(
        SMALL, CPU, rounds=3, budget_seconds=1, seed=0, say=lambda _: None, providers=providers
    )
    by_name = {row.provider: row for row in rows}
    assert by_name["planted"].wrong
    assert by_name["planted"].speedup_of_ours is None
    assert "WRONG" in cells(by_name["planted"])
    assert not by_name["peer"].wrong
    assert by_name["peer"].speedup_of_ours == by_name["peer"].ms / by_name["ours"].ms


def test_a_missing_provider_keeps_a_row_with_the_reason():
    def missing(problem):
        raise Unavailable("somepeer is not installed")

    said = []
    rows = run_case(
        SMALL, CPU, rounds=3, budget_seconds=1, seed=0, say=said.append, providers=[_provider("peer", missing)]
    )  # fmt: skip
    assert rows[0].unavailable == "somepeer is not installed"
    assert "not measured: somepeer is not installed" in cells(rows[0])
    assert any("somepeer" in line for line in said)


def test_losses_are_printed_as_losses():
    def slow(problem):
        contestant = _right(problem)

        def run():
            for _ in range(20):
                outputs = contestant.run()
            return outputs

        return Contestant(run)

    providers = [_provider("ours", slow, ours=True), _provider("peer", _right)]
    rows = run_case(
        SMALL, CPU, rounds=3, budget_seconds=1, seed=0, say=lambda _: None, providers=providers
    )
    assert any(cell.endswith("x SLOWER") for cell in cells(rows[1]))
    assert "SLOWER" in markdown(environment(CPU, 0), rows, [])


@pytest.mark.parametrize("what", ["logprob", "loss", "linear", "advantage"])
def test_problem_holds_its_own_float64_answer(what):
    case = Case(what, "train", 64 * 8, 53, 8, torch.float32)
    problem = make_problem(case, CPU)
    assert all(value.dtype == torch.float64 for value in problem.expected.values())
    names = {"advantage": {"advantage"}, "linear": {"loss", "dhidden", "dweight"}}
    assert names.get(what, {"logprob", "dlogits"}) <= set(problem.expected)


@pytest.mark.parametrize("by", ["mask", "advantage"])
def test_inactive_share_is_what_was_asked_for(by):
    problem = make_problem(
        Case("linear", "train", 640, 53, 8, torch.float32, active=0.4, skip_by=by), CPU
    )
    idle = (
        ~problem.mask if by == "mask" else (problem.advantage == 0)[:, None].expand_as(problem.mask)
    )
    assert abs(float(idle.float().mean()) - 0.6) < 0.02


def test_command_writes_one_line_per_row(tmp_path, capsys):
    arguments = [
        "--quick",
        "--what",
        "logprob",
        "--dtype",
        "float32",
        "--entropy",
        "on",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert [row.provider for _, row in read_jsonl(tmp_path / "results.jsonl")]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"eager", "torch.compile", "TRL", "fastgrpo", "bandwidth floor"} <= {
        x["provider"] for x in lines
    }
    for line in lines:
        assert line["versions"]["torch"] == torch.__version__
        assert line["unavailable"] or len(line["repetitions_ms"]) >= 3
    assert "logprob train float32" in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text().startswith("# Benchmark on ")
    assert (tmp_path / "results.png").stat().st_size > 10_000


def _row(provider, ms, active=1.0, **more):
    case = Case("linear", "train", 256, 32_000, 64, torch.bfloat16, active=active)
    row = Row.of(case, _provider(provider, None, ours=provider == "fastgrpo"))
    return replace(row, ms=ms, **more)


def test_kernel_and_skipped_work_are_told_apart():
    """Dense: 1.5 times faster. With 40 % active rows 3 times: the other factor 2 is work not done."""
    rows = [_row("fastgrpo", 10), _row("TRL", 15)]
    rows += [_row("fastgrpo", 4, active=0.4), _row("TRL", 12, active=0.4)]
    compare(rows)
    peer = rows[3]
    assert (peer.speedup_of_ours, peer.kernel_speedup) == (3.0, 1.5)
    assert peer.skipped_speedup == 2.0
    assert "1.50 x 2.00" in cells(peer)


def test_goals_pass_and_fail_by_what_was_measured():
    rows = [_row("fastgrpo", 10), _row("TRL", 10.4), _row("Liger", 30)]
    rows += [_row("fastgrpo", 5, active=0.4)]
    compare(rows)
    outcomes = {verdict.goal: (verdict.target, verdict.passed) for verdict in verdicts(rows, False)}
    assert outcomes == {
        "times faster than the best peer": (1.05, False),
        "times faster than Liger": (2.7, True),
        "times faster than with all rows active (ideal 2.50)": (2.12, False),
    }


def test_a_goal_without_its_rows_has_no_verdict():
    rows = [_row("fastgrpo", 10), _row("TRL", 1, wrong=True)]
    compare(rows)
    assert verdicts(rows, False) == []


def test_only_the_backward_is_timed_and_judged():
    case = replace(SMALL, mode="backward")
    some = [p for p in PROVIDERS["logprob"] if p.is_ours or p.is_floor]
    rows = run_case(
        case, CPU, rounds=3, budget_seconds=1, seed=0, say=lambda _: None, providers=some
    )
    by_name = {row.provider: row for row in rows}
    assert set(by_name["fastgrpo"].errors) == {"gradient"}
    assert not by_name["fastgrpo"].wrong
    assert by_name["bandwidth floor"].ms > 0


def test_stages_of_a_step_come_from_the_trainers_own_times(tmp_path, capsys, monkeypatch):
    """The trainer, replaced here, times itself; the two backends take turns."""
    turns = []

    def train(job, backend, steps, folder, options):
        turns.append(backend)
        slower = 1 if backend == "auto" else 3
        return {
            "generate": [0.1] * steps,
            "train": [0.2 * slower] * steps,
            "step_time": [0.5] * steps,
        }

    monkeypatch.setattr(step, "train", train)
    arguments = [
        "--what",
        "step",
        "--quick",
        "--job",
        "copy",
        "--rounds",
        "3",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert turns == ["auto", "reference"] * 3
    ours, eager = (json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines())
    assert ours["seconds"] == {"generate": 0.1, "train": 0.2, "step_time": 0.5}
    assert eager["seconds"]["train"] == pytest.approx(0.6)
    assert "600.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--what speed",
            "--what must be some of logprob, loss, linear, advantage, step, got speed",
        ),
        ("--dtype int8", "--dtype must be some of float32, bfloat16, float16, got int8"),
        ("--preset gpt9", "--preset must be one of one, tiny"),
        ("--tokens 0", "--tokens must be at least 1, got 0"),
        ("--tokens x", "--tokens must be of type int, got 'x'"),
        ("--budget 0", "--budget must be above 0, got 0.0"),
        ("--active 1,2", "--active must be shares in (0, 1], got 1.0, 2.0"),
        ("--active some", "--active must be numbers with commas between, got 'some'"),
        ("--device cuda:99", "--device cuda:99 cannot be used: torch"),
        ("--rouns 3", "no option '--rouns'. Did you mean '--rounds'?"),
        ("--what step --tokens 4", "--tokens has no effect on --what step"),
        ("--job copy", "--job belongs to --what step"),
        ("--what step --job gsm8k", "--job: invalid choice: 'gsm8k'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith("(fastgrpo bench --help)")


def test_quick_changes_defaults_and_nothing_that_was_asked_for():
    quick = parse(["--quick"], "")
    assert (quick.size, quick.tokens, quick.dtype, quick.budget) == (
        (256, 32768),
        128,
        ["bfloat16"],
        1.0,
    )
    asked = parse(["--quick", "--preset=32x64", "--tokens=7", "--dtype=float32", "--budget=3"], "")
    assert (asked.size, asked.tokens, asked.dtype, asked.budget) == ((32, 64), 7, ["float32"], 3.0)
    assert {case.vocabulary for case in cases(asked) if case.what != "advantage"} == {64}
