"""A rank that dies must end the others, and be named.

Without this a dead rank shows as a collective that never returns, or as a closed connection to nobody in particular.
Every rank writes a sign of life into the store that torchrun keeps, and watches those of the others.
"""

import contextlib
import os
import socket
import sys
import threading
import time

import torch.distributed as dist
from torch._C._distributed_c10d import Store

EXIT_CODE = 70
INTERVAL_S = 1.0
LATEST = 10
"""Ranks may start at different times: one that has never been there is given up after so many times `dead_after`."""
STORE = "the rendezvous store on the host of rank 0"


class Heartbeat:
    """A thread that beats and listens; ends the process if another rank is gone."""

    def __init__(self, store: Store, rank: int, world_size: int, dead_after: float) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._dead_after = dead_after
        self._seen = {other: ("", time.monotonic()) for other in self._others}
        self._end = threading.Event()
        self._answered = time.monotonic()
        self._say("alive")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat-guard", daemon=True).start()

    def _say(self, word: str) -> None:
        place = f"pid {os.getpid()} on host {socket.gethostname()}"
        self._store.set(str(self._rank), f"{word}|{place}|{time.monotonic()}")

    def _run(self) -> None:
        while not self._end.wait(INTERVAL_S):
            try:
                self._say("alive")
                problem = self._look()
            except RuntimeError as error:
                problem = f"{STORE} is gone ({str(error).splitlines()[0]})"
            self._answered = time.monotonic()
            if problem and not self._end.is_set():
                self._give_up(problem)

    def _guard(self) -> None:
        """The store's calls wait for ever if its host is frozen or cut off: the other thread then hangs in one."""
        while not self._end.wait(INTERVAL_S):
            if time.monotonic() - self._answered > self._dead_after:
                self._give_up(f"{STORE} has not answered for {self._dead_after:g} s")

    def _give_up(self, problem: str) -> None:
        text = (
            f"\nrank {self._rank}: {problem}. This rank ends too; the last checkpoint is whole.\n"
        )
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())
        os._exit(EXIT_CODE)

    def _look(self) -> str | None:
        """What is wrong with the first rank with which something is."""
        now = time.monotonic()
        for other in self._others:
            said = ""
            if self._store.check([str(other)]):
                said = self._store.get(str(other)).decode()
            before, since = self._seen[other]
            word, _, place = said.partition("|")
            place = place.partition("|")[0] or "it never started"
            if word == "failed":
                return f"rank {other} ({place}) has failed"
            if said != before or word == "done":
                self._seen[other] = (said, now)
            elif now - since > (patience := self._dead_after * (1 if said else LATEST)):
                return f"rank {other} ({place}) has shown no sign of life for {patience:g} s"
        return None

    def failed(self, error: BaseException) -> None:
        """Tells the others at once; if the error is that another rank is gone, first waits until that one is named."""
        broken = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if broken or "connection" in str(error).lower():
            self._end.wait(self._dead_after + 5 * INTERVAL_S)  # the thread ends the process
        self._finish("failed")

    def stop(self) -> None:
        """The others need not wait for this rank any more."""
        self._finish("done")

    def _finish(self, word: str) -> None:
        self._end.set()
        self._thread.join(timeout=10 * INTERVAL_S)
        with contextlib.suppress(RuntimeError):
            self._say(word)
