"""Saving in the background: the same checkpoints, no matter what training does meanwhile and when the process dies."""

import errno
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo.trainer.checkpoint import files, rng
from fastgrpo.trainer.checkpoint.checkpointer import Checkpointer
from fastgrpo.trainer.checkpoint.contents import restore
from fastgrpo.trainer.checkpoint.staging import Staging
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.options.opening import Opened
from fastgrpo.trainer.run import run_job
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import (
    SMALL,
    end_of,
    everything,
    fork,
    fork_job,
    make_run,
    records,
    wait,
)
from tests.trainer_faults.test_kill import install
from tests.trainer_faults.test_ranks import fork_ranks, logs

JOB = replace(SMALL, async_save=True, save_total_limit=0)


def keeper_of(state: State, folder: Path, said: list[str]) -> Checkpointer:
    return Checkpointer(state, Opened(folder, None), said.append)


def overwrite(state: State) -> None:
    """What training does to the state while it is being written, and worse."""
    with torch.no_grad():
        for module in (state.run.policy, *state.others().values()):
            for parameter in module.parameters():
                parameter.fill_(3.0)
        for moments in state.optimizer.state.values():
            for tensor in moments.values():
                tensor.fill_(5.0)
    if state.scored is not None:
        state.scored.update += 1
        for portion in state.scored.portions:
            for batch in portion.batches:
                batch.advantage.fill_(7.0)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> Path:
    """Every checkpoint of a run that waits for each."""
    out = tmp_path_factory.mktemp("waiting") / "run"
    assert wait(fork_job(replace(JOB, async_save=False, output_dir=str(out)))) == 0
    return out


def test_every_checkpoint_has_the_bits_of_one_that_training_waited_for(waiting, tmp_path):
    assert wait(fork_job(replace(JOB, output_dir=str(tmp_path / "run")))) == 0
    for step in range(1, JOB.max_steps + 1):
        assert end_of(tmp_path / "run", step) == end_of(waiting, step)
    assert records(tmp_path / "run") == records(waiting)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_save_in_the_background(tmp_path, kind):
    ends = []
    for background in (False, True):
        config = replace(
            JOB, parallel=kind, async_save=background, output_dir=str(tmp_path / f"{background}")
        )
        pids = fork_ranks(lambda c=config: run_job(c, time.time()), 2, tmp_path / "log")
        assert [wait(pid) for pid in pids] == [0, 0], logs(tmp_path / "log")
        ends.append([end_of(Path(config.output_dir), step) for step in (1, 2, 3, 4)])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_disk_that_fails_under_one_of_two_ranks_costs_both_that_checkpoint(tmp_path, background):
    config = replace(JOB, async_save=background, output_dir=str(tmp_path / "run"))

    def job() -> int:
        patch, write, calls = pytest.MonkeyPatch(), Store._write, []

        def fails_once(self, *arguments):
            calls.append(1)
            if len(calls) == 2 and self.rank == 1:
                raise OSError(errno.EIO, "Input/output error")
            write(self, *arguments)

        patch.setattr(Store, "_write", fails_once)
        return run_job(config, time.time())

    pids = fork_ranks(job, 2, tmp_path / "log")
    assert [wait(pid) for pid in pids] == [0, 0], logs(tmp_path / "log")
    text = logs(tmp_path / "log")
    assert "WARNING: checkpoint step-2 could not be saved: rank 1: " in text
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-1", "step-3", "step-4"]


def test_training_does_not_wait_and_nothing_that_it_changes_is_written(tmp_path):
    """The write is held up until all of the state has been overwritten."""
    may_write, sync = threading.Event(), []
    state = State(make_run(JOB))
    said: list[str] = []
    keeper = Checkpointer(
        state, Opened(tmp_path, None), said.append, lambda: sync.append(may_write.wait(60))
    )
    for number, _ in enumerate(grpo(state.run, state)):
        if number == 1:
            break
    expected = everything(state)
    keeper.save({"metrics_bytes": 0}, announce=True)
    overwrite(state)
    keeper.poll()
    assert keeper.store.names() == []
    assert said == []
    may_write.set()
    keeper.finish()
    assert sync == [True]
    assert said == [f"saved {tmp_path / 'checkpoints' / 'step-2'}"]
    other = State(make_run(JOB))
    assert keeper.last is not None
    restore(other, Checkpoint(keeper.last), print)
    assert everything(other) == expected


def test_in_the_middle_of_a_step_too(tmp_path):
    state = State(make_run(JOB))
    keeper, ends = keeper_of(state, tmp_path, []), []

    class Stop(Exception):
        pass

    def safe_point() -> None:
        assert state.scored is not None
        if state.scored.update == 2:
            ends.append(everything(state))
            keeper.save({"metrics_bytes": 0})
            overwrite(state)
            keeper.finish()
            raise Stop

    with pytest.raises(Stop):
        next(grpo(state.run, state, safe_point))
    other = State(make_run(JOB))
    restore(other, Checkpoint(tmp_path / "checkpoints" / "step-0.u2"), print)
    assert everything(other) == ends[0]


def test_a_save_that_fails_is_said_at_the_next_safe_point_and_training_goes_on(waiting, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"

    def job() -> int:
        patch, finish, calls = pytest.MonkeyPatch(), Store._finish, []

        def fails_once(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            finish(self, *arguments)

        patch.setattr(Store, "_finish", fails_once)
        return run_job(replace(JOB, output_dir=str(out)), time.time())

    assert wait(fork(job, log)) == 0, log.read_text()
    assert "WARNING: checkpoint step-2 could not be saved: No space left" in log.read_text()
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-1", "step-3", "step-4"]
    assert end_of(out, 4) == end_of(waiting, 4)


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_metrics_that_cannot_be_synced_cost_the_checkpoint(tmp_path, background):
    """It says how long metrics.jsonl is: without that much on the disk it would promise too much."""
    said: list[str] = []

    def sync() -> None:
        raise OSError(errno.EIO, "Input/output error")

    state = State(make_run(replace(JOB, async_save=background)))
    keeper = Checkpointer(state, Opened(tmp_path, None), said.append, sync)
    keeper.save({"metrics_bytes": 0})
    keeper.finish()
    assert keeper.last is None
    assert keeper.store.names() == []
    assert "could not be saved: Input/output error" in said[0]


def test_a_defect_in_the_background_ends_the_run(tmp_path, monkeypatch):
    state = State(make_run(JOB))
    keeper = keeper_of(state, tmp_path, [])
    monkeypatch.setattr(Store, "_finish", lambda *_: 1 / 0)
    keeper.save({"metrics_bytes": 0})
    with pytest.raises(ZeroDivisionError):
        keeper.finish()


def test_one_save_at_a_time_and_the_last_is_waited_for(waiting, tmp_path):
    """Writing takes longer than a step: saves do not overtake one another, and the end waits."""
    log, out = tmp_path / "log", tmp_path / "run"

    def job() -> int:
        patch, save, inside = pytest.MonkeyPatch(), Store.save, []

        def slow(self, *arguments):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(0.3)
            path = save(self, *arguments)
            inside.pop()
            return path

        patch.setattr(Store, "save", slow)
        return run_job(replace(JOB, output_dir=str(out)), time.time())

    assert wait(fork(job, log)) == 0, log.read_text()
    for step in range(1, JOB.max_steps + 1):
        assert end_of(out, step) == end_of(waiting, step)


class Whole(files.Disk):
    """Kills the process before the n-th system call of a save."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.count = 0
        self.lock = threading.Lock()

    def _next(self) -> None:
        with self.lock:
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def mkdir(self, path):
        self._next()
        super().mkdir(path)

    def open(self, path):
        self._next()
        return super().open(path)

    def write(self, descriptor, content):
        self._next()
        return super().write(descriptor, content)

    def fsync(self, descriptor):
        self._next()
        super().fsync(descriptor)

    def rename(self, old, new):
        self._next()
        super().rename(old, new)


def test_kill_at_every_system_call_of_a_save_in_the_background(monkeypatch, tmp_path, trials):
    """The old checkpoint or the new one, never neither; and the new one is of the moment of the save."""
    config = replace(JOB, save_total_limit=1)
    state = State(make_run(config))
    keeper = keeper_of(state, tmp_path, [])
    expected: dict[int, dict[str, bytes]] = {}
    for _ in grpo(state.run, state):
        expected[state.step] = everything(state)
        if state.step == 1:
            keeper.save({"metrics_bytes": 0})
            keeper.finish()
        else:
            break
    shutil.move(tmp_path / "checkpoints", tmp_path / "first")
    drawn = rng.capture()

    def save_in_a_child(place: Path, disk: Whole) -> int:
        def save() -> int:
            install(monkeypatch, disk)
            rng.restore(drawn)
            own = keeper_of(state, place, [])
            own.save({"metrics_bytes": 0})
            overwrite(state)
            own.finish()
            (place / "count").write_text(str(disk.count))
            return 0

        shutil.copytree(tmp_path / "first", place / "checkpoints")
        return wait(fork(save, tmp_path / "log"))

    assert save_in_a_child(tmp_path / "all", Whole(None)) == 0, (tmp_path / "log").read_text()
    calls = int((tmp_path / "all" / "count").read_text())
    assert calls >= 12 * 3 + 5
    whole = {}
    for step, folder in ((1, tmp_path / "first"), (2, tmp_path / "all" / "checkpoints")):
        checkpoint = Checkpoint(folder / f"step-{step}")
        other = State(make_run(config))
        restore(other, checkpoint, pytest.fail)
        assert everything(other) == expected[step]
        whole[step] = checkpoint.manifest["files"]
    found = []
    for number in range(calls):
        place = tmp_path / str(number)
        assert save_in_a_child(place, Whole(number)) == -signal.SIGKILL
        newest = Store(place / "checkpoints", 0).newest(pytest.fail)
        assert newest is not None, f"nothing loads after a kill before call {number}"
        found.append(newest.position[0])
        assert newest.manifest["files"] == whole[found[-1]]
        shutil.rmtree(place)
    assert found == sorted(found)
    assert set(found) == {1, 2}
    trials("kill -9 at every system call of a save in the background", len(found))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name
)
def test_a_signal_while_a_save_is_under_way(waiting, tmp_path, trials, number):
    out, log = tmp_path / "run", tmp_path / "log"
    config = replace(JOB, output_dir=str(out), resume="auto", save_total_limit=2)

    def job() -> int:
        patch, save, calls = pytest.MonkeyPatch(), Store.save, []

        def with_signal(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), number)
            time.sleep(0.1)
            return save(self, *arguments)

        patch.setattr(Store, "save", with_signal)
        return run_job(config, time.time())

    code = wait(fork(job, log))
    text = log.read_text()
    assert "Traceback" not in text, text
    if number == signal.SIGUSR1:
        assert code == 0, text
        assert "saved " in text
    else:
        assert code == 128 + number, text
        assert "To go on: fastgrpo train --resume" in text
        assert wait(fork_job(config, log)) == 0, log.read_text()
    assert (end_of(out, 4), records(out)) == (end_of(waiting, 4), records(waiting))
    trials("SIGTERM, SIGINT, SIGUSR1 in each phase", 1)


def test_memory_for_copies_is_used_again_and_what_is_not_needed_is_let_go():
    staging = Staging()
    tensors = {"a": torch.ones(4), "b": torch.ones(2, 3)}

    def collect() -> dict[str, torch.Tensor]:
        copies: dict[str, torch.Tensor] = {}
        staging.collect(
            lambda keep: [copies.__setitem__(n, keep(n, t)) or (n, []) for n, t in tensors.items()]
        )
        return copies

    first = {name: copy.data_ptr() for name, copy in collect().items()}
    tensors["a"] = torch.full((4,), 2.0)
    tensors["b"] = torch.ones(3, 3)
    second = collect()
    assert second["a"].data_ptr() == first["a"]
    assert torch.equal(second["a"], tensors["a"])
    assert second["b"].shape == (3, 3)
    del tensors["a"]
    collect()
    assert list(staging._buffers) == ["b"]
