"""Output folders: never a run over another, never half a file."""

import json
import math
import os
import stat

import pytest

from fastgrpo.trainer.checkpoint import basecache
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.output.rundir import RunDirError, claim


def test_default_folders_are_numbered_and_latest_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [claim(None, "story", "a: 1\n", overwrite=False) for _ in range(3)]
    assert [str(path) for path in made] == ["runs/story", "runs/story-2", "runs/story-3"]
    assert (tmp_path / "runs" / "latest").resolve() == (tmp_path / "runs" / "story-3").resolve()
    assert made[0].joinpath("config.yaml").read_text() == "a: 1\n"


def test_a_folder_with_a_run_is_refused_unless_it_may_be_replaced(tmp_path):
    out = claim(tmp_path / "x", "story", "a: 1\n", overwrite=False)
    (out / "model").mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(RunDirError, match=r"holds another run \(config.yaml, model\).*--overwrite"):
        claim(out, "story", "a: 2\n", overwrite=False)
    assert claim(out, "story", "a: 2\n", overwrite=True) == out
    assert (out / "config.yaml").read_text() == "a: 2\n"
    assert not (out / "model").exists()
    assert (out / "mine.txt").read_text() == "kept"


def test_a_folder_with_other_things_may_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert claim(tmp_path, "story", "", overwrite=False) == tmp_path


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        claim(tmp_path / "f", "story", "", overwrite=True)


def test_a_check_writes_nothing(tmp_path):
    rundir.check(tmp_path / "a" / "b", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirError, match="no permission"):
        rundir.check(tmp_path / "a" / "b", overwrite=False)


def test_json_is_strict_even_for_nan(tmp_path):
    rundir.write_json(tmp_path / "s.json", {"a": math.nan, "b": [1.0, math.inf], "c": {"d": 2}})
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": 2},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_the_cache_is_private_and_whole(tmp_path, model):
    import torch

    folder = basecache.cache_folder(tmp_path / "run")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not basecache.load_base(model, folder, "k")
    before = [p.detach().clone() for p in model.parameters()]
    basecache.store_base(model, folder, "k")
    basecache.store_base(model, folder, "k")  # a second run that made the same at the same time
    assert [p.name for p in folder.iterdir()] == ["k"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert basecache.load_base(model, folder, "k")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_damaged_cache_entry_is_made_anew(tmp_path, model):
    folder = basecache.cache_folder(tmp_path / "run")
    basecache.store_base(model, folder, "k")
    (folder / "k" / basecache.WEIGHTS).write_bytes(b"\0" * 100)
    assert not basecache.load_base(model, folder, "k")


def test_the_key_changes_with_what_the_base_depends_on(tmp_path):
    from dataclasses import replace

    from fastgrpo.trainer.sft.demonstrations import demonstrations as sft
    from fastgrpo.trainer.tasks import story

    config = default_config("story")
    data = tmp_path / "d.jsonl"
    data.write_text("1")
    key = basecache.cache_key(config, [sft])
    assert key == basecache.cache_key(replace(config, learning_rate=1.0, max_steps=3), [sft])
    others = [
        basecache.cache_key(replace(config, seed=1), [sft]),
        basecache.cache_key(replace(config, sft_steps=5), [sft]),
        basecache.cache_key(config, [sft, story]),
        basecache.cache_key(replace(config, data=str(data)), [sft]),
    ]
    data.write_text("2")
    others.append(basecache.cache_key(replace(config, data=str(data)), [sft]))
    assert len({key, *others}) == 6
