"""Signals are obeyed at safe points, not in the middle of a step."""

import os
import signal
from types import FrameType

from fastgrpo.trainer.parallel.distributed import Ranks

STOPPING = b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n"


class Interrupted(Exception):
    """The user asked to stop; raised where stopping leaves everything in order."""


class Interrupt:
    """Ctrl-C and SIGTERM stop, SIGUSR1 asks for a checkpoint; remembered until `check`. A second Ctrl-C stops at once.

    SIGTERM may come twice (launchers pass it on to processes that had it already), so it never stops at once.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.signal: int | None = None
        self.save_wanted = False
        self._ranks = ranks or Ranks()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.getsignal(number) for number in numbers}

    def __enter__(self) -> "Interrupt":
        for number in self._previous:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_wanted = True
            return
        self.signal = number
        os.write(2, STOPPING)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])

    def agree(self) -> bool:
        """All ranks obey what any of them was told; returns whether a checkpoint was asked for since the last time."""
        number, wanted = self._ranks.maxima([self.signal or 0, int(self.save_wanted)])
        self.signal = number or None
        self.save_wanted = False
        return bool(wanted)

    def check(self) -> None:
        """Raises `Interrupted` if the user has asked to stop."""
        if self.signal is not None:
            raise Interrupted

    @property
    def exit_code(self) -> int:
        """The exit code a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)
