"""SIGKILL at any moment of a run and at every system call of a save; and the same with a power cut instead."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.trainer.checkpoint import files
from fastgrpo.trainer.checkpoint.contents import contents, model_files, position
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import SMALL, end_of, fork, fork_job, make_run, records, wait

JOB = replace(SMALL, max_steps=5, eval_steps=2, eval_questions=4, eval_samples=2, resume="auto")


def kill_trials(tmp_path: Path, seed: int, wanted: int, background: bool, trials) -> None:
    """A run is killed at a random moment, taken up, perhaps killed again; its end is compared with one left alone."""
    rng, job = random.Random(seed), replace(JOB, async_save=background)
    alone = tmp_path / "alone"
    begun = time.monotonic()
    assert wait(fork_job(replace(JOB, output_dir=str(alone)))) == 0
    duration = time.monotonic() - begun
    expected, metrics = end_of(alone, JOB.max_steps), records(alone)
    killed = 0
    while killed < wanted:
        out = tmp_path / f"run-{killed}"
        config = replace(job, output_dir=str(out))
        for _ in range(20):
            pid = fork_job(config, log := tmp_path / "log")
            time.sleep(rng.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), log.read_text()
            killed += code != 0
            if code == 0:
                break
        else:
            assert wait(fork_job(config, log)) == 0, log.read_text()
        if not (out / "summary.json").exists():
            assert wait(fork_job(config, log)) == 0, log.read_text()
        assert end_of(out, JOB.max_steps) == expected, "another end than without the kill"
        assert records(out) == metrics
        shutil.rmtree(out)
    how = "in the background" if background else "while training waits"
    trials(f"kill -9 at a random moment, saving {how}", killed)


@pytest.mark.parametrize(("background", "wanted"), [(False, 20), (True, 10)])
def test_kills_at_random_moments(tmp_path, trials, background, wanted):
    kill_trials(tmp_path, 0, wanted, background, trials)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
@pytest.mark.parametrize("seed", range(1, 11))
def test_four_hundred_kills_at_random_moments(tmp_path, trials, seed, background):
    kill_trials(tmp_path, seed, 20, background, trials)


class Counting(files.Disk):
    """Calls `fault(call number, name, undone half)` before every system call of a save."""

    def __init__(self, fault: Callable[[int, str], None]) -> None:
        self.calls: list[str] = []
        self.fault = fault

    def _count(self, name: str) -> None:
        self.fault(len(self.calls), name)
        self.calls.append(name)

    def mkdir(self, path):
        self._count("mkdir")
        super().mkdir(path)

    def open(self, path):
        self._count("open")
        return super().open(path)

    def write(self, descriptor, content):
        self._count("write")
        if len(content) > 1:  # half of it, so that a call lies in the middle of every file
            content = content[: (len(content) + 1) // 2]
        return super().write(descriptor, content)

    def fsync(self, descriptor):
        self._count("fsync")
        super().fsync(descriptor)

    def rename(self, old, new):
        self._count("rename")
        super().rename(old, new)


def install(monkeypatch: pytest.MonkeyPatch, disk: files.Disk) -> None:
    from fastgrpo.trainer.checkpoint import store

    monkeypatch.setattr(files, "disk", disk)
    monkeypatch.setattr(store, "disk", disk)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """(folder that holds step-1, the files of step-2); the limit is 1, so that saving step-2 prunes step-1."""
    folder = tmp_path_factory.mktemp("kill")
    state = State(make_run(replace(SMALL, max_steps=2)))
    store, extra, second = Store(folder, limit=1), model_files(state.run), []
    for _ in grpo(state.run, state):
        second = [(name, [b"".join(c)]) for name, c in contents(state, {}, extra)]
        if state.step == 1:
            store.save(position(state), second)
    small = [
        (name, [content[0][:64]]) for name, content in second
    ]  # writes are halved down to single bytes
    return folder, small


def boundaries(saves, monkeypatch, tmp_path) -> list[str]:
    """The system calls of one save."""
    folder, second = saves
    shutil.copytree(folder, tmp_path / "count")
    disk = Counting(lambda number, name: None)
    with monkeypatch.context() as patch:
        install(patch, disk)
        Store(tmp_path / "count", limit=1).save((2, -1), second)
    assert [path.name for path in Store(tmp_path / "count", 0).names()] == ["step-2"]
    return disk.calls


def test_kill_at_every_system_call_of_a_save(saves, monkeypatch, tmp_path, trials):
    folder, second = saves
    calls = boundaries(saves, monkeypatch, tmp_path)
    assert calls.count("fsync") == len(second) + 4  # manifest, draft twice, folder
    found = []
    for number, name in enumerate(calls):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)

        def save(number: int = number, place: Path = place) -> int:
            def fault(count: int, _: str) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            install(monkeypatch, Counting(fault))
            Store(place, limit=1).save((2, -1), second)
            return 0

        assert wait(fork(save)) == -signal.SIGKILL
        newest = Store(place, limit=1).newest(lambda text: pytest.fail(text))
        assert newest is not None, f"nothing loads after a kill before call {number} ({name})"
        found.append(newest.position[0])
        store = Store(place, limit=1)
        store.clean()
        store.save((2, -1), second)  # and the next save works
        assert [path.name for path in store.names()] == ["step-2"]
        shutil.rmtree(place)
    assert found == sorted(found), "the old one, and from some call on the new one"
    assert {1, 2} == set(found)
    trials("kill -9 at every system call of a save", len(found))


class PowerCut(BaseException):
    """The machine is gone: nobody handles it."""


class Volatile(Counting):
    """Remembers what a disk may lose in a power cut: contents and names that no fsync has followed."""

    def __init__(self, stop_at: int) -> None:
        super().__init__(self._cut)
        self.stop_at = stop_at
        self.unsynced: dict[str, Path] = {}
        self.renamed: list[tuple[Path, Path]] = []

    def _cut(self, number: int, _: str) -> None:
        if number == self.stop_at:
            raise PowerCut

    def open(self, path):
        descriptor = super().open(path)
        self.unsynced[path.name] = path
        return descriptor

    def fsync(self, descriptor):
        super().fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.unsynced.pop(path.name, None)
        self.renamed = [pair for pair in self.renamed if pair[1].parent != path]

    def rename(self, old, new):
        super().rename(old, new)
        self.renamed.append((old, new))


@pytest.mark.parametrize("renames_survive", [True, False])
def test_power_cut_at_every_system_call_of_a_save(
    saves, monkeypatch, tmp_path, trials, renames_survive
):
    """What was not synced is lost (file contents) or undone (names), in the order that hurts most."""
    folder, second = saves
    calls = boundaries(saves, monkeypatch, tmp_path)
    found = []
    for number in range(len(calls) + 1):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)
        disk = Volatile(number)
        with monkeypatch.context() as patch:
            install(patch, disk)
            try:
                Store(place, limit=1).save((2, -1), second)
            except PowerCut:
                assert number < len(calls)
        for path in disk.unsynced.values():
            if path.exists():
                path.write_bytes(b"")
        if not renames_survive:
            for old, new in reversed(disk.renamed):
                if new.exists():
                    new.rename(old)
        newest = Store(place, limit=1).newest(lambda text: pytest.fail(text))
        assert newest is not None, f"nothing loads after a power cut before call {number}"
        found.append(newest.position[0])
        shutil.rmtree(place)
    assert found == sorted(found)
    assert found[-1] == 2
    trials("power cut at every system call of a save", len(found))
