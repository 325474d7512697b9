"""`fastgrpo eval`: accuracy of a saved model on a job's held-out questions."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.trainer.options.config import TrainConfig, option
from fastgrpo.trainer.options.inputs import check_inputs, model_folder
from fastgrpo.trainer.options.jobs import JOBS
from fastgrpo.trainer.options.settings import SettingsError, fail, load_yaml, parse_options
from fastgrpo.trainer.output.rundir import CONFIG


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of `fastgrpo eval`."""

    model: str
    """A run, e.g. runs/story, or the folder of a model. Job and data are those in the run's config.yaml."""
    job: str | None = None
    """The job whose questions to ask; needed only where no config.yaml says it."""
    data: str | None = None
    """The job's data file."""
    test_data: str | None = None
    """The job's test file."""
    questions: int = 512
    """How many held-out questions to ask, all if there are fewer."""
    samples: int = 8
    """Samples per question behind pass@1, maj@k and pass@k."""
    temperature: float = 1.0
    """Temperature of those samples."""
    tools: str | None = None
    """What completions may call (docs/trainer.md): calculator, or the factory file.py:name of a sandbox of yours."""
    max_completion_length: int | None = None
    """Longest completion in tokens. Default: the run's, or else the job's."""
    seed: int = 0
    """Which questions, and which samples."""
    threads: int = 1
    """CPU threads."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        """Reject what cannot be meant, naming the option."""
        for name in ("questions", "samples", "threads", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{option(name)} must be at least 1, got {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature!r}")
        if self.job is not None and self.job not in JOBS:
            raise ValueError(f"--job must be one of {', '.join(JOBS)}, got {self.job!r}")


def main(arguments: Sequence[str]) -> int:
    """Prints the scores; returns the exit code."""
    try:
        options = parse_options(EvalConfig, arguments, "fastgrpo eval", __doc__ or "")
        config = train_config(options)
        check_inputs(config)
        print(f"job {config.job}; loading torch and transformers ...", file=sys.stderr, flush=True)
        return measure(config, as_json=options.json, tools=options.tools)
    except ValueError as error:
        return fail(error)


def train_config(options: EvalConfig) -> TrainConfig:
    """The options of a run that would start from this model and only be evaluated."""
    folder = model_folder("--model", options.model)
    beside = folder.parent / CONFIG
    known = load_yaml(str(beside)) if beside.is_file() else {}  # that of `fastgrpo sft` has no job
    job = options.job or known.get("job")
    if job not in JOBS:
        raise SettingsError(
            f"--job must say whose questions to ask ({', '.join(JOBS)}): no {CONFIG} beside {folder} does"
        )
    chosen = {
        "job": job,
        "model_name_or_path": str(folder),
        "seed": options.seed,
        "threads": options.threads,
        "device": options.device,
        "eval_questions": options.questions,
        "eval_samples": options.samples,
        "eval_temperature": options.temperature,
    }
    for name in ("data", "test_data", "max_completion_length"):
        value = getattr(options, name)
        if value is None and job == known.get("job"):
            value = known.get(name)
        if value is not None:
            chosen[name] = value
    return TrainConfig(**(JOBS[job].defaults | chosen))


def measure(config: TrainConfig, *, as_json: bool, tools: str | None = None) -> int:
    """Loads the model, asks the questions and prints the scores."""
    from fastgrpo.trainer.evaluation.evaluate import evaluate
    from fastgrpo.trainer.evaluation.tools import ToolSampler, find_tool
    from fastgrpo.trainer.output.closing import table
    from fastgrpo.trainer.setup import make_run

    tool = None if tools is None else find_tool(tools)
    run = make_run(config)
    problems = run.held_out("test", config.eval_questions)
    if not problems:
        raise ValueError("--data and --test-data must hold out a question with an answer, got none")
    sampler = run.sampler(config.seed + 1)
    helped = None if tool is None else ToolSampler(sampler, run.tokenizer, tool)
    evaluation = evaluate(
        helped or sampler,
        run.task,
        run.tokenizer,
        problems,
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
        if helped is not None:
            content["tool_calls"] = {"answered": helped.calls, "failed": helped.failures}
        print(json.dumps(content))
    else:
        asked = f"{len(problems)} held-out questions of the job {config.job}, seed {config.seed}"
        print(
            f"{asked}; {config.eval_samples} samples each at temperature {config.eval_temperature:g}"
        )
        print(table({"model": evaluation}))
        if helped is not None:
            print(helped.summary())
    return 0
