"""report.html: the result, curves and completions of a run in one file. No scripts, nothing fetched, text escaped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from fastgrpo.trainer.evaluation.evaluate import Answered, Evaluation
from fastgrpo.trainer.output.close_up import CloseUp
from fastgrpo.trainer.output.plots import Curve, Record, png
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.output.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(result: Result) -> str:
    """The whole page."""
    title = f"fastgrpo: {result.config['job']}"
    parts = [
        f"<h1>{escape(title)}</h1><p class=sub>{escape(subtitle(result))}</p>",
        *([f"<p class=note>{escape(result.stopped)}</p>"] if result.stopped else []),
        "<h2>Result</h2>" + accuracy_table(result.base, result.final),
        *(f"<p>{escape(text)}</p>" for text in result.words),
        "<h2>Curves</h2>" + curves(result.records),
        *(["<h2>Notes from the run</h2>" + notes(result.notes)] if result.notes else []),
        *(
            ["<h2>Completions, before and after</h2>" + samples(result)]
            if result.base or result.final
            else []
        ),
        *(["<h2>One step from near</h2>" + close_up(result.close_up)] if result.close_up else []),
        "<div class=pair><div><h2>Where the time went</h2>" + times(result.seconds, result.wall_s),
        "</div><div><h2>Where the memory went</h2>" + memory(result.memory) + "</div></div>",
        options(result.config),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def subtitle(result: Result) -> str:
    """What was run and what it took."""
    c = result.config
    return (
        f"{c['objective']}, {c['max_steps']} steps of {c['prompts_per_step']} questions x {c['num_generations']} "
        f"completions, beta {c['beta']:g}, seed {c['seed']}; wall {result.wall_s:.0f} s, CPU {result.cpu_s:.0f} s"
    )


def accuracy_table(base: Evaluation | None, final: Evaluation | None) -> str:
    """Base and final scores with standard errors, and the same per slice."""
    some = final or base
    if some is None:
        return "<p>No evaluation was made.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in some.scores)
    rows = [f"<tr><th></th>{head}<th>tokens</th></tr>"]
    parts: list[str | None] = [None, *some.slices]
    for part in parts:
        views = [
            (name, e if part is None or e is None else e.part(part))
            for name, e in (("base", base), ("final", final))
        ]
        for name, view in views:
            if view is not None:
                label = name if part is None else f"{name}, {part} ({len(view.answered)})"
                rows.append(score_row(label, view))
        before, after = views[0][1], views[1][1]
        if before is not None and after is not None:
            rows.append(change_row(before, after))
    return f"<table>{''.join(rows)}</table>"


def score_row(label: str, evaluation: Evaluation) -> str:
    """One evaluation."""
    cells = "".join(
        f"<td>{value:.3f} <span class=se>±{evaluation.stderr[name]:.3f}</span></td>"
        for name, value in evaluation.scores.items()
    )
    return f"<tr><td>{escape(label)}</td>{cells}<td>{evaluation.mean_length:.1f}</td></tr>"


def change_row(before: Evaluation, after: Evaluation) -> str:
    """The difference of two evaluations."""
    cells = ""
    for name, value in after.scores.items():
        change = value - before.scores[name]
        cells += f"<td class={'up' if change >= 0 else 'down'}>{change:+.3f}</td>"
    return f"<tr><td>change</td>{cells}<td>{after.mean_length - before.mean_length:+.1f}</td></tr>"


def curves(records: Sequence[Record]) -> str:
    """Pictures of what changed over the run."""
    sft, grpo, evals = (
        [r for r in records if r["phase"] == phase] for phase in ("sft", "grpo", "eval")
    )
    accuracy = [Curve("greedy", evals, "greedy", "o"), Curve("pass@1", evals, "pass@1", "o")]
    reward = [Curve("mean", grpo, "reward"), Curve("spread in group", grpo, "reward_std")]
    flat = [
        Curve("all correct", grpo, "frac_groups_all_best"),
        Curve("none correct", grpo, "frac_groups_all_worst"),
    ]
    plots = [
        png("Accuracy on held-out questions", accuracy, top=1),
        png("Reward", reward),
        png("Completion length", [Curve("mean", grpo, "completions/mean_length")], unit="tokens"),
        png("KL to the reference", [Curve("mean per token", grpo, "kl")], unit="nats"),
        png("Entropy", [Curve("mean per token", grpo, "entropy")], unit="nats"),
        png("Groups that say nothing", flat, top=1),
        png("Gradient norm before clipping", [Curve("norm", grpo, "grad_norm")]),
        png("SFT loss (making the base)", [Curve("loss", sft, "loss")], log=True),
    ]
    images = [f'<img src="{plot}" alt="plot">' for plot in plots if plot is not None]
    return f"<div class=plots>{''.join(images)}</div>" if images else "<p>No step was made.</p>"


def notes(texts: Sequence[str]) -> str:
    """What the diagnostics said."""
    return "".join(f"<p class=note>{escape(text)}</p>" for text in texts)


def samples(result: Result) -> str:
    """The same questions answered by the base and by the final model."""
    first = result.final or result.base
    assert first is not None
    blocks = []
    for i in range(min(int(result.config["completions_to_show"]), len(first.answered))):
        sides = [
            (name, e.answered[i])
            for name, e in (("base", result.base), ("final", result.final))
            if e is not None
        ]
        columns = "".join(
            f"<div><div class=side>{name}</div>{answers(answered)}</div>"
            for name, answered in sides
        )
        problem = first.answered[i].problem
        blocks.append(
            f"<div class=ask><pre>{escape(problem.prompt)}</pre>"
            f"<div class=label>right answer: {escape(problem.answer)}</div><div class=pair>{columns}</div></div>"
        )
    return "".join(blocks)


def answers(answered: Answered, shown: int = 2) -> str:
    """The greedy completion and the first samples of one question."""
    right = answered.problem.answer
    rows = [("greedy", answered.greedy, answered.greedy_answer)]
    rows += [
        ("sample", text, answer)
        for text, answer in zip(answered.samples, answered.answers, strict=True)
    ][:shown]
    blocks = []
    for how, text, answer in rows:
        verdict = "right" if answer == right else "wrong"
        blocks.append(
            f"<div class=label>{how}, {verdict}</div><pre class={verdict}>{escape(text) or '&nbsp;'}</pre>"
        )
    return "".join(blocks)


def close_up(near: CloseUp) -> str:
    """Completions of one question, token by token; equal ones once."""
    top = max((abs(r) for one in near.completions for r in one.log_ratio), default=0.0) or 1.0
    times = Counter(tuple(one.tokens) for one in near.completions)
    cards = []
    for one in {tuple(one.tokens): one for one in near.completions}.values():
        tokens = "".join(
            f'<span style="{shade(r / top)}" title="log-ratio {r:+.4f}, advantage {a:+.2f}">{visible(text)}</span>'
            for text, r, a in zip(one.tokens, one.log_ratio, one.advantage, strict=True)
        )
        worth = sum(one.advantage) / max(1, len(one.advantage))
        kind = "up" if worth > 0 else "down" if worth < 0 else "se"
        count = times[tuple(one.tokens)]
        often = f" <span class=label>{count} times</span>" if count > 1 else ""
        cards.append(f"<div><span class={kind}>{worth:+.2f}</span>{often}<pre>{tokens}</pre></div>")
    return (
        f"<p>Completions of one question in step {near.step}, each with its advantage. The step made <span "
        f'style="{shade(1)}">green</span> tokens likelier and <span style="{shade(-1)}">red</span> ones less likely; '
        f"the strongest colour is a log-ratio of {top:.2g}.</p>"
        f"<div class=ask><pre>{escape(near.prompt)}</pre><div class=group>{''.join(cards)}</div></div>"
    )


def shade(strength: float) -> str:
    """A background between red (-1), none (0) and green (1)."""
    red, green, blue = (42, 157, 92) if strength > 0 else (201, 80, 60)
    return f"background:rgba({red},{green},{blue},{0.75 * abs(strength):.3f})"


def visible(token: str) -> str:
    """The text of a token, line feeds with a sign of their own."""
    return escape(token).replace("\n", "\u21b5\n")


def times(seconds: Mapping[str, float], wall_s: float) -> str:
    """Seconds and shares of the run's parts."""
    spent = {name: value for name, value in seconds.items() if value}
    spent["other"] = max(0.0, wall_s - sum(spent.values()))
    total = sum(spent.values()) or 1.0
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{value:.1f} s</td><td>{value / total:.0%}</td></tr>"
        for name, value in spent.items()
    )
    return f"<table>{rows}</table>"


def memory(parts: Mapping[str, int]) -> str:
    """Mebibytes of the run's parts."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{value / 2**20:,.1f} MiB</td></tr>"
        for name, value in parts.items()
    )
    return f"<table>{rows}</table>" if rows else "<p>No step was made.</p>"


def options(config: Mapping[str, object]) -> str:
    """The effective options."""
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in config.items()
    )
    return f"<details><summary>Options</summary><table>{rows}</table></details>"
