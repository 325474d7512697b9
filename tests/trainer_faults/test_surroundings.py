"""What surrounds a run: clocks that jump, folders that cannot be written, a terminal that goes away."""

import os
import sys
import time
from dataclasses import replace

import pytest

from fastgrpo.trainer import run
from fastgrpo.trainer.commands import train as main
from tests.trainer_faults.runs import SMALL, end_of, fork, fork_job, records, wait

JOB = replace(SMALL, max_steps=3, eval_steps=1, eval_questions=4, eval_samples=2, report=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The end of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert wait(fork_job(replace(JOB, output_dir=str(out)))) == 0
    return end_of(out, 3), records(out)


@pytest.mark.parametrize(
    "jump",
    [
        -86_400.0,
        pytest.param(86_400.0 * 365, marks=pytest.mark.slow),
        pytest.param(float("nan"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_clock_that_jumps_changes_nothing(alone, tmp_path, jump):
    """Waits and steps are measured by the monotonic clock; the wall clock is only ever shown."""
    config, log = replace(JOB, output_dir=str(tmp_path / "run")), tmp_path / "log"

    def job() -> int:
        real, calls = time.time, []

        def jumping() -> float:
            calls.append(1)
            return real() + (jump if len(calls) > 2 else 0.0)

        pytest.MonkeyPatch().setattr(time, "time", jumping)
        return run.run_job(config, time.time())

    assert wait(fork(job, log)) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert (end_of(tmp_path / "run", 3), records(tmp_path / "run")) == alone


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not write")
@pytest.mark.parametrize("place", ["itself", "parent"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, place):
    folder = tmp_path / "run"
    folder.mkdir()
    target = folder if place == "itself" else folder / "deeper" / "still"
    folder.chmod(0o555)
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(0o755)
    log = tmp_path / "log"
    log.touch(mode=0o666)

    def job() -> int:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return main.main(["copy", f"--output-dir={target}"])

    assert wait(fork(job, log)) == 2, log.read_text()
    text = log.read_text()
    assert "cannot be written: no permission in" in text
    assert "loading torch" not in text
    assert list(folder.iterdir()) == []


def test_a_terminal_that_goes_away_ends_the_run_and_not_its_checkpoints(tmp_path):
    """Standard output is closed by its reader, as `| head` does it: the run stops, and can be taken up."""
    config = replace(JOB, output_dir=str(tmp_path / "run"), max_steps=50, report=False)
    read, write = os.pipe()

    def job() -> int:
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        return run.run_job(config, time.time())

    pid = fork(job, tmp_path / "log")
    os.close(write)
    end = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.close(read)
    code = wait(pid)
    if code == 0:  # it was faster than the pipe
        return
    again = replace(config, max_steps=3, resume="auto")
    done = fork_job(replace(again, max_steps=50), tmp_path / "log-2")
    assert wait(done) == 0, (tmp_path / "log-2").read_text()
    assert [r["step"] for r in records(tmp_path / "run") if r["phase"] == "grpo"] == list(
        range(1, 51)
    )
