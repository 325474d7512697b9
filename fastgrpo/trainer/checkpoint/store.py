"""The folder of checkpoints: saving, finding the newest that is whole, pruning.

A checkpoint is written into `.tmp-...`, its manifest last, and renamed to `step-N` (`step-N.uK` in the middle of a
step, after K updates) once the disk has all of it. So a name without a dot in front is a finished save, and what its
manifest states is what must be found. A damaged one is named and passed over, never deleted.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fastgrpo.trainer.checkpoint import manifest, tree
from fastgrpo.trainer.checkpoint.files import (
    WORKERS,
    Entry,
    File,
    disk,
    make_private,
    sync_folder,
    write_file,
    write_files,
)

Position = tuple[int, int]
"""(GRPO steps done, updates done of the step that has begun; -1 between steps)."""
Entries = dict[str, Entry]
NAME = re.compile(r"step-([0-9]{1,12})(?:\.u([0-9]{1,6}))?\Z")
LEFTOVERS = re.compile(r"\.(tmp|trash)-step-")
BETWEEN_STEPS = -1


def name_of(position: Position) -> str:
    """The folder name of a position."""
    step, update = position
    return f"step-{step}" if update == BETWEEN_STEPS else f"step-{step}.u{update}"


def position_of(name: str) -> Position | None:
    """The position that a folder name stands for."""
    match = NAME.match(name)
    if match is None:
        return None
    return int(match[1]), BETWEEN_STEPS if match[2] is None else int(match[2])


class Checkpoint:
    """A verified checkpoint: parts are read, and compared with the manifest once more, when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = manifest.read(path)
        self.position: Position = (self.manifest["step"], self.manifest["update"])
        self.world_size: int = self.manifest["world_size"]
        if name_of(self.position) != path.name:
            raise manifest.Invalid(f"its {manifest.NAME} belongs to {name_of(self.position)}")

    def verify(self) -> None:
        """Reads every file; raises `Invalid` naming the first that is not as saved."""
        with ThreadPoolExecutor(WORKERS) as pool:
            list(
                pool.map(partial(manifest.verify, self.path, self.manifest), self.manifest["files"])
            )

        foreign = manifest.unlisted(self.path, self.manifest)
        if foreign:  # the reader of tensors takes every file that it finds
            raise manifest.Invalid(f"{foreign[0]} is not part of it")

    def part(self, part: str) -> Any:
        """The nested state of a part."""
        tensors = manifest.read_verified(self.path, self.manifest, f"{part}.safetensors")
        return tree.decode(tensors, self._text(part))

    def form(self, part: str) -> Any:
        """`part` with the names of its tensors in their places."""
        return tree.decode_form(self._text(part))

    def _text(self, part: str) -> bytes:
        return manifest.read_verified(self.path, self.manifest, f"{part}.json")


class Store:
    """Checkpoints of one run; at most `limit` are kept (0: all)."""

    def __init__(self, folder: Path, limit: int, rank: int = 0, world_size: int = 1) -> None:
        self.folder = folder
        self.limit = limit
        self.rank = rank
        self.world_size = world_size

    def save(
        self,
        position: Position,
        files: Iterable[File],
        share: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = lambda mine: [dict(mine)],
    ) -> Path:
        """Writes this rank's files; rank 0 finishes the checkpoint. `share` hands what each rank says to all ranks.

        Raises:
            OSError: Some rank could not write; earlier checkpoints are as they were.
        """
        target = self.folder / name_of(position)
        draft = self.folder / share({"draft": f".tmp-{target.name}-{os.getpid()}"})[0]["draft"]
        problem = self._attempt(lambda: self._open_draft(draft) if self.rank == 0 else None)
        self._agree(share, problem, draft)
        entries: Entries = {}
        problem = self._attempt(lambda: self._write(draft, files, entries))
        everyone = self._agree(share, problem, draft, entries)
        problem = None
        if self.rank == 0:
            problem = self._attempt(lambda: self._finish(draft, target, position, everyone))
        self._agree(share, problem, draft)
        if self.rank == 0:
            self.prune(position)
        return target

    @staticmethod
    def _attempt(action: Callable[[], None]) -> OSError | None:
        try:
            action()
        except OSError as error:
            return error
        return None

    def _agree(
        self,
        share: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
        problem: OSError | None,
        draft: Path,
        entries: Entries | None = None,
    ) -> Entries:
        """All ranks go on, with the entries of all, or none does."""
        told = share({"problem": problem and str(problem), "entries": entries or {}})
        failed = [(rank, t["problem"]) for rank, t in enumerate(told) if t["problem"]]
        if failed:
            if self.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            if problem is not None and len(told) == 1:
                raise problem
            raise OSError(f"rank {failed[0][0]}: {failed[0][1]}")
        return {name: (size, sha) for t in told for name, (size, sha) in t["entries"].items()}

    def _open_draft(self, draft: Path) -> None:
        make_private(self.folder)
        shutil.rmtree(draft, ignore_errors=True)
        disk.mkdir(draft)

    def _write(self, draft: Path, files: Iterable[File], entries: Entries) -> None:
        def safe() -> Iterator[File]:
            for name, content in files:
                if not manifest.SAFE_NAME.match(name):
                    rule = f"must match {manifest.SAFE_NAME.pattern}"
                    raise ValueError(f"file name {rule}, got {name!r}")
                yield name, content

        entries.update(write_files(draft, safe()))

    def _finish(self, draft: Path, target: Path, position: Position, entries: Entries) -> None:
        sync_folder(draft)
        write_file(draft / manifest.NAME, [manifest.make(position, entries, self.world_size)])
        sync_folder(draft)
        if target.exists():  # this step was saved before, and then left behind or damaged
            disk.rename(target, self._aside(target))
        disk.rename(draft, target)
        sync_folder(self.folder)

    @staticmethod
    def _aside(path: Path) -> Path:
        return path.with_name(f"replaced-{path.name}-{time.time_ns()}")

    def names(self) -> list[Path]:
        """Finished saves, newest first, whether whole or not."""
        if not self.folder.is_dir():
            return []
        found = [(position_of(path.name), path) for path in self.folder.iterdir()]
        dated = [(at, path) for at, path in found if at is not None and not path.is_symlink()]
        # between steps N and N+1 the position is (N, -1); a save in the middle of step N+1 is (N, k) and newer
        return [path for _, path in sorted(dated, reverse=True)]

    def newest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; `note` is told why a newer one was passed over."""
        for path in self.names():
            try:
                checkpoint = Checkpoint(path)
                checkpoint.verify()
            except manifest.Invalid as error:
                note(f"checkpoint {path} is not used: {error}")
                continue
            return checkpoint
        return None

    def set_aside(self, after: Position) -> list[Path]:
        """Renames whole checkpoints newer than `after`: the run that goes on from there is another one."""
        moved = []
        for path in self.names():
            at = position_of(path.name)
            if at is not None and at > after:
                with contextlib.suppress(manifest.Invalid):
                    Checkpoint(path)
                    disk.rename(path, self._aside(path))
                    moved.append(path)
        if moved:
            sync_folder(self.folder)
        return moved

    def prune(self, newest: Position) -> None:
        """Deletes the oldest checkpoints beyond the limit. Damaged and newer ones stay."""
        if self.limit == 0:
            return
        whole = []
        for path in self.names():
            at = position_of(path.name)
            with contextlib.suppress(manifest.Invalid):
                if at is not None and at <= newest:
                    Checkpoint(path)
                    whole.append(path)
        for path in whole[self.limit :]:
            trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
            with contextlib.suppress(OSError):  # an old checkpoint too many is no reason to stop
                disk.rename(path, trash)
                shutil.rmtree(trash)

    def clean(self) -> None:
        """Removes what a killed save or prune left. Only for the one trainer that holds the folder's lock."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if LEFTOVERS.match(path.name) and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
