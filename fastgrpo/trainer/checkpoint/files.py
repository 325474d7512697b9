"""Files that are on the disk when a call returns. Every system call of a save goes through `disk`.

Files are made 0600 and folders 0700 whatever the umask: a checkpoint holds prompts and completions of the user.
"""

import os
import stat
from pathlib import Path

CHUNK = 16 << 20


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


def write_file(path: Path, content: bytes) -> None:
    """Creates a file and waits until the disk has it."""
    descriptor = disk.open(path)
    try:
        os.fchmod(descriptor, 0o600)
        left = memoryview(content)
        while left:
            left = left[disk.write(descriptor, left[:CHUNK]) :]
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes; never those a link or a device points to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is not a plain file")
        if status.st_size > limit:
            raise OSError(f"{path.name} has {status.st_size} bytes, more than {limit}")
        return file.read()
