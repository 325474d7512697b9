"""Whether what the options name is there: files, models, reward functions. Nothing here imports torch."""

import stat
from pathlib import Path

from fastgrpo.trainer.options.config import TrainConfig, option
from fastgrpo.trainer.options.jobs import FROM_FILES, NEED_MODEL
from fastgrpo.trainer.options.settings import SettingsError


def check_inputs(config: TrainConfig) -> None:
    """Looks before anything is loaded, so that a slip costs no time and leaves nothing behind.

    Raises:
        SettingsError: Something is missing, or given to a job that does not use it; the text names the option.
    """
    job = config.job
    for name in ("data", "test_data"):
        path = getattr(config, name)
        if path is not None and job not in FROM_FILES:
            raise SettingsError(
                f"{option(name)} does not belong to the job {job}, which makes its own problems, got {path!r}"
            )
        need_file(option(name), path)
    if job in FROM_FILES and config.data is None:
        raise SettingsError(f"the job {job} needs --data FILE, e.g. --data train.jsonl")
    if config.model_name_or_path is not None:
        folder = model_folder("--model-name-or-path", config.model_name_or_path)
        if config.use_peft and (folder / "adapter_config.json").exists():
            raise SettingsError(
                f"--use-peft cannot adapt what has an adapter: {folder} (the folder model of a run has it merged)"
            )
    elif config.use_peft:
        raise SettingsError("--use-peft needs --model-name-or-path DIR, the model to adapt")
    elif job in NEED_MODEL:
        raise SettingsError(f"the job {job} needs --model-name-or-path DIR, a model to train")
    for spec in (config.reward or "").split(","):
        need_reward_file(spec.strip())


def need_file(name: str, path: str | None) -> None:
    """Raises SettingsError if a file that an option names is not there."""
    if path is not None and not Path(path).is_file():
        raise SettingsError(f"{name}: no file {path!r}")


def need_reward_file(spec: str) -> None:
    """Raises SettingsError if a reward function is to come from a file that is not there."""
    file = reward_file(spec)
    need_file("--reward", file)
    if file is not None and Path(file).stat().st_mode & stat.S_IWOTH:
        raise SettingsError(
            f"--reward: anybody can write to {file}, and it would run as you (chmod o-w)"
        )


def reward_file(spec: str) -> str | None:
    """The file that a reward comes from; None if it comes from a module, the library or the job."""
    file = spec.rpartition(":")[0] if ":" in spec else spec
    return file if file.endswith(".py") else None


def model_folder(name: str, path: str) -> Path:
    """The folder of a model, which may be named by its run.

    Raises:
        SettingsError: It is none; nothing is ever fetched from a hub.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file():
            return folder
    what = "a folder without config.json" if Path(path).is_dir() else "no such folder"
    raise SettingsError(
        f"{name} must be a run, or a folder that `save_pretrained` wrote, got {path!r} ({what}; no hub is asked)"
    )
