"""From a command line and perhaps a YAML file to a `TrainConfig`. Nothing here imports torch."""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro
import yaml

from fastgrpo.trainer.data.foreign_text import presentable
from fastgrpo.trainer.options.config import TrainConfig, option
from fastgrpo.trainer.options.jobs import JOBS, default_config
from fastgrpo.words import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
PLAINER = {
    r"Error parsing [A-Z]\w*: ": "",  # the class behind the options
    r"Error parsing (--\S+): invalid literal for int.*: (.*)": r"\1 must be a whole number, got \2",
    r"Error parsing (--\S+): could not convert string to float: (.*)": r"\1 must be a number, got \2",
    r"[Ii]nvalid choice (.*) for argument '(.*)'. Expected one of \((.*)\)\.": r"\2 must be one of \3, got \1",
    r"Missing value for argument '(.*)'\. .*": r"\1 needs a value",
}
"""tyro's complaints in our words."""
LOOPBACK = re.compile(r"https?://(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?(/|$)")


class SettingsError(ValueError):
    """An option that cannot be meant; its text is for the user."""


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Options of `fastgrpo train [JOB] [--config FILE] [--option value ...]`; later ones win, flags beat the file."""
    rest = list(arguments)
    job = rest.pop(0) if rest and not rest[0].startswith("-") else None
    named = _take_option(list(rest), "--job")
    if named is not None:
        raise SettingsError(f"the job is the first word, not an option: fastgrpo train {named}")
    path, resumed = _take_option(rest, "--config"), _config_of_resumed(rest)
    if path is not None or resumed is not None:
        options = read_yaml(path or str(resumed))
        if path is None:
            _refuse_effects(str(resumed), options, rest)
        job = job or options.pop("job", None)
        options.pop("job", None)
        rest = [*_as_flags(options), *rest]
    job = job or "story"
    if job not in JOBS:
        raise SettingsError(f"no job {job!r}.{did_you_mean(job, JOBS)} Jobs: {', '.join(JOBS)}")
    others = ", ".join(name for name in JOBS if name != job)
    about = (
        f"{JOBS[job].about}\n\nDefaults differ by job; those below are {job}'s. Other jobs: {others} "
        "(fastgrpo train JOB --help). --config FILE reads options from YAML; flags beat the file."
    )
    return parse_options(TrainConfig, rest, f"fastgrpo train {job}", about, default_config(job))


def parse_options(
    kind: type[Options], flags: Sequence[str], prog: str, about: str, default: Options | None = None
) -> Options:
    """Options from flags over defaults; `--help` prints and ends the process.

    Raises:
        SettingsError: In one line, naming the option.
    """
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            if default is None:
                return tyro.cli(kind, args=list(flags), prog=prog, description=about)
            return tyro.cli(kind, args=list(flags), prog=prog, description=about, default=default)
    except SystemExit as stop:
        if stop.code != 2:
            raise
    known = [option(field.name) for field in fields(kind)]
    raise SettingsError(f"{_one_line(complaint.getvalue(), known)} ({prog} --help)")


def _one_line(complaint: str, known: Sequence[str]) -> str:
    """The point of what tyro says: title, rule, the point, rule, advice (the first rule may be the edge of a frame)."""
    lines = [line.strip("│ ") for line in complaint.splitlines() if line[:1] not in "╰"]
    text = " ".join("\n" if not line.strip("─-") or line[0] == "╭" else line for line in lines)
    unknown = re.search(r"Unrecognized options:\s+([^ ,]+)", text)
    if unknown:
        return f"no option {unknown[1]!r}.{did_you_mean(unknown[1], known)}"
    point = next((part.strip() for part in text.split("\n")[1:] if part.strip()), text)
    if point.startswith("Missing from"):
        return f"needs {' and '.join(word for word in point.split() if word in known)}"
    for pattern, plainer in PLAINER.items():
        point = re.sub(pattern, plainer, point)
    return point


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file whose keys are options of `TrainConfig`."""
    options = load_yaml(path)
    known = [field.name for field in fields(TrainConfig)]
    for key, value in options.items():
        if key not in known:
            raise SettingsError(
                f"config file {path}: no option {key!r}.{did_you_mean(str(key), known)}"
            )
        if isinstance(value, dict | list):
            raise SettingsError(f"config file {path}: {key} must be a single value, got {value!r}")
    return options


def load_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config file {path}: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"config file {path}: expected `option: value` lines, got {type(content).__name__}"
        )
    return content


def to_yaml(options: "DataclassInstance") -> str:
    """A file that `--config` reads back to the same options."""
    return yaml.safe_dump(asdict(options), sort_keys=False)


def describe(config: TrainConfig) -> str:
    """All options on a few lines, those that differ from the job's defaults marked by `*`."""
    default = default_config(config.job)
    words = [
        f"{'*' if value != getattr(default, name) else ''}{name}={value}"
        for name, value in asdict(config).items()
    ]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 108:
            lines.append(line)
            line = ""
        line += f"  {word}"
    return "\n".join([*lines, line])


def _config_of_resumed(arguments: Sequence[str]) -> str | None:
    """The options of the run that `--resume PATH` goes on with: then nothing else need be said."""
    path = _take_option(list(arguments), "--resume")
    if path in (None, "auto", "never"):
        return None
    for folder in (Path(path), Path(path).parent.parent):
        if (folder / "config.yaml").is_file():
            return str(folder / "config.yaml")
    return None


def _refuse_effects(path: str, options: dict[str, Any], arguments: list[str]) -> None:
    """A run's folder may come from anybody: code to run and servers to send prompts to are named by hand."""
    reward, servers = (str(options.get(name) or "") for name in ("reward", "vllm_server_base_url"))
    outside = [
        *(spec for spec in reward.split(",") if ":" in spec or spec.endswith(".py")),
        *(url for url in servers.split(",") if url and not LOOPBACK.match(url.strip())),
    ]
    for name, value in (("--reward", reward), ("--vllm-server-base-url", servers)):
        named = _take_option(list(arguments), name) is not None
        if not named and any(part in outside for part in value.split(",")):
            raise SettingsError(
                f"{path} says {name} {value}, and a folder cannot say what code runs or where prompts go: name it "
                "again on the command line"
            )


def _as_flags(options: dict[str, Any]) -> list[str]:
    """YAML values as flags, so that both are read by one parser (YAML takes 1e-4 for text)."""
    flags = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _take_option(arguments: list[str], name: str) -> str | None:
    """Removes `name VALUE` or `name=VALUE` from the arguments."""
    value = None
    for i, argument in reversed(list(enumerate(arguments))):
        if argument == name:
            if i + 1 == len(arguments):
                raise SettingsError(f"{name} needs a value")
            value = value or arguments[i + 1]
            del arguments[i : i + 2]
        elif argument.startswith(f"{name}="):
            value = value or argument.partition("=")[2]
            del arguments[i]
    return value


def fail(error: Exception) -> int:
    """Says what is wrong with the options; the exit code of a usage error."""
    print(f"error: {presentable(str(error))}", file=sys.stderr)
    return 2
