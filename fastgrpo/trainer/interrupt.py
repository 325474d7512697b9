"""Ctrl-C between two steps, not in the middle of one."""

import os
import signal
from types import FrameType


class Interrupted(Exception):
    """The user asked to stop; raised where stopping leaves everything in order."""


class Interrupt:
    """The first Ctrl-C (or SIGTERM) is remembered until `check`; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __enter__(self) -> "Interrupt":
        for number in self._previous:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if the user has asked to stop."""
        if self.signal is not None:
            raise Interrupted

    @property
    def exit_code(self) -> int:
        """The exit code a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)
