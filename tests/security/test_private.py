"""What a run leaves is its owner's alone, and holds no secret: modes of files, and canaries where tokens lie."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.trainer.data.foreign_text import HIDDEN, redact

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.xdist_group("private")  # the runs that all of it is about are made once
CANARIES = {
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanary01",
    "WANDB_API_KEY": "canary0wandb0canary0wandb0canary0wandb02",
    "OPENAI_API_KEY": "sk-canary03canary03canary03",
    "AWS_SECRET_ACCESS_KEY": "canary04/canary04/canary04",
    "VLLM_API_KEY": "canary05-canary05-canary05",
    "MY_PASSWORD": "canary06 with a space",
}
TYPED = "canary07typed"  # in a URL on the command line and in an error of a reward
REWARD = """
import os

def leaky(completions, **kwargs):
    everything = " ".join(f"{k}={v}" for k, v in os.environ.items() if "canary" in v.lower())
    raise ConnectionError(f"401 for https://me:canary07typed@host/x with Bearer hf_Canary07typed0000 and {everything}")
"""
JOB = ["train", "copy", "--sft-steps=2", "--max-steps=2", "--eval-questions=4", "--eval-steps=0", "--no-cache-base",
       "--prompts-per-step=2", "--save-steps=1"]  # fmt: skip


def fastgrpo(cwd, *arguments, umask=0o022):
    """A command with secrets in its environment and a permissive umask."""
    return subprocess.run(
        [sys.executable, "-m", "fastgrpo", *arguments], cwd=cwd, capture_output=True, text=True, timeout=200,
        env={**os.environ, **CANARIES, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: os.umask(umask),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run whose reward leaks all it can, what the commands said)."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "mine.py").write_text(REWARD)
    options = ["--reward=right_tokens,mine.py:leaky", "--on-reward-fault=skip", "--output-dir=run"]
    train = fastgrpo(folder, *JOB, *options, umask=0)
    assert train.returncode == 0, train.stdout + train.stderr
    again = fastgrpo(folder, "train", "--resume=run", options[0], "--max-steps=3", umask=0)
    assert again.returncode == 0, again.stdout + again.stderr
    slips = [
        ["train", "gsm8k", f"--data=https://me:{TYPED}@host/data.jsonl"],
        ["train", "copy", f"--api-key={CANARIES['HF_TOKEN']}"],
        ["eval", f"--model=https://me:{TYPED}@host/model"],
        ["sft", f"--model-name-or-path=https://me:{TYPED}@host/m", "--data=x.jsonl"],
        ["reward", "test", "--reward=mine.py:leaky", "--data=none.jsonl"],
        ["train", "copy", "--reward=mine.py:leaky", "--output-dir=stopped", *JOB[2:]],
    ]
    said = [train, again, *(fastgrpo(folder, *slip) for slip in slips)]
    assert all(done.returncode != 0 for done in said[2:])
    return folder, said


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "mine.py"]


def test_no_secret_of_the_environment_is_in_any_file(run):
    folder, _ = run
    names = {path.name for path in files_of(folder)}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "manifest.json"} <= names
    for path in files_of(folder):
        content = path.read_bytes()
        for secret in (*CANARIES.values(), TYPED):
            assert secret.encode() not in content, f"{path} holds {secret}"


def test_what_a_failing_reward_says_is_kept_without_its_secrets(run):
    folder, said = run
    assert f"https://{HIDDEN}@host/x" in (folder / "run" / "summary.json").read_text()
    assert f"https://{HIDDEN}@host/x" in (folder / "run" / "report.html").read_text()
    assert "ConnectionError" in said[0].stdout


def test_no_secret_is_printed(run):
    for done in run[1]:
        for secret in (*CANARIES.values(), TYPED):
            assert secret not in done.stdout + done.stderr, done.args


def test_files_are_private_whatever_the_umask(run):
    folder, _ = run
    below = [folder / "run", *(folder / "run").rglob("*")]
    open_to_others = [str(p) for p in below if not p.is_symlink() and p.stat().st_mode & 0o077]
    assert not open_to_others
    assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/p?q=1", f"https://{HIDDEN}@host/p?q=1"),
        ("postgres://u@h", f"postgres://{HIDDEN}@h"),
        ("see https://host/a@b", "see https://host/a@b"),
        ("Authorization: Bearer abcdefghijklmnop", f"Authorization: Bearer {HIDDEN}"),
        ("token hf_abcdefghijklmnopqr.", f"token {HIDDEN}."),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", HIDDEN),
        ("a sk-proj-abcdefghijkl b", f"a {HIDDEN} b"),
        ("risk-adjusted returns", "risk-adjusted returns"),
        ("Bearer bonds", "Bearer bonds"),
        ("12 tokens, key 3", "12 tokens, key 3"),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown


def test_values_of_secret_variables_are_redacted_and_of_others_not(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "plainwords")
    monkeypatch.setenv("PIN_TOKEN", "1234")  # too short: it would redact numbers everywhere
    monkeypatch.setenv("MAX_TOKENS", "123456789")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    assert redact("plainwords 1234 123456789 certainly") == f"{HIDDEN} 1234 123456789 certainly"


def test_no_option_takes_a_secret():
    """Command lines are seen by every user of a machine, and options are written to config.yaml."""
    from dataclasses import fields

    from fastgrpo.trainer.commands.eval import EvalConfig
    from fastgrpo.trainer.commands.sft import SFTOptions
    from fastgrpo.trainer.options.config import TrainConfig

    names = [field.name for kind in (TrainConfig, EvalConfig, SFTOptions) for field in fields(kind)]
    suspicious = [n for n in names if any(w in n for w in ("key", "secret", "password", "token"))]
    assert not suspicious
