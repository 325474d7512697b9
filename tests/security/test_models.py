"""Hostile model folders and data files: no code of theirs runs, nothing is fetched, pickled weights are not read."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch

from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.data.records import read_table, text_of
from fastgrpo.trainer.data.text import prompt_ids
from fastgrpo.trainer.setup import load_pretrained
from fastgrpo.trainer.tasks.custom import read_problems
from tests.security.checkpoints import Payload, contents
from tests.trainer.conftest import tiny_llama

CANARY = Path(gettempdir()) / f"fastgrpo-canary-of-models-{os.getpid()}"
CODE = f"import os\nos.system('touch {CANARY}')\nclass Evil: pass\n"


@pytest.fixture(autouse=True)
def _nothing_ran():
    CANARY.unlink(missing_ok=True)
    yield
    assert not CANARY.exists(), "something was executed"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model folder as `save_pretrained` writes it."""
    from fastgrpo.trainer.tasks.story import Story

    folder, tokenizer = tmp_path_factory.mktemp("model"), Story().tokenizer()
    tiny_llama(tokenizer, hidden_size=16, intermediate_size=24).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(content: bytes):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload(CANARY)}, folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    table = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))


def shards_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    table = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def own_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text(CODE)
    (folder / "configuration_evil.py").write_text(CODE)
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
    )


def code_of_a_hub(folder: Path) -> None:
    name = "someone/evil--modeling_evil.Evil"
    edit(folder / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": name})


def tokenizer_code(folder: Path) -> None:
    (folder / "tokenization_evil.py").write_text(CODE)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )
    (folder / "tokenizer.json").unlink()


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 1})
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(CANARY)))


def adapter_of_a_hub(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/evil", "r": 1})
    )
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


REFUSED = {
    "pickled weights": pickled,
    "pickled shards": pickled_shards,
    "code of its own": own_code,
    "code of a hub": code_of_a_hub,
    "tokenizer with code": tokenizer_code,
    "pickled adapter": pickled_adapter,
    "adapter of a hub": adapter_of_a_hub,
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config of 100,000 brackets": lambda f: (f / "config.json").write_text("[" * 100_000),
    "config is no JSON": lambda folder: (folder / "config.json").write_bytes(b"\x80\x04cos"),
    "tokenizer is no JSON": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
    **{
        f"weights: {name}": weights_of(content)
        for name, content in contents(CANARY).items()
        if "bomb" not in name and "duplicate" not in name and "another" not in name and "1000" not in name
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_model_folders_are_refused_in_one_line(good, tmp_path, name):
    folder = shutil.copytree(good, tmp_path / "model")
    REFUSED[name](folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is looked at below)
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, json.JSONDecodeError), "a bare error of a parser"


def test_a_hub_name_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model-name-or-path"):
        load_pretrained("someone/model")


def test_chat_templates_run_in_transformers_sandbox(good, tmp_path):
    """A template is a program of the model's maker: it may write any text, and reach nothing."""
    from transformers import AutoTokenizer

    from fastgrpo.trainer.tasks.base import Problem

    touch = f"touch {CANARY}"
    attacks = [
        "{{ cycler.__init__.__globals__.os.popen('" + touch + "').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('"
        + touch
        + "') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{% set x = namespace.__init__.__globals__['os'].system('" + touch + "') %}",
    ]
    for attack in attacks:
        tokenizer = AutoTokenizer.from_pretrained(good)
        tokenizer.chat_template = attack
        messages = ({"role": "user", "content": "2+2"},)
        problem = Problem("2+2", "4", "", "2+2", messages=messages)
        with contextlib.suppress(Exception):
            prompt_ids(tokenizer, [problem])


def test_verify_reads_shards_of_its_own_folder_only(good, tmp_path):
    from fastgrpo.verify.head import load_head

    folder = shutil.copytree(good, tmp_path / "model")
    shards_elsewhere(folder)
    with pytest.raises(ValueError, match="must name files of its own folder"):
        load_head(str(folder), None)


BAD_DATA = {
    "not UTF-8": (b'{"prompt": "\xff"}', ".jsonl"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), ".jsonl"),
    "half a character": (b'{"prompt": "\\ud800"}', ".jsonl"),
    "half a character in a list": (b'[{"prompt": "\\udfff x"}]', ".json"),
    "brackets": (b'{"prompt": ' + b"[" * 200_000, ".jsonl"),
    "brackets in a list": (b"[" * 200_000, ".json"),
    "5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", ".jsonl"),
    "a list": (b"[1]", ".jsonl"),
    "pickle": (pickle.dumps({"prompt": "a"}), ".jsonl"),
    "pickle as parquet": (pickle.dumps({"prompt": "a"}), ".parquet"),
    "another ending": (pickle.dumps({"prompt": "a"}), ".pkl"),
    "csv with NUL": (b"prompt\na\0b\n\xff", ".csv"),
    "csv with fewer cells": (b"prompt,answer\na\n", ".csv"),
    "csv with a cell of 1 MB": (b"prompt\n" + b"a" * (1 << 20) + b"\n", ".csv"),
    "messages without role": (b'{"prompt": [{"content": "a"}]}', ".jsonl"),
    "messages that are numbers": (b'{"prompt": [1]}', ".jsonl"),
    "no messages": (b'{"prompt": []}', ".jsonl"),
    "a prompt that is an object": (b'{"prompt": {"a": 1}}', ".jsonl"),
    "nothing": (b"", ".jsonl"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_files_are_refused_by_name(tmp_path, name):
    content, suffix = BAD_DATA[name]
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_problems(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_names_in_data_are_data(tmp_path):
    """Columns named like arguments or attributes reach a reward as columns, or are refused; never more."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "__class__": "x", "completions": "y", "self": "z"}\n')
    (record,) = read_table(str(path))
    assert text_of(str(path), 1, record, "__class__") == "x"
    (problem,) = read_problems(str(path))
    assert problem.columns["self"] == "z"


def resumed(tmp_path: Path, config: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`fastgrpo train --resume` of a run whose folder says `config`."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config)
    command = [sys.executable, "-m", "fastgrpo", "train", f"--resume={run}", *options]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip


def test_code_and_servers_are_taken_from_the_command_line_only(tmp_path):
    """The options in the folder of a run may be anybody's: what they would run or reach has to be named once more."""
    (tmp_path / "evil.py").write_text(CODE)
    server = "sampler: vllm\nvllm_server_base_url: http://evil.example:8000\n"
    for config, option in ((f"reward: {tmp_path}/evil.py:f\n", "--reward"),
                           ("reward: evil:f,exact_answer\n", "--reward"),
                           (server, "--vllm-server-base-url")):  # fmt: skip
        done = resumed(tmp_path, "job: copy\n" + config)
        assert done.returncode == 2, done.stderr
        assert option in done.stderr
        assert "name it again" in done.stderr
    (tmp_path / "mine.py").write_text("")
    done = resumed(tmp_path, f"job: copy\nreward: {tmp_path}/evil.py:f\n", "--reward=mine.py:f")
    assert "mine.py has no function 'f'" in done.stderr


def test_reward_code_that_anybody_can_change_is_refused(tmp_path):
    from fastgrpo.trainer.options.inputs import need_reward_file
    from fastgrpo.trainer.options.settings import SettingsError

    path = tmp_path / "mine.py"
    path.write_text("")
    need_reward_file(f"{path}:f")
    path.chmod(0o666)
    with pytest.raises(SettingsError, match=r"--reward: anybody can write to .*mine.py"):
        need_reward_file(f"{path}:f")


def test_a_changed_reward_file_is_said_on_resume(tmp_path):
    from dataclasses import replace

    from fastgrpo.trainer.checkpoint.contents import fingerprint
    from fastgrpo.trainer.options.jobs import default_config

    path = tmp_path / "mine.py"
    path.write_text("a = 1")
    config = replace(default_config("copy"), reward=f"right_tokens,{path}:f")
    before = fingerprint(config)
    assert before != fingerprint(replace(config, reward=None))
    path.write_text("a = 2")
    assert before != fingerprint(config)
