"""When a run saves, and how it goes on from what it saved."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.trainer import rundir
from fastgrpo.trainer.checkpoint.contents import (
    Unusable,
    all_finite,
    contents,
    model_files,
    position,
    restore,
)
from fastgrpo.trainer.checkpoint.manifest import Invalid
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store, name_of
from fastgrpo.trainer.checkpoint.tree import StateError
from fastgrpo.trainer.opening import Opened, run_of
from fastgrpo.trainer.state import State

Progress = Callable[[], dict[str, Any]]


class Checkpointer:
    """The checkpoints of one run in `<output_dir>/checkpoints`."""

    def __init__(self, state: State, opened: Opened, note: Callable[[str], None]) -> None:
        config, ranks = state.run.config, state.run.ranks
        folder = opened.folder / rundir.CHECKPOINTS
        self.state = state
        self.store = Store(folder, config.save_total_limit, ranks.rank, ranks.world_size)
        self.failures = 0
        self.seconds = 0.0
        self._opened = opened
        self._note = note
        self._model_files = model_files(state.run) if ranks.is_main else []
        if ranks.is_main:
            self.store.clean()
        ranks.wait()

    def save(self, progress: dict[str, Any]) -> Path | None:
        """Saves the state as it is; None, with a loud note, if it could not. Every rank has to call this."""
        begun = time.perf_counter()
        path = None
        ranks = self.state.run.ranks
        if max(ranks.maxima([not all_finite(self.state.run.policy)])):
            self._fail("weights are not finite")
        else:
            files = contents(self.state, progress, self._model_files)
            try:
                path = self.store.save(position(self.state), files, ranks.share)
            except OSError as error:
                self._fail(error.strerror or str(error))
        self.seconds += time.perf_counter() - begun
        return path

    def _fail(self, why: str) -> None:
        self.failures += 1
        self._note(
            f"WARNING: checkpoint {name_of(position(self.state))} could not be saved: {why}. Training goes on; earlier "
            "checkpoints are intact."
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
