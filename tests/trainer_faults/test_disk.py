"""A disk that is full or broken at any moment of a save costs that save and nothing else."""

import errno
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.trainer.checkpoint.contents import contents, position
from fastgrpo.trainer.checkpoint.files import Disk
from fastgrpo.trainer.checkpoint.lock import FolderLock, Locked
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.options.opening import open_run
from fastgrpo.trainer.output.rundir import RunDirError
from fastgrpo.trainer.run import run_job
from fastgrpo.trainer.state import State
from tests.trainer_faults.runs import SMALL, end_of, fork, fork_job, make_run, records, wait
from tests.trainer_faults.test_kill import Counting, install


@pytest.mark.parametrize(
    "kind", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=["full", "broken", "denied"]
)
def test_every_system_call_of_a_save_may_fail(monkeypatch, tmp_path, trials, kind):
    state = State(make_run(SMALL))
    first = [(name, [b"".join(content)]) for name, content in contents(state, {}, [])]
    Store(tmp_path / "good", limit=1).save(position(state), first)
    number, failures = 0, 0
    while True:
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", place)

        def fault(count: int, name: str, number: int = number) -> None:
            if count == number:
                raise OSError(kind, "planted")

        disk = Counting(fault)
        with monkeypatch.context() as patch:
            install(patch, disk)
            try:
                Store(place, limit=1).save((2, -1), [(n, [c[0][:8]]) for n, c in first])
            except OSError as error:
                failures += error.errno == kind
        newest = Store(place, limit=1).newest(pytest.fail)
        assert newest is not None
        assert newest.position[0] in (0, 2)
        assert not list(place.glob(".tmp-*"))
        if len(disk.calls) < number:
            break
        number += 1
    assert (
        failures == number - 2 >= 40
    )  # all calls but the last: pruning an old one is no reason to stop
    trials("error (no space, input/output, permission) at every system call of a save", number)


def test_a_disk_that_writes_other_bits_than_it_was_given_is_found_at_once(monkeypatch, tmp_path):
    state = State(make_run(SMALL))
    store = Store(tmp_path, limit=1)
    store.save(position(state), contents(state, {}, []))

    class Flipping(Disk):
        def write(self, descriptor, content):
            wrong = bytearray(content)
            wrong[-1] ^= 4
            return super().write(descriptor, memoryview(wrong))

    install(monkeypatch, Flipping())
    state.step = 1
    with pytest.raises(OSError, match="reads back with other bits than were written"):
        store.save(position(state), contents(state, {}, []))
    assert [path.name for path in store.names()] == ["step-0"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_training_goes_on_and_says_so(tmp_path):
    """Every write of the second save fails: step-2 is missing, the end is the same."""
    plain, faulty = (replace(SMALL, output_dir=str(tmp_path / name)) for name in ("a", "b"))
    assert wait(fork_job(plain)) == 0
    log = tmp_path / "log"

    def job() -> int:
        patch = pytest.MonkeyPatch()
        finish, calls = Store._finish, []

        def fails_once(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            finish(self, *arguments)

        patch.setattr(Store, "_finish", fails_once)
        return run_job(replace(faulty, save_total_limit=0), time.time())

    assert wait(fork(job, log)) == 0, log.read_text()
    text = log.read_text()
    assert "WARNING: checkpoint step-2 could not be saved: No space left on device" in text
    names = sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir())
    assert names == ["step-1", "step-3", "step-4"]
    assert end_of(tmp_path / "a", 4) == end_of(tmp_path / "b", 4)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    from fastgrpo.trainer.checkpoint.checkpointer import Checkpointer
    from fastgrpo.trainer.options.opening import Opened

    run = make_run(SMALL)
    said: list[str] = []
    keeper = Checkpointer(State(run), Opened(tmp_path, None), said.append)
    run.policy.model.model.norm.weight.data[3] = float("nan")
    assert keeper.save({}) is None
    assert "weights are not finite" in said[0]
    assert keeper.store.names() == []


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path):
    a, b = (replace(SMALL, output_dir=str(tmp_path / name)) for name in ("a", "b"))
    assert wait(fork_job(a)) == 0
    assert wait(fork_job(replace(b, max_steps=3))) == 0
    bad = tmp_path / "b" / "checkpoints" / "step-3"
    content = bytearray((bad / "optimizer.safetensors").read_bytes())
    content[-9] ^= 16
    (bad / "optimizer.safetensors").write_bytes(content)
    log = tmp_path / "log"
    assert wait(fork_job(replace(b, resume="auto"), log)) == 0
    text = log.read_text()
    assert "step-3 is not used: optimizer.safetensors is damaged" in text
    assert "resumed from" in text
    assert "step-2" in text
    assert end_of(tmp_path / "a", 4) == end_of(tmp_path / "b", 4)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    kept = [path.name for path in bad.parent.iterdir()]
    assert any(name.startswith("replaced-step-3") for name in kept), kept


def test_no_whole_checkpoint_stops_with_a_reason(tmp_path):
    config = replace(SMALL, output_dir=str(tmp_path / "a"), save_total_limit=1)
    assert wait(fork_job(config)) == 0
    (tmp_path / "a" / "checkpoints" / "step-4" / "manifest.json").unlink()
    log = tmp_path / "log"
    assert wait(fork_job(replace(config, resume="auto"), log)) == 2
    assert "has no checkpoint that is whole" in log.read_text()


def test_a_run_is_refused_unless_asked_to_go_on(tmp_path):
    config = replace(SMALL, output_dir=str(tmp_path / "a"))
    assert wait(fork_job(config)) == 0
    with pytest.raises(RunDirError, match="--resume auto"):
        open_run(config)
    with pytest.raises(RunDirError, match="--resume must be"):
        open_run(replace(config, resume=str(tmp_path / "nothing")))
    with pytest.raises(RunDirError, match="--output-dir"):
        open_run(replace(config, output_dir=None, resume="auto"))


def test_a_longer_run_goes_on_and_metrics_have_no_line_twice(tmp_path):
    whole, parts = (replace(SMALL, output_dir=str(tmp_path / name)) for name in ("a", "b"))
    assert wait(fork_job(whole)) == 0
    assert wait(fork_job(replace(parts, max_steps=2))) == 0
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "step": 3, "rew')  # a torn line, as after a kill
    assert wait(fork_job(replace(parts, resume=str(tmp_path / "b")))) == 0
    assert end_of(tmp_path / "a", 4) == end_of(tmp_path / "b", 4)
    assert records(tmp_path / "a") == records(tmp_path / "b")


HOLDER = """
import sys, time
from pathlib import Path
from fastgrpo.trainer.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_two_trainers_in_one_folder_are_refused_and_a_dead_one_is_not(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Locked, match=f"pid {holder.pid} on host"):
            FolderLock(tmp_path)
        with pytest.raises(RunDirError, match="in use by another trainer"):
            open_run(replace(SMALL, output_dir=str(tmp_path), overwrite=True))
    finally:
        holder.kill()
        holder.wait()
    said: list[str] = []
    with FolderLock(tmp_path, said.append):
        content = json.loads((tmp_path / ".lock").read_text())
        assert set(content) == {"pid", "host"}
    assert f"was killed (pid {holder.pid}" in said[0]
    with FolderLock(tmp_path, pytest.fail):  # ended in order: nothing to say
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic|Too many"):
        FolderLock(tmp_path)
    assert not Path(tmp_path / "elsewhere").exists()
