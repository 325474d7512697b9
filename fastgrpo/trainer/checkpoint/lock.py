"""One trainer per output folder: a lock that the kernel lets go when its holder dies, with pid and host for people."""

import contextlib
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from fastgrpo.trainer.output import rundir

NAME = rundir.LOCK


class Locked(ValueError):
    """Another trainer works in the folder; the text says which."""


class FolderLock:
    """Held from construction to `release` (or the death of the process)."""

    def __init__(self, folder: Path, note: Callable[[str], None] = print) -> None:
        self.path = folder / NAME
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(self.path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise Locked(f"{self.path} is not a plain file")
            self._take(note)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self, note: Callable[[str], None]) -> None:
        holder = os.read(self._descriptor, 4096).decode(errors="replace")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(
                f"--output-dir {self.path.parent} is in use by another trainer ({describe(holder)})"
            ) from None
        if holder.strip():  # whoever ends in order empties the file
            note(f"{self.path.parent}: the last trainer was killed ({describe(holder)})")
        os.ftruncate(self._descriptor, 0)
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.pwrite(self._descriptor, mine.encode(), 0)

    def release(self) -> None:
        """Lets go."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def describe(holder: str) -> str:
    """Pid and host of a lock's content."""
    try:
        content = json.loads(holder)
        return f"pid {int(content['pid'])} on host {str(content['host'])[:255]!r}"
    except (ValueError, KeyError, TypeError):
        return "it has not written its pid"
