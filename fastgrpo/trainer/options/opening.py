"""Which folder a run works in, and what it goes on from. Nothing here imports torch."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from fastgrpo.trainer.checkpoint.lock import FolderLock, Locked
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.settings import to_yaml
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.output.rundir import RunDirError


@dataclass(slots=True)
class Opened:
    """The folder of a run, held against other trainers."""

    folder: Path
    lock: FolderLock | None  # None: another process of the same run holds it
    resume: bool = False  # whether to look for a checkpoint
    source: Path | None = None  # a checkpoint, or a run that has some; None: this run's own


def check_folder(config: TrainConfig) -> None:
    """Refuses a folder that `open_run` would refuse, before anything is loaded. Writes nothing.

    Raises:
        RunDirError: It cannot be used, or `--resume` names nothing to go on from.
    """
    folder, source = _target(config)
    if folder is None or not is_first():
        return
    if not _goes_on(config, folder):
        rundir.check(folder, config.overwrite)
    own = config.resume == "auto" or (source is not None and run_of(source) == folder)
    if own and config.overwrite:
        raise RunDirError("--overwrite would delete what --resume goes on from: give one of them")


def open_run(config: TrainConfig) -> Opened:
    """Claims and locks the folder that the options name.

    Raises:
        RunDirError: As `check_folder`, or another trainer works in it.
    """
    check_folder(config)
    folder, source = _target(config)
    if not is_first():
        assert folder is not None
        return Opened(folder, None, config.resume != "never", source)
    if folder is None:
        path = rundir.claim(None, config.job, _saved(config), overwrite=False)
        return Opened(path, _lock(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"--output-dir {folder} cannot be used: {error.strerror}") from None
    lock = _lock(folder)
    try:
        if _goes_on(config, folder):
            rundir.write_text(folder / rundir.CONFIG, _saved(config))
        else:
            rundir.claim(folder, config.job, _saved(config), config.overwrite)
    except BaseException:
        lock.release()
        raise
    return Opened(folder, lock, config.resume != "never", source)


def _target(config: TrainConfig) -> tuple[Path | None, Path | None]:
    """The folder that the options name (None: the next free one), and what they say to go on from."""
    folder = None if config.output_dir is None else Path(config.output_dir)
    source = None
    if config.resume not in ("auto", "never"):
        source = Path(config.resume)
        folder = run_of(source) if folder is None else folder
    if folder is None and (config.resume == "auto" or os.environ.get("WORLD_SIZE", "1") != "1"):
        why = "--resume auto" if config.resume == "auto" else "a run of several processes"
        raise RunDirError(f"{why} needs --output-dir")
    return folder, source


def _goes_on(config: TrainConfig, folder: Path) -> bool:
    """Whether the run that the folder holds is to be taken up."""
    return config.resume != "never" and not config.overwrite and (folder / rundir.CONFIG).exists()


def _saved(config: TrainConfig) -> str:
    """The options that repeat the run: without what was said about the folder as it was found."""
    return to_yaml(replace(config, resume="never", overwrite=False))


def is_first() -> bool:
    """Whether this process is the only one of its run, or the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _lock(path: Path) -> FolderLock:
    try:
        return FolderLock(path)
    except Locked as error:
        raise RunDirError(str(error)) from None
    except OSError as error:
        raise RunDirError(f"--output-dir {path} cannot be locked: {error.strerror}") from None


def run_of(source: Path) -> Path:
    """The run folder that a path given to --resume belongs to."""
    if (source / rundir.CHECKPOINTS).is_dir():
        return source
    if source.is_dir() and source.parent.name == rundir.CHECKPOINTS:
        return source.parent.parent
    raise RunDirError(
        f"--resume must be auto, never, a run with checkpoints, or one of its checkpoints, got {str(source)!r}"
    )
