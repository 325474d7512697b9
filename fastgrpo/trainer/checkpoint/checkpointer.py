"""When a run saves, and how it goes on from what it saved."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastgrpo.trainer.checkpoint.contents import (
    all_finite,
    contents,
    model_files,
    position,
    restore,
)
from fastgrpo.trainer.checkpoint.files import File
from fastgrpo.trainer.checkpoint.manifest import Invalid
from fastgrpo.trainer.checkpoint.staging import Staging
from fastgrpo.trainer.checkpoint.store import Checkpoint, Position, Store, name_of
from fastgrpo.trainer.checkpoint.tree import StateError
from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.options.opening import Opened, run_of
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.rewards.process import RewardFault
from fastgrpo.trainer.state import State

MALFORMED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError),
    *(RuntimeError, TypeError, ValueError, SafetensorError),
)
"""What content that nobody checks field by field leads to, where it is not what a run saves."""


@dataclass(frozen=True, slots=True)
class _Save:
    place: Position
    written: Future[Path]
    announce: bool


class Checkpointer:
    """The checkpoints of one run in `<output_dir>/checkpoints`.

    With `async_save` a save returns once the state is copied; another thread writes it, reads it back and names it.
    One is under way at a time: the next waits for it, and so does `finish`.
    """

    def __init__(
        self,
        state: State,
        opened: Opened,
        note: Callable[[str], None],
        sync_metrics: Callable[[], object] = lambda: None,
    ) -> None:
        config, ranks = state.run.config, state.run.ranks
        folder = opened.folder / rundir.CHECKPOINTS
        self.state = state
        self.store = Store(folder, config.save_total_limit, ranks.rank, ranks.world_size)
        self.last: Path | None = None  # what the last save left, if it did not fail
        self.seconds = 0.0  # that training has waited
        self._opened = opened
        self._note = note
        self._sync_metrics = sync_metrics
        self._model_files = model_files(state.run) if ranks.is_main else []
        self._staging, self._threads, self._ranks = None, None, ranks
        if config.async_save:
            self._staging, self._threads = Staging(), ThreadPoolExecutor(1, "checkpoint")
            self._ranks = ranks.apart()
        self._running: _Save | None = None
        if ranks.is_main:
            self.store.clean()
        ranks.wait()

    def save(self, progress: dict[str, Any], announce: bool = False) -> None:
        """Saves the state as it is, with a loud note if that fails; `announce`: also says where. Every rank has to call
        this.
        """
        begun = time.perf_counter()
        self.finish()
        place, ranks = position(self.state), self.state.run.ranks
        if max(ranks.maxima([not all_finite(self.state.run.policy)])):
            self._fail(place, "weights are not finite")
        elif self._threads is None or self._staging is None:
            written: Future[Path] = Future()
            self._running = _Save(place, written, announce)
            try:
                written.set_result(
                    self._write(place, contents(self.state, progress, self._model_files))
                )
            except OSError as error:
                written.set_exception(error)
            self.finish()
        else:
            files = self._staging.collect(
                partial(contents, self.state, progress, self._model_files)
            )
            written = self._threads.submit(self._write, place, files)
            self._running = _Save(place, written, announce)
        self.seconds += time.perf_counter() - begun

    def _write(self, place: Position, files: Iterable[File]) -> Path:
        def with_metrics() -> Iterator[File]:
            self._sync_metrics()  # the checkpoint counts on their being on the disk
            yield from files

        return self.store.save(place, with_metrics(), self._ranks.share)

    def poll(self) -> None:
        """Says how a save in the background went, if it has ended."""
        if self._running is not None and self._running.written.done():
            self.finish()

    def finish(self) -> None:
        """Waits for a save in the background, and says how it went."""
        if self._running is None:
            return
        save, self._running = self._running, None
        try:
            self.last = save.written.result()
        except OSError as error:
            self._fail(save.place, error.strerror or str(error))
            return
        if save.announce:
            self._note(f"saved {self.last}")

    def _fail(self, place: Position, why: str) -> None:
        self.last = None
        self._note(
            f"WARNING: checkpoint {name_of(place)} could not be saved: {why}. Training goes on; earlier checkpoints "
            "are intact."
        )

    def resume(self) -> dict[str, Any] | None:
        """Puts the state where the newest whole checkpoint left it; None if there is none to go on from.

        Raises:
            Unusable: The checkpoint that was asked for is damaged or belongs to another run.
        """
        if not self._opened.resume:
            return None
        checkpoint = self._find()
        if checkpoint is None:
            return None
        try:
            progress = restore(self.state, checkpoint, self._note)
        except (Unusable, Invalid, StateError) as error:
            raise Unusable(f"checkpoint {checkpoint.path} cannot be used: {error}") from None
        except RewardFault:
            raise
        except MALFORMED as error:
            what = f"it does not hold what a run saves ({type(error).__name__}: {error})"
            raise Unusable(f"checkpoint {checkpoint.path} cannot be used: {what}") from error
        self._note(f"resumed from {checkpoint.path}")
        if self.state.run.ranks.is_main and checkpoint.path.parent == self.store.folder:
            for path in self.store.set_aside(checkpoint.position):
                self._note(f"checkpoint {path} is newer and was put aside")
        return progress

    def _find(self) -> Checkpoint | None:
        """The same one on every rank: rank 0 looks for it."""
        ranks, found, problem = self.state.run.ranks, None, None
        if ranks.is_main:
            try:
                found = self._look()
            except (Unusable, Invalid) as error:
                problem = str(error)
        told = ranks.share({"path": found and str(found.path), "problem": problem})[0]
        if told["problem"] is not None:
            raise Unusable(told["problem"])
        if found is None and told["path"] is not None:
            found = Checkpoint(Path(told["path"]))
        return found

    def _look(self) -> Checkpoint | None:
        source = self._opened.source
        if source is not None and run_of(source) != source:
            try:
                one = Checkpoint(source)
                one.verify()
            except Invalid as error:
                raise Unusable(f"checkpoint {source} cannot be used: {error}") from None
            return one
        store = self.store if source is None else Store(source / rundir.CHECKPOINTS, 0)
        newest = store.newest(self._note)
        if newest is None and (source is not None or store.names()):
            raise Unusable(f"{store.folder} has no checkpoint that is whole")
        return newest
