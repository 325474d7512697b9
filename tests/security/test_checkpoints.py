"""Hostile checkpoints: nothing runs, nothing outside is read or written, each is refused in one line, in little memory.

Each case is resumed in a process of its own, forked from one that has everything loaded.
"""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch

from fastgrpo.trainer.checkpoint import manifest, tree
from fastgrpo.trainer.checkpoint.checkpointer import Checkpointer
from fastgrpo.trainer.checkpoint.contents import contents, model_files, position
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.options.opening import Opened
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.security.checkpoints import cases, sign
from tests.trainer_faults.runs import SMALL, fork, make_run, wait

CANARY = Path(gettempdir()) / f"fastgrpo-canary-of-checkpoints-{os.getpid()}"
CASES = dict(cases(CANARY))
ROOM = 200 << 20
"""Bytes that reading a hostile checkpoint of 200 kB may need."""
REFUSED, ACCEPTED = 3, 4


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """`checkpoints` with step-1.u2: in the middle of a step, so that the sampled batch is in it."""
    folder = tmp_path_factory.mktemp("hostile") / "checkpoints"
    state = State(make_run(replace(SMALL, max_steps=2)))
    extra, store = model_files(state.run), Store(folder, limit=0)

    def save() -> None:
        if position(state) == (1, 2):
            store.save(position(state), contents(state, {"notes": []}, extra))

    for _ in grpo(state.run, state, save):
        pass
    return folder


@pytest.fixture(scope="module")
def fresh() -> State:
    """What a run is before it is resumed; the forked children change copies of it."""
    return State(make_run(replace(SMALL, max_steps=2)))


def resume(state: State, out: Path) -> int:
    """Exit code of a process that tries to go on from the checkpoints in `out`; its output says why not."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    keeper = Checkpointer(state, Opened(out, None, resume=True), print)
    try:
        keeper.resume()
    except Unusable as error:
        print(f"refused: {error}")
        return REFUSED
    return ACCEPTED


def bystanders(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that must not be touched."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if "checkpoints" not in path.parts and not path.is_dir()
    }


def test_the_good_one_is_taken(good, fresh, tmp_path):
    shutil.copytree(good, tmp_path / "checkpoints")
    sign(tmp_path / "checkpoints" / "step-1.u2")
    log = tmp_path / "log"
    assert wait(fork(lambda: resume(fresh, tmp_path), log)) == ACCEPTED, log.read_text()


def test_the_corpus_is_large():
    assert len(CASES) >= 150
    assert len({name.split(":")[0] for name in CASES}) >= 10


# Tensors that no part of the state refers to are not looked at.
UNUSED = ("duplicate keys", "1000 dimensions", "metadata of another reader", "another tensor")
HARMLESS = {f"trainer.safetensors: {name}" for name in UNUSED}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line_without_any_effect(good, fresh, tmp_path, name):
    CANARY.unlink(missing_ok=True)
    bystander = tmp_path / "bystander"
    bystander.write_text("not yours")
    out = tmp_path / "run"
    shutil.copytree(good, out / "checkpoints")
    CASES[name](out / "checkpoints" / "step-1.u2")
    before, log = bystanders(tmp_path), out / "checkpoints" / "log"
    code = wait(fork(lambda: resume(fresh, out), log))
    text = log.read_text()
    assert not CANARY.exists(), "something was executed"
    assert "Traceback" not in text, text
    if name in HARMLESS:
        assert code == ACCEPTED, text
    else:
        assert code == REFUSED, f"exit code {code}: {text}"
        assert text.count("refused: ") == 1
    assert "root:" not in text, "a file from outside was read"
    assert bystanders(tmp_path) == before


def test_a_refused_one_is_passed_over_for_the_one_before(good, fresh, tmp_path):
    """A forged newer checkpoint does not keep a run from going on from its own."""
    shutil.copytree(good, tmp_path / "checkpoints")
    newer = tmp_path / "checkpoints" / "step-2"
    shutil.copytree(good / "step-1.u2", newer)
    sign(newer, lambda m: m.update(step=2, update=-1))
    (newer / "model.safetensors").write_bytes(b"\x80\x04pickle")
    log = tmp_path / "log"
    assert wait(fork(lambda: resume(fresh, tmp_path), log)) == ACCEPTED, log.read_text()
    assert "step-2 is not used: model.safetensors has" in log.read_text()


def test_learned_rewards_are_no_pickles():
    """The state of a reward that learns travels inside of a checkpoint, and is read the same way."""
    state = {"weight": torch.randn(3), "steps": 7, "names": ["a"]}
    assert tree.same(tree.from_bytes(tree.to_bytes(state)), state) is None
    whole = tree.to_bytes(state)
    for content in (
        b"",
        b"\x80\x04cos",
        whole[:20],
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" * 999,
    ):
        with pytest.raises(tree.StateError):
            tree.from_bytes(content)


def test_step_folders_are_built_from_numbers_alone(tmp_path):
    for name in ("step-1/../../x", "step-1\n", "step-٣", "step-1.u2/..", "step-0x1", "step-1 "):
        place = tmp_path / "checkpoints" / name.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
    assert Store(tmp_path / "checkpoints", 1).names() == []


def test_a_base_model_of_another_is_not_loaded(tmp_path):
    """The cache of base models: only in a folder of one's own that nobody else can write to."""
    from fastgrpo.trainer.checkpoint.basecache import cache_folder, load_base

    model = make_run(SMALL).policy.model
    folder = cache_folder(tmp_path / "run")
    assert folder is not None
    (folder / "k").mkdir()
    for content in (b"", b"\x80\x04cos", json.dumps({}).encode(), b"\xff" * 100):
        (folder / "k" / "model.safetensors").write_bytes(content)
        assert not load_base(model, folder, "k")
    for mode in (0o777, 0o775, 0o757):
        folder.chmod(mode)
        assert cache_folder(tmp_path / "run") is None
    folder.chmod(0o700)
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        assert cache_folder(tmp_path / "run") is None
    assert manifest.SAFE_NAME.match("model.safetensors")
