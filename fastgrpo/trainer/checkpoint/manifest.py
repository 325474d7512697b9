"""The manifest of a checkpoint: what it consists of, to the bit. A checkpoint without a valid one does not exist."""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastgrpo.trainer.checkpoint.files import hash_file, read_file

FORMAT = 2
NAME = "manifest.json"
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
LIMIT_BYTES = 16 << 20
PACKAGES = ("fastgrpo", "torch", "transformers", "safetensors", "numpy")


class Invalid(ValueError):
    """A checkpoint that must not be used; its text says why."""


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: reading compares byte by byte, so a flipped bit anywhere shows."""
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def digest(content: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def make(position: tuple[int, int], files: Mapping[str, tuple[int, str]], world_size: int) -> bytes:
    """The manifest of `files` (name -> size, SHA-256) at (step, update)."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": position[0],
        "update": position[1],
        "world_size": world_size,
        "files": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in files.items()},
        "versions": versions(),
    }
    return canonical({**content, "sha256": digest(canonical(content))})


def versions() -> dict[str, str]:
    """Versions of what decides the bits."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "?"
    return found


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself checked.

    Raises:
        Invalid: It is missing, damaged, of a newer format, or names files that no checkpoint of ours has.
    """
    try:
        raw = read_file(folder / NAME, LIMIT_BYTES)
    except FileNotFoundError:
        raise Invalid(f"{NAME} is missing: the save was not finished") from None
    except OSError as error:
        raise Invalid(f"{NAME} cannot be read: {error}") from None
    try:
        content = json.loads(raw)
        stated = content["sha256"]
        if raw != canonical(content):
            raise ValueError("not in canonical form")
        if stated != digest(canonical({k: v for k, v in content.items() if k != "sha256"})):
            raise ValueError("its own SHA-256 does not match")
        if content["format"] != FORMAT:
            newer = f"format {content['format']}, this fastgrpo reads {FORMAT}"
            raise Invalid(f"{NAME} has {newer}")
        _check_content(content)
    except Invalid:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Invalid(f"{NAME} is damaged: {error}") from None
    checked: dict[str, Any] = content
    return checked


def _check_content(content: Mapping[str, Any]) -> None:
    """Types and ranges of what is read from a manifest: whoever can write one can also sign it."""
    for name, least in (("step", 0), ("update", -1), ("world_size", 1)):
        if type(content[name]) is not int or content[name] < least:
            raise ValueError(f"{name} is {content[name]!r}")
    for name, entry in content["files"].items():
        if not SAFE_NAME.match(name) or name in (".", "..", NAME):
            raise ValueError(f"unsafe file name {name!r}")
        size, sha = entry["bytes"], entry["sha256"]
        if type(size) is not int or size < 0 or not SHA256.match(sha):
            raise ValueError(f"size or SHA-256 of {name} is malformed")


def unlisted(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Tensor files that lie in the folder and were not saved there."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    return [name for name in found if name not in manifest["files"]]


def read_verified(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """The content of a file of the checkpoint, if it is what was saved.

    Raises:
        Invalid: The file is missing, has another size or other bits.
    """
    expected = _expected(manifest, name)
    with _named(name):
        content = read_file(folder / name, expected["bytes"])
    _compare(name, expected, len(content), digest(content))
    return content


def verify(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """`read_verified` without keeping the content."""
    expected = _expected(manifest, name)
    with _named(name):
        size, sha = hash_file(folder / name, expected["bytes"])
    _compare(name, expected, size, sha)


def _expected(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    expected: dict[str, Any] | None = manifest["files"].get(name)
    if expected is None:
        raise Invalid(f"{name} is not part of it")
    return expected


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise Invalid(f"{name} is missing") from None
    except OSError as error:
        raise Invalid(f"{name} cannot be read: {error}") from None


def _compare(name: str, expected: Mapping[str, Any], size: int, sha: str) -> None:
    if size != expected["bytes"]:
        raise Invalid(f"{name} has {size} bytes instead of {expected['bytes']}")
    if sha != expected["sha256"]:
        raise Invalid(f"{name} is damaged: its SHA-256 is not the one that was saved")
