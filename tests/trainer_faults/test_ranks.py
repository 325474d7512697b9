"""Real processes that talk by gloo: the same training whatever their number, and no life without each other."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.contents import contents, position, restore
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.parallel import distributed, heartbeat
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.run import run_job
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import SMALL, end_of, fork, make_run, timeless, wait

FIVE = replace(
    SMALL,
    max_steps=5,
    prompts_per_step=5,  # 2 and 3 questions per rank
    sampling_streams=2,  # so that one process samples what two do
    per_device_train_batch_size=5,  # and other numbers of passes
    learning_rate=1e-3,
    ref_sync_steps=3,
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork_ranks(action: Callable[[], int], count: int, log: Path, **names: str) -> list[int]:
    """What torchrun does: `count` processes that know their number and where to meet."""
    port = free_port()

    def start(rank: int) -> int:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **names})
        return action()

    return [fork(lambda r=r: start(r), log.with_name(f"{log.name}-{r}")) for r in range(count)]


def logs(log: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}-*")))


def until(holds: Callable[[], bool], log: Path) -> None:
    """Waits for something that processes do, at most a minute."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < 60, logs(log)
        time.sleep(0.05)


def five_steps(config, ranks: Ranks, out: Path, resume: Path | None = None) -> None:
    """Trains; the first rank leaves weights, metrics and, of steps 2 and 2.u3, checkpoints."""
    run = make_run(config)
    run.ranks = ranks
    ranks.broadcast(run.policy.model)
    state = State(run)
    store = Store(out / "checkpoints", 0, ranks.rank, ranks.world_size)
    if resume is not None:
        from fastgrpo.trainer.checkpoint.store import Checkpoint

        restore(state, Checkpoint(resume), print)

    def save() -> None:
        if resume is None and position(state) in ((2, -1), (2, 3)):
            store.save(position(state), contents(state, {}, []), ranks.share)

    numbers = []
    for step in grpo(run, state, save):
        save()
        numbers.append(timeless(step.numbers))
    weights = {name: distributed.full(w) for name, w in run.policy.model.state_dict().items()}
    if ranks.is_main:
        out.mkdir(exist_ok=True)
        save_file(tree.distinct(weights)[0], out / "weights.safetensors")
        tensors, text = tree.encode(numbers, "x")
        (out / "numbers").write_bytes(text)
        (out / "numbers.t").write_bytes(b"".join(tensors))


def train_ranks(config, count: int, out: Path, resume: Path | None = None) -> None:
    def action() -> int:
        ranks = distributed.start(config.parallel, dead_after=30)
        five_steps(config, ranks, out, resume)
        ranks.stop()
        return 0

    codes = [wait(pid) for pid in fork_ranks(action, count, out.with_name(f"{out.name}-log"))]
    assert codes == [0] * count, logs(out.with_name(f"{out.name}-log"))


def difference(a: Path, b: Path) -> float:
    """Largest difference of a weight."""
    mine, theirs = (load_file(out / "weights.safetensors") for out in (a, b))
    theirs |= {n: theirs["model.embed_tokens.weight"] for n in mine if n not in theirs}  # tied
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def numbers_of(out: Path) -> list[dict]:
    return tree.decode((out / "numbers.t").read_bytes(), (out / "numbers").read_bytes())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "alone"
    five_steps(FIVE, Ranks(), out)
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(alone, tmp_path, kind):
    """Uneven questions and passes per rank, a reference, mini-batches: weights to 1e-5, every metric too."""
    train_ranks(replace(FIVE, parallel=kind), 2, out := tmp_path / kind)
    assert difference(out, alone) <= 1e-5
    for mine, theirs in zip(numbers_of(out), numbers_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    # A checkpoint does not know how many processes wrote it: one goes on from two, two go on from one.
    five_steps(FIVE, Ranks(), tmp_path / "one", out / "checkpoints" / "step-2")
    assert difference(tmp_path / "one", alone) <= 1e-5
    train_ranks(replace(FIVE, parallel=kind), 2, tmp_path / "two", alone / "checkpoints" / "step-2")
    assert difference(tmp_path / "two", alone) <= 1e-5
    # In the middle of a step the same number of processes goes on, to the bit.
    train_ranks(
        replace(FIVE, parallel=kind), 2, tmp_path / "mid", out / "checkpoints" / "step-2.u3"
    )
    assert difference(tmp_path / "mid", out) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_an_adapter_as_one_does(tmp_path, kind):
    """LoRA with recomputed blocks; the reference is the same sharded model with its adapter off."""
    pytest.importorskip("peft")
    config = replace(
        FIVE,
        use_peft=True,
        lora_r=4,
        gradient_checkpointing=True,
        ref_sync_steps=0,
        learning_rate=1e-2,
    )
    five_steps(config, Ranks(), alone := tmp_path / "alone")
    train_ranks(replace(config, parallel=kind), 2, out := tmp_path / kind)
    assert difference(out, alone) <= 1e-5
    names = load_file(out / "weights.safetensors")
    start = make_run(config).policy.model.state_dict()
    moved = {name for name in names if not torch.equal(names[name], start[name])}
    assert moved == {name for name in names if "lora_" in name}
    for mine, theirs in zip(numbers_of(out), numbers_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    stored = {path.name for path in (out / "checkpoints" / "step-2").glob("*.safetensors")}
    assert "adapter_model.safetensors" in stored
    assert not any(name.startswith(("model", "reference")) for name in stored)
    five_steps(config, Ranks(), tmp_path / "one", out / "checkpoints" / "step-2")
    assert difference(tmp_path / "one", alone) <= 1e-5
    train_ranks(
        replace(config, parallel=kind), 2, tmp_path / "mid", out / "checkpoints" / "step-2.u3"
    )
    assert difference(tmp_path / "mid", out) == 0


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_compute_in_bfloat16(tmp_path, kind, lora):
    """One step from the same weights: the gradient is that of one process to bfloat16 rounding, and goes on exactly."""
    config = replace(FIVE, bf16=True, use_peft=lora, max_steps=3, ref_sync_steps=0)
    train_ranks(replace(config, parallel=kind), 2, out := tmp_path / kind)
    five_steps(config, Ranks(), alone := tmp_path / "alone")
    mine, theirs = (numbers_of(path)[0] for path in (out, alone))
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    assert mine["reward"] == theirs["reward"]
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=0.1)
    train_ranks(
        replace(config, parallel=kind), 2, tmp_path / "mid", out / "checkpoints" / "step-2.u3"
    )
    assert difference(tmp_path / "mid", out) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_rank_without_anything_to_train_on_keeps_pace(tmp_path, kind):
    """beta = 0 leaves out groups without spread: a rank may have no pass where the other has two."""
    config = replace(FIVE, beta=0.0, ref_sync_steps=0, prompts_per_step=4, steps_per_generation=4)
    five_steps(config, Ranks(), tmp_path / "alone")
    train_ranks(replace(config, parallel=kind), 2, tmp_path / kind)
    assert difference(tmp_path / kind, tmp_path / "alone") <= 1e-5


def test_a_middle_of_a_step_needs_the_same_number_of_processes(alone):
    from fastgrpo.trainer.checkpoint.store import Checkpoint
    from fastgrpo.trainer.checkpoint.weights import Unusable

    checkpoint = Checkpoint(alone / "checkpoints" / "step-2.u3")
    checkpoint.world_size = 2
    checkpoint.part = lambda name, part=checkpoint.part: part(name.replace("rank-1", "rank-0"))
    with pytest.raises(Unusable, match="in the middle of a step by 2 processes, and there are 1"):
        restore(State(make_run(FIVE)), checkpoint, print)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other_and_is_named(tmp_path, trials, victim, number):
    """The whole job in two processes; one is killed (or stops answering) in training."""
    config = replace(
        SMALL, max_steps=100_000, output_dir=str(tmp_path / "run"), dead_rank_seconds=3.0
    )

    def action() -> int:
        return run_job(config, time.time())

    pids = fork_ranks(action, 2, tmp_path / "log")
    place = tmp_path / "run" / "checkpoints"
    until(lambda: place.is_dir() and bool(Store(place, 0).names()), tmp_path / "log")
    os.kill(pids[victim], number)
    begun = time.monotonic()
    code = wait(pids[1 - victim])
    took = time.monotonic() - begun
    if number == signal.SIGSTOP:
        os.kill(pids[victim], signal.SIGKILL)
    wait(pids[victim])
    text = (tmp_path / f"log-{1 - victim}").read_text()
    assert code != 0
    assert took < 20, f"{took:.0f} s"
    named = f"rank {victim} (pid {pids[victim]} on host" in text
    store = (
        "the rendezvous store on the host of rank 0" in text
    )  # rank 0 keeps it; under torchrun its agent does
    assert named or (victim == 0 and store), text
    assert Store(place, 0).newest(print) is not None
    trials("one of two processes killed or frozen: the other ends in time and names it", 1)


@pytest.mark.parametrize("wrong", ["everywhere", "rank 1"])
def test_a_mistake_ends_both_ranks_said_once_and_no_folder_is_taken(tmp_path, wrong):
    """A reward that is not there, or one that the second rank alone cannot load."""
    reward = "nope"
    if wrong == "rank 1":
        code = 'import os\nassert os.environ["RANK"] == "0", "not here"\ndef f(**columns): pass\n'
        (tmp_path / "mine.py").write_text(code)
        reward = f"{tmp_path / 'mine.py'}:f"
    config = replace(SMALL, output_dir=str(tmp_path / "run"), reward=reward)
    pids = fork_ranks(lambda: run_job(config, time.time()), 2, tmp_path / "log")
    assert [wait(pid) for pid in pids] == [2, 2], logs(tmp_path / "log")
    assert logs(tmp_path / "log").count("error: --reward") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_named(monkeypatch, tmp_path, trials, missing):
    """One of two processes died before they met."""
    for module in (distributed, heartbeat):
        monkeypatch.setattr(module, "LATEST", 2)
    config = replace(SMALL, output_dir=str(tmp_path / "run"), dead_rank_seconds=3.0)
    pids = fork_ranks(
        lambda: 0 if os.environ["RANK"] == str(missing) else run_job(config, time.time()),
        2,
        tmp_path / "log",
    )
    begun = time.monotonic()
    codes = [wait(pid) for pid in pids]
    assert codes[missing] == 0
    assert codes[1 - missing] != 0
    assert time.monotonic() - begun < 60
    text = (tmp_path / f"log-{1 - missing}").read_text()
    expected = (
        "rank 1 (it never started)"
        if missing
        else "rank 1: rank 0, which keeps the rendezvous store at 127.0.0.1"
    )
    assert expected in text, text
    trials("one of two processes killed or frozen: the other ends in time and names it", 1)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path):
    config = replace(SMALL, max_steps=100_000, output_dir=str(tmp_path / "run"), save_steps=0)

    def action() -> int:
        return run_job(config, time.time())

    pids = fork_ranks(action, 2, tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.stat().st_size > 0, tmp_path / "log")
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [143, 143], logs(tmp_path / "log")
    found = Store(tmp_path / "run" / "checkpoints", 0).newest(print)
    assert found is not None
    assert {"rank-0.json", "rank-1.json"} <= set(found.manifest["files"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_ten_deaths_at_random_moments_and_every_end_is_the_same(tmp_path, trials, background):
    rng = random.Random(0)
    job = replace(SMALL, max_steps=8, dead_rank_seconds=5.0, resume="auto", async_save=background)

    def start(out: Path) -> list[int]:
        config = replace(job, output_dir=str(out))
        return fork_ranks(lambda: run_job(config, time.time()), 2, tmp_path / "log")

    begun = time.monotonic()
    assert [wait(pid) for pid in start(tmp_path / "alone")] == [0, 0], logs(tmp_path / "log")
    duration = time.monotonic() - begun
    expected = end_of(tmp_path / "alone", 8)
    deaths = 0
    while deaths < 10:
        pids = start(tmp_path / "run")
        time.sleep(rng.uniform(0, duration))
        victim = rng.randrange(2)
        os.kill(pids[victim], signal.SIGKILL)
        killed, at = time.monotonic(), wait(pids[victim])
        other = wait(pids[1 - victim])
        assert time.monotonic() - killed < 60
        deaths += at == -signal.SIGKILL
        ended = (tmp_path / "run" / "summary.json").exists()
        assert other != 0 or at == 0 or ended
        if ended:  # nothing is left to be killed in
            assert end_of(tmp_path / "run", 8) == expected
            shutil.rmtree(tmp_path / "run")
    assert [wait(pid) for pid in start(tmp_path / "run")] == [0, 0], logs(tmp_path / "log")
    assert end_of(tmp_path / "run", 8) == expected
    trials("one of two processes killed at a random moment, both started again", deaths)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the documentation, with its agent: it names the rank that was killed."""
    options = [
        "--output-dir=run",
        "--max-steps=3",
        "--eval-questions=4",
        "--no-report",
        "--eval-steps=0",
    ]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastgrpo",
    ]
    source = str(Path(distributed.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    for kind in ("ddp", "fsdp2"):
        done = subprocess.run(
            [sys.executable, *command, "train", "copy", *options, "--parallel", kind, "--overwrite"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()
        assert torch.isfinite(
            torch.cat(
                [t.flatten() for t in load_file(tmp_path / "run/model/model.safetensors").values()]
            )
        ).all()
