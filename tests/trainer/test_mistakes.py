"""Mistakes of users: one plain line that names the option, exit code 2, and nothing left behind."""

import json
import shutil

import pytest

from fastgrpo import cli
from fastgrpo.trainer.options.inputs import model_folder
from fastgrpo.trainer.options.settings import SettingsError
from tests.trainer.conftest import tiny_llama

FILES = {
    "mine.py": "def score(completions, **columns):\n    return [0.0 for _ in completions]\n",
    "broken.py": "import nothing_of_that_name\n",
    "d.jsonl": json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n",
    "e.jsonl": json.dumps({"question": "1+1?"}) + "\n",
    "bad.jsonl": '{"answer": "<<1+1=2>>"}\n{"answer": \n',
}
CUSTOM = ["train", "custom", "--data=d.jsonl"]
MISTAKES = [
    (["train", "copi"], "no job 'copi'. Did you mean 'copy'?"),
    (["train", "gsm8k"], "the job gsm8k needs --data FILE"),
    (["train", "gsm8k", "--data=none.jsonl"], "--data: no file 'none.jsonl'"),
    (["train", "gsm8k", "--data=d.jsonl"], "the job gsm8k needs --model-name-or-path DIR"),
    (["train", "copy", "--data=d.jsonl"], "--data does not belong to the job copy"),
    (["train", "copy", "--epsilon=3"], "--epsilon must be below 1, got 3.0"),
    (["train", "copy", "--device=gpu"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["train", "copy", "--device=cuda:99"], "--device cuda:99 cannot be used: torch "),
    (["train", "copy", "--reward=exact"], "--reward must be one of right_tokens, think_format"),
    (["train", "copy", "--reward=none.py:f"], "--reward: no file 'none.py'"),
    (["train", "copy", "--reward=mine.py:f"], "--reward: reward f cannot be loaded: mine.py has no function 'f'; it"),
    (["train", "copy", "--reward=broken.py:f"], "--reward: reward f cannot be loaded: ModuleNotFoundError"),
    (["train", "copy", "--reward-weights=1,2"], "--reward-weights must hold one number per reward (1), got 2"),
    (["train", "copy", "--supervision=process"], "--supervision must be outcome"),
    (["train", "copy", "--resume=nowhere"], "--resume must be auto, never, a run with checkpoints"),
    (["train", "copy", "--resume=auto"], "--resume auto needs --output-dir"),
    (["train", "copy", "--resume=auto", "--output-dir=o", "--overwrite"], "--overwrite would delete"),
    (["train", "copy", "--output-dir=mine.py"], "--output-dir mine.py is a file"),
    (["train", "copy", "--model-name-or-path=nowhere"], "--model-name-or-path must be a run"),
    (["train", "copy", "--model-name-or-path=empty"], "the model in empty cannot be read"),
    (["train", "gsm8k-equations", "--data=bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    ([*CUSTOM, "--model-name-or-path=model", "--reward=none.py"], "--reward: no file 'none.py'"),
    (["train", "custom", "--data=e.jsonl", "--model-name-or-path=model"], "--reward must name a function"),
    (["sft", "--data=d.jsonl"], "needs --model-name-or-path (fastgrpo sft --help)"),
    (["sft", "--data=none.csv", "--model-name-or-path=model"], "--data: no file 'none.csv'"),
    (["sft", "--data=d.jsonl", "--model-name-or-path=model", "--max-length=1"], "--data must hold an example"),
    (["sft", "--data=d.jsonl", "--model-name-or-path=model", "--warmup-steps=-1"], "--warmup-steps must be at least 0"),
    (["eval"], "needs --model"),
    (["eval", "--model=nowhere"], "--model must be a run, or a folder that `save_pretrained` wrote"),
    (["eval", "--model=model"], "--job must say whose questions to ask"),
    (["eval", "--model=model", "--job=copi"], "--job must be one of story, copy"),
    (["eval", "--model=model", "--job=copy", "--questions=0"], "--questions must be at least 1, got 0"),
    (["eval", "--model=model", "--job=gsm8k"], "the job gsm8k needs --data FILE"),
    (["reward", "test"], "needs --reward and --data"),
    (["reward", "test", "--reward=mine.py:f", "--data=s.jsonl"], "--data: no file 's.jsonl'"),
    (["reward", "test", "--reward=mine.py:f", "--data=d.jsonl"], "--reward: reward f cannot be loaded: mine.py has no"),
    (["reward", "test", "--reward=mine.py:score", "--data=d.jsonl", "--timeout=0"], "--timeout must be above 0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(tokenizer, hidden_size=16, intermediate_size=24).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, folder, capsys):
    before = sorted(p.name for p in folder.iterdir())
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    said = [line for line in errors if not line.startswith("job ")]  # `eval` says what it loads
    assert len(said) == 1
    assert said[0].startswith(f"error: {message}")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_corrected_command_runs_in_the_same_folder(folder, capsys):
    """The first attempt must not have taken the folder."""
    small = ["--max-steps=1", "--prompts-per-step=2", "--num-generations=2", "--eval-questions=2"]
    small += ["--eval-samples=2", "--eval-steps=0", "--no-report", "--output-dir=o"]
    assert cli.main(["train", "copy", *small, "--reward=mine.py:f"]) == 2
    assert cli.main(["train", "copy", *small, "--reward=mine.py:score"]) == 0
    assert "everything goes to o/" in capsys.readouterr().out


def test_a_run_names_its_model(folder):
    (folder / "run").mkdir()
    (folder / "run" / "model").symlink_to(folder / "model")
    assert model_folder("--model", "run").samefile(folder / "model")
    with pytest.raises(SettingsError, match=r"got 'runs' \(no such folder; no hub is asked\)"):
        model_folder("--model", "runs")


def test_the_saved_options_repeat_a_run_that_was_replaced(folder):
    small = ["--max-steps=1", "--prompts-per-step=2", "--num-generations=2", "--eval-questions=0"]
    small += ["--eval-steps=0", "--no-report"]
    assert cli.main(["train", "copy", *small, "--output-dir=a"]) == 0
    assert cli.main(["train", "copy", *small, "--output-dir=a", "--overwrite"]) == 0
    assert cli.main(["train", "--config=a/config.yaml", "--output-dir=b"]) == 0
    first, second = ((folder / name / "config.yaml").read_text() for name in ("a", "b"))
    assert first.replace("output_dir: a", "output_dir: b") == second
    assert "overwrite: false" in first
    assert cli.main(["train", "--config=a/config.yaml"]) == 2  # it does not replace by itself
