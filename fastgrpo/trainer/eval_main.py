"""`fastgrpo eval`: accuracy of a saved model on a job's held-out questions."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastgrpo.trainer.config import TrainConfig
from fastgrpo.trainer.jobs import JOBS
from fastgrpo.trainer.rundir import CONFIG
from fastgrpo.trainer.settings import SettingsError, fail, read_yaml


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of `fastgrpo eval`."""

    model: str
    """Folder of the model, e.g. runs/story/model. Job and data are taken from the run's config.yaml beside it."""
    job: str | None = None
    """The job whose questions to ask; needed only where no config.yaml says it."""
    data: str | None = None
    """The job's data file."""
    test_data: str | None = None
    """The job's test file."""
    questions: int = 512
    """How many held-out questions to ask."""
    samples: int = 8
    """Samples per question behind pass@1, maj@k and pass@k."""
    temperature: float = 1.0
    """Temperature of those samples."""
    seed: int = 0
    """Which questions, and which samples."""
    threads: int = 1
    """CPU threads."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Prints the scores; returns the exit code."""
    options = tyro.cli(EvalConfig, args=list(arguments), prog="fastgrpo eval", description=__doc__)
    try:
        config = train_config(options)
        print(f"job {config.job}; loading torch and transformers ...", file=sys.stderr, flush=True)
        return measure(config, as_json=options.json)
    except ValueError as error:
        return fail(error)


def train_config(options: EvalConfig) -> TrainConfig:
    """The options of a run that would start from this model and only be evaluated."""
    beside = Path(options.model).parent / CONFIG
    known = read_yaml(str(beside)) if beside.is_file() else {}
    job = options.job or known.get("job")
    if job not in JOBS:
        raise SettingsError(f"job must be one of {', '.join(JOBS)}, got {job!r}")
    base = {
        name: known[name]
        for name in ("data", "test_data", "max_completion_length")
        if name in known
    }
    given = {
        name: getattr(options, name) for name in ("data", "test_data") if getattr(options, name)
    }
    chosen = {
        "job": job,
        "model_name_or_path": options.model,
        "seed": options.seed,
        "threads": options.threads,
        "device": options.device,
        "eval_questions": options.questions,
        "eval_samples": options.samples,
        "eval_temperature": options.temperature,
    }
    return TrainConfig(**(JOBS[job].defaults | base | given | chosen))


def measure(config: TrainConfig, *, as_json: bool) -> int:
    """Loads the model, asks the questions and prints the scores."""
    from fastgrpo.trainer.closing import table
    from fastgrpo.trainer.evaluate import evaluate
    from fastgrpo.trainer.setup import make_run

    run = make_run(config)
    evaluation = evaluate(
        run.sampler(config.seed + 1),
        run.task,
        run.tokenizer,
        run.held_out("test", config.eval_questions),
        samples=config.eval_samples,
        max_new_tokens=config.max_completion_length,
        temperature=config.eval_temperature,
    )
    if as_json:
        content = {
            "questions": len(evaluation.answered),
            "scores": evaluation.scores,
            "stderr": evaluation.stderr,
        }
        print(json.dumps(content))
    else:
        print(table({"model": evaluation}))
    return 0
