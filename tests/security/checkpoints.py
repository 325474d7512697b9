"""Checkpoints that somebody made to do harm: each names a change of a good one, signed anew like any other.

`cases(canary)` yields (name, change of a folder). What is unpickled or executed creates the file `canary`.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastgrpo.trainer.checkpoint import manifest
from fastgrpo.trainer.checkpoint.files import hash_file

Change = Callable[[Path], None]
TENSOR_FILES = ("model", "reference", "optimizer", "rank-0", "trainer")
STATE_FILES = ("trainer", "rank-0", "optimizer")


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
    """Makes the manifest say what the folder now holds, whatever that is, and then what `change` makes of it."""
    content = json.loads((folder / manifest.NAME).read_bytes())
    del content["sha256"]
    for name in content["files"]:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            size, sha = hash_file(path, 1 << 40)
            content["files"][name] = {"bytes": size, "sha256": sha}
    change(content)
    try:
        body = manifest.canonical(content)
        whole = manifest.canonical({**content, "sha256": manifest.digest(body)})
    except ValueError:  # NaN, which no canonical manifest has
        whole = json.dumps(content).encode()
    (folder / manifest.NAME).write_bytes(whole)


class Payload:
    """Touches the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def header(content: object, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(kind: str = "F32", shape: object = (4,), at: object = (0, 16)) -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": at}}


def torch_zip(canary: Path) -> bytes:
    """What `torch.save` writes, with a payload."""
    file = io.BytesIO()
    torch.save({"a": Payload(canary)}, file)
    return file.getvalue()


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * (64 << 20))
    return file.getvalue()


def contents(canary: Path) -> dict[str, bytes]:
    """What stands in place of a safetensors file."""
    one = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    two = {**tensor(), "b": tensor(at=(8, 24))["a"]}
    return {
        "pickle": pickle.dumps(Payload(canary)),
        "pickle protocol 0": pickle.dumps(Payload(canary), protocol=0),
        "torch.save": torch_zip(canary),
        "zip bomb": zip_bomb(),
        "gzip bomb": gzip.compress(b"\0" * (64 << 20)),
        "nothing": b"",
        "three bytes": b"\1\2\3",
        "header of 2^63": header(b"{}", length=1 << 63),
        "header of 2^64 - 1": header(b"{}", length=(1 << 64) - 1),
        "header of 100 GB": header(b"{}", length=100 << 30),
        "header of 99 MB": header(b"{", length=99 << 20),
        "header is no JSON": header(b"not json"),
        "header is a list": header([1, 2]),
        "header is null": header(None),
        "header in UTF-16": header("{}".encode("utf-16")),
        "header with NUL": header(b'{"a\0": 1}'),
        "header of 100,000 brackets": header(b"[" * 100_000),
        "duplicate keys": header(b"{" + one + b"," + one + b"}", b"\0" * 16),
        "negative offsets": header(tensor(at=(-16, 0))),
        "reversed offsets": header(tensor(at=(16, 0))),
        "offsets beyond the end": header(tensor(at=(0, 1 << 40))),
        "offsets of 2^64": header(tensor(at=(0, 1 << 64))),
        "offsets are text": header(tensor(at=("0", "16"))),
        "three offsets": header(tensor(at=(0, 8, 16))),
        "overlapping tensors": header(two, b"\0" * 24),
        "a gap between tensors": header({**tensor(), "b": tensor(at=(32, 48))["a"]}, b"\0" * 48),
        "bytes left over": header(tensor(), b"\0" * 64),
        "unknown dtype": header(tensor("PICKLE"), b"\0" * 16),
        "dtype is a number": header({"a": {"dtype": 7, "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        "dtype of another size": header(tensor("F64"), b"\0" * 16),
        "negative shape": header(tensor(shape=(-4,)), b"\0" * 16),
        "shape that overflows": header(tensor(shape=(1 << 62, 4)), b"\0" * 16),
        "shape of floats": header(tensor(shape=(4.0,)), b"\0" * 16),
        "1000 dimensions": header(tensor(shape=(1,) * 999 + (4,)), b"\0" * 16),
        "metadata is a list": header({"__metadata__": [1], **tensor()}, b"\0" * 16),
        "metadata of another reader": header(
            {"__metadata__": {"DCP_SHARDING_INFO": "{\"a\":{\"saved_offsets\":[4611686018427387904]}}"}, **tensor()},
            b"\0" * 16,
        ),
        "another tensor": header(tensor(), b"\0" * 16),
    }  # fmt: skip


def states() -> dict[str, bytes]:
    """What stands in place of a JSON part."""

    def part(state: object, aliases: object = None) -> bytes:
        return json.dumps({"state": state, "aliases": aliases or {}}).encode()

    return {
        "no JSON": b"cos\nsystem\n",
        "a list": b"[]",
        "null": b"null",
        "NaN": b'{"state": NaN, "aliases": {}}',
        "a state of null": part(None),
        "a state of text": part("x"),
        "no state": b"{}",
        "deep": b"[" * 200_000,
        "deep state": b'{"aliases": {}, "state": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "unknown mark": part({"$": "object", "class": "os.system"}),
        "mark of a class": part({"$": ["tensor"]}),
        "tensor that is not there": part({"$": "tensor", "name": "../../x"}),
        "tensor without a name": part({"$": "tensor"}),
        "alias of itself": part({}, {"a": "a"}),
        "alias of nothing": part({}, {"a": "b"}),
        "aliases are a list": part({}, [1]),
        "bytes that are no hex": part({"$": "bytes", "value": "zz"}),
        "float that is none": part({"$": "float", "value": "__import__('os')"}),
        "pairs of three": part({"$": "dict", "items": [[1, 2, 3]]}),
        "unhashable key": part({"$": "dict", "items": [[[1], 2]]}),
        "huge number": b'{"aliases": {}, "state": ' + b"9" * 100_000 + b"}",
    }


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the state of a JSON part."""

    def apply(folder: Path) -> None:
        path = folder / f"{name}.json"
        content = json.loads(path.read_bytes())
        change(content["state"])
        path.write_bytes(json.dumps(content).encode())
        sign(folder)

    return apply


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "step is text": ("trainer", lambda s: s.update(step="1")),
    "step is a list": ("trainer", lambda s: s.update(step=[1])),
    "step is infinite": ("trainer", lambda s: s.update(step={"$": "float", "value": "inf"})),
    "no config": ("trainer", lambda s: s.pop("config")),
    "config is null": ("trainer", lambda s: s.update(config=None)),
    "another job": ("trainer", lambda s: s["config"].update(job="gsm8k")),
    "no progress": ("trainer", lambda s: s.pop("progress")),
    "a billion streams": ("trainer", lambda s: s.update(num_streams=10**9)),
    "streams are text": ("trainer", lambda s: s.update(num_streams="2")),
    "no streams": ("trainer", lambda s: s.update(num_streams=0)),
    "with_grad is a number": ("trainer", lambda s: s.update(with_grad=3)),
    "replay of another kind": ("trainer", lambda s: s.update(replay={"x": 1})),
    "no random numbers": ("rank-0", lambda s: s.pop("rng")),
    "random numbers are text": ("rank-0", lambda s: s.update(rng="x")),
    "random words of another length": ("rank-0", lambda s: s["rng"]["python"].update(words=[1])),
    "no streams of this rank": ("rank-0", lambda s: s.update(streams={})),
    "batch is null": ("rank-0", lambda s: s.update(scored=None)),
    "batch has other fields": ("rank-0", lambda s: s.update(scored={"__class__": "os.system"})),
    "batch is empty": ("rank-0", lambda s: s["scored"].update(portions=[])),
    "moments of a parameter that is not there": (
        "optimizer",
        lambda s: s["state"].setdefault("items", []).append([10**6, {"step": "x"}]),
    ),
    "moments are text": ("optimizer", lambda s: s.update(state="x")),
    "no groups": ("optimizer", lambda s: s.update(param_groups=[])),
}  # fmt: skip


def forged(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: sign(folder, change)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "step is text": lambda m: m.update(step="1"),
    "step is true": lambda m: m.update(step=True),
    "step is negative": lambda m: m.update(step=-1),
    "step of 10^400": lambda m: m.update(step=10**400),
    "update is a float": lambda m: m.update(update=2.0),
    "no world": lambda m: m.update(world_size=0),
    "world is text": lambda m: m.update(world_size="1"),
    "world of a billion": lambda m: m.update(world_size=10**9),
    "files are a list": lambda m: m.update(files=[]),
    "files are null": lambda m: m.update(files=None),
    "no files": lambda m: m.update(files={}),
    "a file is a number": lambda m: m["files"].update({"trainer.json": 5}),
    "size is negative": lambda m: m["files"]["trainer.json"].update(bytes=-1),
    "size is a float": lambda m: m["files"]["trainer.json"].update(bytes=1e9),
    "size of 2^70": lambda m: m["files"]["trainer.json"].update(bytes=2**70),
    "hash is null": lambda m: m["files"]["trainer.json"].update(sha256=None),
    "hash is short": lambda m: m["files"]["trainer.json"].update(sha256="00"),
    "parent folder": lambda m: m["files"].update({"../x": m["files"]["trainer.json"]}),
    "absolute name": lambda m: m["files"].update({"/etc/passwd": m["files"]["trainer.json"]}),
    "name with a slash": lambda m: m["files"].update({"a/b": m["files"]["trainer.json"]}),
    "name of a folder": lambda m: m["files"].update({"..": m["files"]["trainer.json"]}),
    "its own name": lambda m: m["files"].update({manifest.NAME: m["files"]["trainer.json"]}),
    "empty name": lambda m: m["files"].update({"": m["files"]["trainer.json"]}),
    "name with a line feed": lambda m: m["files"].update({"x\n": m["files"]["trainer.json"]}),
    "name with NUL": lambda m: m["files"].update({"x\0y": m["files"]["trainer.json"]}),
    "newer format": lambda m: m.update(format=99),
    "format is text": lambda m: m.update(format="1"),
    "NaN": lambda m: m.update(step=float("nan")),
}  # fmt: skip


def replaced(name: str, make: Callable[[Path], object]) -> Change:
    """Puts something that is no plain file in the place of one."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)
        sign(folder)

    return apply


def planted(folder: Path) -> None:
    """A tensor file beside the others that the manifest does not know."""
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    sign(folder)


def link_in_the_folder(folder: Path) -> None:
    (folder / "extra.safetensors").symlink_to("/etc/passwd")
    sign(folder)


def rewritten(name: str, content: bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder)

    return apply


def cases(canary: Path) -> Iterator[tuple[str, Change]]:
    """Every change by name."""
    for name, edit in MANIFESTS.items():
        yield f"manifest: {name}", forged(edit)
    for file in TENSOR_FILES:
        for name, content in contents(canary).items():
            if file in ("model", "trainer") or "pickle" in name or "header of" in name:
                yield f"{file}.safetensors: {name}", rewritten(f"{file}.safetensors", content)
    for file in STATE_FILES:
        for name, content in states().items():
            yield f"{file}.json: {name}", rewritten(f"{file}.json", content)
    for name, (file, edit) in EDITS.items():
        yield f"{file}: {name}", edited(file, edit)
    kinds: dict[str, Callable[[Path], object]] = {
        "link to a file": lambda path: path.symlink_to("/etc/passwd"),
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }
    for file in ("model.safetensors", "trainer.json", manifest.NAME):
        for name, make in kinds.items():
            if file == manifest.NAME:
                yield f"{file}: {name}", lambda folder, make=make: _replace_manifest(folder, make)
            else:
                yield f"{file}: {name}", replaced(file, make)
    yield "folder: a tensor file that was not saved", planted
    yield "folder: a link that was not saved", link_in_the_folder


def _replace_manifest(folder: Path, make: Callable[[Path], object]) -> None:
    (folder / manifest.NAME).unlink()
    make(folder / manifest.NAME)
