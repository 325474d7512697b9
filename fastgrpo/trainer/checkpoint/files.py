"""Files that are on the disk when a call returns. Every system call of a save goes through `disk`.

Files are made 0600 and folders 0700 whatever the umask: a checkpoint holds prompts and completions of the user.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

Buffer = bytes | memoryview
File = tuple[str, Iterable[Buffer]]
"""A name and its content in pieces, which are asked for twice: to write them, and to compare what was written."""
Entry = tuple[int, str]
"""Size and SHA-256 of a file."""
CHUNK = 1 << 20
WORKERS = 4
"""Files that are written or hashed at once: SHA-256 takes as long as a fast disk, and hashlib lets threads run."""


class Disk:
    """The system calls that change a disk; tests put faults in their place."""

    def mkdir(self, path: Path) -> None:
        """Makes a folder that only its owner can read."""
        path.mkdir(mode=0o700)

    def open(self, path: Path) -> int:
        """Creates a file that only its owner can read; it must not exist."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        return os.open(path, flags, 0o600)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Writes some of the content; returns how much."""
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        """Waits until the disk has the file."""
        os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or folder another name in one step."""
        old.rename(new)


disk = Disk()


def write_file(path: Path, content: Iterable[Buffer]) -> Entry:
    """Creates a file of these pieces and waits until the disk has it; returns its size and SHA-256.

    Raises:
        OSError: It could not be written, or reads back with other bits than were written.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = disk.open(path)
    try:
        os.fchmod(descriptor, 0o600)
        for piece in content:
            left = memoryview(piece)
            size += len(left)
            while left:  # hashed while it is in the processor's cache
                written = disk.write(descriptor, left[:CHUNK])
                digest.update(left[:written])
                left = left[written:]
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not holds(path, content):
        raise OSError(f"{path.name} reads back with other bits than were written")
    return size, digest.hexdigest()


def holds(path: Path, content: Iterable[Buffer]) -> bool:
    """Whether a file is exactly these pieces. Much cheaper than a second hash."""
    with path.open("rb", buffering=0) as file:
        for piece in content:
            left = memoryview(piece)
            while left:
                block = bytearray(min(CHUNK, len(left)))
                count = file.readinto(block)
                if count != len(block):
                    del block[count:]
                if not block or block != left[: len(block)]:
                    return False
                left = left[len(block) :]
        return not file.read(1)


def write_files(folder: Path, files: Iterable[File]) -> dict[str, Entry]:
    """`write_file` of each, some at once. Of an iterator no more is asked for than is being written."""
    entries: dict[str, Entry] = {}
    free = threading.Semaphore(WORKERS)

    def write(name: str, content: Iterable[Buffer]) -> None:
        try:
            entries[name] = write_file(folder / name, content)
        finally:
            free.release()

    with ThreadPoolExecutor(WORKERS) as pool:
        running: list[Future[None]] = []
        for name, content in files:
            free.acquire()
            running.append(pool.submit(write, name, content))
    for done in running:
        done.result()
    return entries


def sync_folder(path: Path) -> None:
    """Waits until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Makes a folder and its parents; the folder itself is 0700."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def open_plain(path: Path, limit: int) -> BinaryIO:
    """A plain file of at most `limit` bytes, open for reading; never what a link or a device points to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    file = os.fdopen(descriptor, "rb", buffering=0)
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = f"{path.name} is not a plain file"
    elif status.st_size > limit:
        problem = f"{path.name} has {status.st_size} bytes, more than {limit}"
    if problem is not None:
        file.close()
        raise OSError(problem)
    return cast(BinaryIO, file)


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes."""
    with open_plain(path, limit) as file:
        return file.read()


def hash_file(path: Path, limit: int) -> tuple[int, str]:
    """Size and SHA-256 of a plain file, without holding it in memory."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with open_plain(path, limit) as file:
        while count := cast(Any, file).readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()
