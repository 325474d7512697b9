"""A checkpoint of which any part is not as it was saved is named and passed over, never used and never deleted."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.trainer.checkpoint import manifest
from fastgrpo.trainer.checkpoint.contents import contents, model_files, position
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.state import State
from tests.trainer_faults.runs import SMALL, make_run, train

FILES = [
    "manifest.json", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    "reference.safetensors", "optimizer.safetensors", "optimizer.json", "rank-0.safetensors", "rank-0.json",
    "trainer.safetensors", "trainer.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """step-1.u2 (in the middle of a step, so that the sampled batch is in it) and the good step-1 before."""
    folder = tmp_path_factory.mktemp("damage")
    state = State(make_run(replace(SMALL, max_steps=2)))
    extra = model_files(state.run)
    store = Store(folder, limit=0)
    wanted = [(1, -1), (1, 2)]

    def save() -> None:
        if position(state) in wanted:
            store.save(position(state), contents(state, {}, extra))

    from fastgrpo.trainer.train import grpo

    for _ in grpo(state.run, state, save):
        save()
    assert [path.name for path in store.names()] == ["step-1.u2", "step-1"]
    assert sorted(path.name for path in store.names()[0].iterdir()) == sorted(FILES)
    return folder


def missing(path: Path, _: Path) -> None:
    path.unlink()


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def longer(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def other_step(path: Path, other: Path) -> None:
    content = (other / path.name).read_bytes()
    if content == path.read_bytes():
        content += b" "  # config and tokenizer are the same at every step
    path.write_bytes(content)


def link(path: Path, _: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def pipe(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def bit(place: float) -> Callable[[Path, Path], None]:
    def flipped(path: Path, _: Path) -> None:
        content = bytearray(path.read_bytes())
        index = min(len(content) - 1, int(place * len(content)))
        content[index] ^= 1 << (index % 8)
        path.write_bytes(content)

    flipped.__name__ = f"bit-at-{place}"
    return flipped


DAMAGES = [
    missing,
    empty,
    halved,
    longer,
    other_step,
    link,
    pipe,
    bit(0),
    bit(0.31),
    bit(0.77),
    bit(1),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_one_before_is_taken(
    two_checkpoints, tmp_path, trials, name, damage
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    damage(folder / "step-1.u2" / name, folder / "step-1")
    said: list[str] = []
    found = Store(folder, limit=0).newest(said.append)
    assert found is not None
    assert found.path.name == "step-1"
    assert len(said) == 1
    assert "step-1.u2 is not used" in said[0]
    assert name in said[0]
    assert (folder / "step-1.u2").is_dir()
    trials(
        "a file missing, empty, cut, longer, of another step, a link, a pipe, or one bit flipped", 1
    )


def test_every_bit_of_a_manifest_matters(two_checkpoints, tmp_path, trials):
    folder = tmp_path / "step-1"
    shutil.copytree(two_checkpoints / "step-1", folder)
    good = (folder / manifest.NAME).read_bytes()
    for index in range(0, len(good), 3):
        content = bytearray(good)
        content[index] ^= 1 << (index % 8)
        (folder / manifest.NAME).write_bytes(content)
        with pytest.raises(manifest.Invalid):
            Checkpoint(folder)
    trials("one bit of a manifest flipped", len(range(0, len(good), 3)))


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    content = manifest.read(folder)
    del content["sha256"]
    change(content)
    whole = {**content, "sha256": manifest.digest(manifest.canonical(content))}
    (folder / manifest.NAME).write_bytes(manifest.canonical(whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=3), "format 3, this fastgrpo reads 2"),
        (lambda m: m.update(step=7), "belongs to step-7"),
        (lambda m: m["files"].update({"../x": m["files"]["trainer.json"]}), "unsafe file name"),
        (lambda m: m["files"].update({"a/b": m["files"]["trainer.json"]}), "unsafe file name"),
        (lambda m: m["files"].update({"x\n": m["files"]["trainer.json"]}), "unsafe file name"),
        (lambda m: m.pop("files"), "damaged"),
    ],
    ids=["newer", "step", "parent", "folder", "newline", "no-files"],
)
def test_forged_manifests_are_refused(two_checkpoints, tmp_path, change, words):
    folder = tmp_path / "step-1"
    shutil.copytree(two_checkpoints / "step-1", folder)
    forge(folder, change)
    with pytest.raises(manifest.Invalid, match=words):
        Checkpoint(folder).verify()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"sha256": NaN}']
)
def test_any_text_as_a_manifest_is_refused(tmp_path, text):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / manifest.NAME).write_bytes(text)
    with pytest.raises(manifest.Invalid):
        Checkpoint(folder)


def test_names_that_are_no_checkpoints_are_left_alone(two_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for name in (
        ".tmp-step-9-1",
        "step-9.bak",
        "step--1",
        "step-1e3",
        "replaced-step-3-1",
        "step-" + "9" * 30,
    ):
        (folder / name).mkdir()
    (folder / "step-99").symlink_to(folder / "step-1")
    store = Store(folder, limit=1)
    assert [path.name for path in store.names()] == ["step-1.u2", "step-1"]
    store.prune((1, 2))
    assert [path.name for path in store.names()] == ["step-1.u2"]
    assert (folder / "step-99").is_symlink()
    store.clean()
    assert not (folder / ".tmp-step-9-1").exists()
    assert (folder / "replaced-step-3-1").exists()


def test_pruning_keeps_the_newest_and_what_is_damaged(tmp_path):
    state = State(make_run(SMALL))
    store = Store(tmp_path, limit=2)
    for step in range(6):
        state.step = step
        store.save(position(state), [("trainer.json", [b"%d" % step])])
        if step == 2:
            (tmp_path / "step-2" / "trainer.json").write_bytes(b"x")
            (tmp_path / "step-2" / manifest.NAME).write_bytes(b"x")
    assert [path.name for path in store.names()] == ["step-5", "step-4", "step-2"]


def test_going_on_from_an_older_one_puts_newer_ones_aside(tmp_path):
    store = Store(tmp_path, limit=0)
    for step in range(3):
        store.save((step, -1), [("trainer.json", [b"first"])])
    store.set_aside((1, -1))
    assert [path.name for path in store.names()] == ["step-1", "step-0"]
    store.save((1, -1), [("trainer.json", [b"second"])])
    assert Checkpoint(tmp_path / "step-1").manifest["files"]["trainer.json"]["bytes"] == 6
    kept = sorted("-".join(path.name.split("-")[:3]) for path in tmp_path.iterdir())
    assert kept == ["replaced-step-1", "replaced-step-2", "step-0", "step-1"]


def test_folders_and_files_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        path = Store(tmp_path / "checkpoints", 0).save((0, -1), [("trainer.json", [b"x"])])
    finally:
        os.umask(before)
    for folder in (path, path.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_a_policy_is_read_by_transformers(two_checkpoints):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(two_checkpoints / "step-1")
    assert len(AutoTokenizer.from_pretrained(two_checkpoints / "step-1")) == model.config.vocab_size
    state = State(make_run(replace(SMALL, max_steps=1)))
    train(state)
    for name, tensor in state.run.policy.model.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
