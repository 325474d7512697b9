"""`--check-resume`: does a run on this machine, with these options, go on after a crash as if nothing had been?"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastgrpo.trainer.checkpoint.contents import contents, position, restore
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.options.settings import SettingsError
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo

STEPS, RESTART = 4, 2


def check_resume(run: Run, note: Callable[[str], None]) -> int:
    """Trains 4 steps, saving at every safe point from step 2 to 3; restarts from each; returns the exit code."""
    if run.ranks.world_size > 1:
        raise SettingsError(
            "check_resume is for one process: its bits are those of each of several"
        )
    run.config = replace(run.config, max_steps=STEPS)
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name), limit=0)
        fresh = copy.deepcopy(run)
        state = State(run)

        def save() -> None:
            if state.step == RESTART:
                store.save(position(state), contents(state, {}, []))

        for _ in grpo(run, state, save):
            save()
        expected = everything(state)
        paths = sorted(store.names())
        for path in paths:
            other = State(copy.deepcopy(fresh))
            restore(other, Checkpoint(path), note)
            for _ in grpo(other.run, other):
                pass
            ends = everything(other)
            wrong = [name for name in expected if expected[name] != ends[name]]
            verdict = f"DIFFERENT in {', '.join(wrong)}" if wrong else "equal to the bit"
            note(f"resumed from {path.name}, trained to step {STEPS}: {verdict}")
            if wrong:
                return 1
    note(f"--check-resume: {len(paths)} of {len(paths)} restarts are exact")
    return 0


def everything(state: State) -> dict[str, bytes]:
    """All that a checkpoint would hold, by file."""
    return {name: b"".join(content) for name, content in contents(state, {}, [])}
