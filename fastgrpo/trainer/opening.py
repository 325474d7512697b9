"""Which folder a run works in, and what it goes on from. Nothing here imports torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.trainer import rundir
from fastgrpo.trainer.checkpoint.lock import FolderLock, Locked
from fastgrpo.trainer.config import TrainConfig
from fastgrpo.trainer.settings import to_yaml


@dataclass(slots=True)
class Opened:
    """The folder of a run, held against other trainers."""

    folder: Path
    lock: FolderLock | None  # None: another process of the same run holds it
    resume: bool = False  # whether to look for a checkpoint
    source: Path | None = None  # a checkpoint, or a run that has some; None: this run's own


def open_run(config: TrainConfig) -> Opened:
    """Claims and locks the folder that the options name.

    Raises:
        RunDirError: It cannot be used, or another trainer works in it.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    folder, source = config.output_dir, None
    if config.resume not in ("auto", "never"):
        source = Path(config.resume)
        own = run_of(source)
        folder = folder or str(own)
    if folder is None and (config.resume == "auto" or processes > 1):
        why = "--resume auto" if config.resume == "auto" else "a run of several processes"
        raise rundir.RunDirError(f"{why} needs --output-dir")
    if os.environ.get("RANK", "0") != "0":
        assert folder is not None
        return Opened(Path(folder), None, config.resume != "never", source)
    if folder is None:
        path = rundir.claim(None, config.job, to_yaml(config), overwrite=False)
        return Opened(path, _lock(path))
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise rundir.RunDirError(f"output_dir {path} cannot be used: {error.strerror}") from None
    lock = _lock(path)
    try:
        if config.resume != "never" and not config.overwrite and (path / rundir.CONFIG).exists():
            rundir.write_text(path / rundir.CONFIG, to_yaml(config))
        else:
            rundir.claim(folder, config.job, to_yaml(config), config.overwrite)
    except BaseException:
        lock.release()
        raise
    return Opened(path, lock, config.resume != "never", source)


def _lock(path: Path) -> FolderLock:
    try:
        return FolderLock(path)
    except Locked as error:
        raise rundir.RunDirError(str(error)) from None
    except OSError as error:
        raise rundir.RunDirError(f"output_dir {path} cannot be locked: {error.strerror}") from None


def run_of(source: Path) -> Path:
    """The run folder that a path given to --resume belongs to."""
    if (source / rundir.CHECKPOINTS).is_dir():
        return source
    if source.is_dir() and source.parent.name == rundir.CHECKPOINTS:
        return source.parent.parent
    raise rundir.RunDirError(
        f"resume must be auto, never, a run with checkpoints, or one of its checkpoints, got {str(source)!r}"
    )
