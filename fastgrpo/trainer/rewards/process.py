"""Users' reward functions, each in a process of its own with a hard time-out."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.trainer.data.foreign_text import presentable

START_TIMEOUT_S = 60.0
"""For importing the user's module, which may import much."""
LARGEST_ANSWER = 64 << 20
GRADING_S, GRADING_BYTES, GRADED_CHARACTERS = 3.0, 4 << 30, 10_000
"""What a `Grader` grants one completion; of a longer one it reads the end, where answers stand."""


class RewardFault(RuntimeError):
    """A reward function failed; the text names it and says how."""


class ProcessReward:
    """A reward function with TRL's signature that lives in a child process; killed and started afresh after a fault."""

    def __init__(self, spec: str, timeout_s: float, memory_bytes: int = 0) -> None:
        self.spec = spec
        self.name = spec.rpartition(":")[2].removesuffix(".py").rpartition("/")[2]
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes  # 0: no limit
        self.learns = False  # known once it runs: it is an object with `refit`
        self.state: bytes | None = None  # what it has learned
        self._child: subprocess.Popen[bytes] | None = None
        self._to = self._from = -1
        self._buffer = b""
        atexit.register(self.stop)

    def __call__(self, *, completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Scores a batch.

        Raises:
            RewardFault: the function raised, exited, ran past the time-out or returned something else than rewards.
        """
        self.start()
        rewards = self._ask("score", completions=list(completions), **columns).get("rewards")
        if not isinstance(rewards, list) or len(rewards) != len(completions):
            got = f"{len(rewards)} values" if isinstance(rewards, list) else type(rewards).__name__
            raise RewardFault(
                f"reward {self.name} must return {len(completions)} values, got {got}"
            )
        if not all(value is None or isinstance(value, int | float) for value in rewards):
            raise self._fault("wrote to the connection that its answers come by")
        return rewards

    def refit(self, **arguments: Any) -> None:
        """Has the object train on completions, and keeps what it has learned.

        Raises:
            RewardFault: as in a call; it goes on from what it had learned before.
        """
        self.start()
        try:
            self._ask("refit", **arguments)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state"
                self._ask("save", path=str(path))
                self.state = path.read_bytes()
        except RewardFault:
            self.stop()  # half trained
            raise

    def restore(self, state: bytes | None) -> None:
        """Starts afresh with what was learned up to some refit."""
        self.stop()
        self.state = state
        self.start()

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        request = json.dumps({"method": method, "arguments": arguments}) + "\n"
        deadline = time.monotonic() + self.timeout_s
        self._send(request.encode(), deadline)
        return self._receive(deadline, f"took longer than {self.timeout_s:g} s")

    def start(self) -> None:
        """Starts the child if none is running, and waits until it has loaded the function."""
        if self._child is not None and self._child.poll() is None:
            return
        self.stop()
        read_request, self._to = os.pipe()
        self._from, write_answer = os.pipe()
        module = "fastgrpo.trainer.rewards.child"
        self._child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                module,
                self.spec,
                *map(str, (read_request, write_answer, self.memory_bytes)),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(read_request, write_answer),
            start_new_session=True,  # so that whatever it starts can be killed with it
        )
        os.close(read_request)
        os.close(write_answer)
        os.set_blocking(self._to, False)
        answer = self._receive(
            time.monotonic() + START_TIMEOUT_S,
            f"did not load within {START_TIMEOUT_S:g} s",
            "cannot be loaded",
        )
        self.learns = answer["learns"]
        if self.state is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state"
                path.write_bytes(self.state)
                self._ask("load", path=str(path))

    def stop(self) -> None:
        """Ends the child and all that it has started."""
        if self._child is not None:
            for pid in descendants(self._child.pid):  # those that have left the group
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._child = None
        for fd in (self._to, self._from):
            if fd >= 0:
                os.close(fd)
        self._to = self._from = -1
        self._buffer = b""

    def _fault(self, what: str) -> RewardFault:
        self.stop()
        return RewardFault(f"reward {self.name} {what}")

    def _send(self, data: bytes, deadline: float) -> None:
        sent = 0
        while sent < len(data):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [self._to], [], left)[1]:
                raise self._fault(f"took longer than {self.timeout_s:g} s")
            try:
                sent += os.write(self._to, data[sent : sent + 65536])
            except BrokenPipeError:
                raise self._fault(self._ended()) from None

    def _receive(self, deadline: float, too_late: str, failed: str = "failed") -> dict[str, Any]:
        """One answer of the child; the texts say what it means if there is none, or a bad one."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise self._fault(too_late)
            chunk = os.read(self._from, 1 << 16)
            if not chunk:
                raise self._fault(self._ended())
            self._buffer += chunk
            if len(self._buffer) > LARGEST_ANSWER:
                raise self._fault("returned more than 64 MB")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
            error = answer.get("error")
        except (ValueError, AttributeError, RecursionError):
            raise self._fault("wrote to the connection that its answers come by") from None
        if error is not None:
            raise RewardFault(presentable(f"reward {self.name} {failed}: {error}"))
        return answer

    def _ended(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs; where Linux does not tell, none."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


class Grader:
    """A library's reward on texts of a model, one completion at a time: hostile ones bring it to a halt.

    A completion on which it hangs, crashes or needs too much memory scores 0; all others keep their scores.
    """

    def __init__(self, spec: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._reward = ProcessReward(spec, min(timeout_s, GRADING_S), GRADING_BYTES)

    def __call__(
        self, *, completions: Sequence[str], answer: Sequence[str], **_: Any
    ) -> list[float | None]:
        """Scores completions against the `answer` column.

        Raises:
            RewardFault: so many completions hang that the batch takes longer than the time-out.
        """
        end, rewards = time.monotonic() + self.timeout_s, list[float | None]()
        for text, gold in zip(completions, answer, strict=True):
            if time.monotonic() > end:
                name = self._reward.name
                raise RewardFault(
                    f"reward {name} took longer than {self.timeout_s:g} s for {len(completions)} completions"
                )
            try:
                rewards += self._reward(completions=[text[-GRADED_CHARACTERS:]], answer=[gold])
            except RewardFault:
                rewards.append(0.0)
        return rewards

    def stop(self) -> None:
        """Ends the child."""
        self._reward.stop()
