"""A signal in any phase: a checkpoint at the next safe point, the exit code that a shell expects, and the same end."""

import os
import signal
import time
from dataclasses import replace

import pytest

from fastgrpo.trainer import passes, phases, policy, run
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.evaluation import evaluate
from fastgrpo.trainer.rewards.scoring import Rewards
from fastgrpo.trainer.sampling import sampler
from tests.trainer_faults.runs import SMALL, end_of, fork, fork_job, records, wait

JOB = replace(
    SMALL, max_steps=3, eval_steps=1, eval_questions=4, eval_samples=2, resume="auto", save_steps=2
)
PHASES = {  # where the signal comes, and on which call of it: in the middle of the run
    "generate": (sampler.KVSampler, "sample", 8),
    "reward": (Rewards, "score", 2),
    "forward": (policy.Policy, "forward", 30),
    "backward": (passes, "_try", 5),
    "save": (Store, "_finish", 1),
    "evaluate": (phases, "evaluate", 3),
    "summarise": (evaluate, "summarise", 3),
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The end of a run that no signal meets."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert wait(fork_job(replace(JOB, output_dir=str(out)))) == 0
    return end_of(out, 3), records(out)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(alone, tmp_path, trials, phase, number):
    owner, name, when = PHASES[phase]
    out, log = tmp_path / "run", tmp_path / "log"
    config = replace(JOB, output_dir=str(out))

    def job() -> int:
        patch, original, calls = pytest.MonkeyPatch(), getattr(owner, name), []

        def with_signal(*arguments, **options):
            calls.append(1)
            if len(calls) == when:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        patch.setattr(owner, name, with_signal)
        code = run.run_job(config, time.time())
        assert len(calls) >= when, f"{phase} was called {len(calls)} times only"
        return code

    code = wait(fork(job, log))
    text = log.read_text()
    assert "Traceback" not in text, text
    if number == signal.SIGUSR1:  # save and go on
        assert code == 0, text
        assert "saved " in text
    else:
        assert code == 128 + number, text
        assert "To go on: fastgrpo train --resume" in text
        assert Store(out / "checkpoints", 0).newest(pytest.fail) is not None
        assert wait(fork_job(config, log)) == 0, log.read_text()
        assert "resumed from" in log.read_text()
    assert (end_of(out, 3), records(out)) == alone
    trials("SIGTERM, SIGINT, SIGUSR1 in each phase", 1)


def test_sigterm_twice_still_saves_and_a_second_ctrl_c_stops_at_once(tmp_path):
    from fastgrpo.trainer.parallel.interrupt import Interrupt, Interrupted

    with Interrupt() as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupt.check()
        assert interrupt.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the signal comes between two byte codes)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
