"""The folder of a run: claimed without overwriting another run, and filled so that every file is whole or absent."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

CONFIG, METRICS, SUMMARY, REPORT, MODEL, CHECKPOINTS = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "model",
    "checkpoints",
)
LOCK = ".lock"
OWN_FILES = (CONFIG, METRICS, SUMMARY, REPORT, MODEL, CHECKPOINTS)


class RunDirError(ValueError):
    """The output folder cannot be used; its text is for the user."""


def check(path: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot hold a new run. Writes nothing."""
    if path.exists() and not path.is_dir():
        raise RunDirError(f"--output-dir {path} is a file")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise RunDirError(f"--output-dir {path} cannot be written: no permission in {there}")
    held = _held(path)
    if held and not overwrite:
        raise RunDirError(
            f"--output-dir {path} holds another run ({', '.join(held)}): "
            "choose another, or pass --resume auto to go on with it, or --overwrite to replace it"
        )


def claim(output_dir: Path | None, name: str, config_yaml: str, overwrite: bool) -> Path:
    """Makes the folder of a run and writes its config, the file by which it counts as taken.

    Without `output_dir` it is runs/<name>, or the first free of runs/<name>-2, -3, ...; `runs/latest` points to it.
    """
    if output_dir is None:
        return _claim_next(Path("runs"), name, config_yaml)
    check(output_dir, overwrite)
    for file in _held(output_dir):
        target = output_dir / file
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
    if not _take(output_dir, config_yaml):
        raise RunDirError(f"--output-dir {output_dir} was taken by another run just now")
    return output_dir


def _held(path: Path) -> list[str]:
    return [file for file in OWN_FILES if (path / file).exists()]


def _claim_next(root: Path, name: str, config_yaml: str) -> Path:
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        if not _held(path) and _take(path, config_yaml):
            break
        number += 1
    link = root / "latest"
    if link.is_symlink() or not link.exists():
        fresh = root / f".latest-{os.getpid()}"
        fresh.symlink_to(path.name)
        fresh.replace(link)
    return path


def _take(path: Path, config_yaml: str) -> bool:
    """Whether the config could be created: of two runs that want one folder, one wins."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / CONFIG).open("x", encoding="utf-8") as file:
            file.write(config_yaml)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirError(f"{path} cannot be written: {error.strerror}") from None
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece: readers see the old one or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(text)
    Path(file.name).chmod(0o600)
    Path(file.name).replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_text` of JSON; numbers that JSON cannot hold become null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def finite(value: Any) -> Any:
    """The same content with NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
