"""From a command line and perhaps a YAML file to a `TrainConfig`. Nothing here imports torch."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tyro
import yaml

from fastgrpo.trainer.config import TrainConfig
from fastgrpo.trainer.jobs import JOBS, default_config


class SettingsError(ValueError):
    """An option that cannot be meant; its text is for the user."""


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Options of `fastgrpo train [JOB] [--config FILE] [--option value ...]`; later ones win, flags beat the file."""
    rest = list(arguments)
    job = rest.pop(0) if rest and not rest[0].startswith("-") else None
    path = _take_option(rest, "--config") or _config_of_resumed(rest)
    if path is not None:
        options = read_yaml(path)
        job = job or options.pop("job", None)
        options.pop("job", None)
        rest = [*_as_flags(options), *rest]
    job = job or "story"
    if job not in JOBS:
        raise SettingsError(f"no job {job!r}.{_guess(job, JOBS)} Jobs: {', '.join(JOBS)}")
    return parse_flags(rest, default_config(job), f"fastgrpo train {job}", JOBS[job].about)


def parse_flags(flags: Sequence[str], default: TrainConfig, prog: str, about: str) -> TrainConfig:
    """Options from flags over defaults; prints help or the error and leaves the process as argparse does."""
    try:
        return tyro.cli(
            TrainConfig,
            default=default,
            args=list(flags),
            prog=prog,
            description=f"{about}\n\n--config FILE reads options from YAML.",
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file whose keys are options of `TrainConfig`."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config file {path}: {error}") from None
    if not isinstance(options, dict):
        raise SettingsError(
            f"config file {path}: expected `option: value` lines, got {type(options).__name__}"
        )
    known = [field.name for field in fields(TrainConfig)]
    for key, value in options.items():
        if key not in known:
            raise SettingsError(f"config file {path}: no option {key!r}.{_guess(str(key), known)}")
        if isinstance(value, dict | list):
            raise SettingsError(f"config file {path}: {key} must be a single value, got {value!r}")
    return options


def to_yaml(config: TrainConfig) -> str:
    """A file that `--config` reads back to the same options."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


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


def _guess(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def fail(error: Exception) -> int:
    """Says what is wrong with the options; the exit code of a usage error."""
    print(f"error: {error}", file=sys.stderr)
    return 2
