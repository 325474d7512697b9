"""`fastgrpo train` as a user starts it: a process of its own, whole and tiny runs."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastgrpo import cli

SMALL = [
    "--sft-steps=8", "--sft-batch-size=8", "--max-steps=3", "--prompts-per-step=2", "--num-generations=2",
    "--eval-questions=4", "--eval-samples=2", "--eval-steps=2", "--max-completion-length=8",
]  # fmt: skip


def start(arguments: list[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    source = str(Path(cli.__file__).resolve().parents[1])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "fastgrpo", *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": source, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: list[str], cwd: Path, code: int = 0) -> tuple[str, str]:
    process = start(arguments, cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def run_here(arguments: list[str], cwd: Path, code: int = 0) -> tuple[str, str]:
    """The same inside this process, which has torch and transformers loaded already."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = cli.main(arguments)
    finally:
        os.chdir(before)
    assert got == code, f"exit code {got}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def story_run(tmp_path_factory):
    """One whole run of the default job, made small; and a second one, which finds the first one's base."""
    cwd = tmp_path_factory.mktemp("story")
    first = run(["train", *SMALL], cwd)
    second = run_here(["train", *SMALL], cwd)
    return cwd, first, second


def test_a_run_leaves_everything(story_run):
    cwd, (out, _), _ = story_run
    folder = cwd / "runs" / "story"
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("base", "final"):
        assert set(summary[name]) == {"greedy", "pass@1", "maj@2", "pass@2"}
        assert set(summary["stderr"][name]) == set(summary[name])
    assert summary["wall_s"] > 0
    assert summary["cpu_s"] > 0
    assert summary["stopped"] is None
    assert summary["config"]["sft_steps"] == 8
    assert yaml.safe_load((folder / "config.yaml").read_text()) == summary["config"]
    html = (folder / "report.html").read_text()
    assert "Content-Security-Policy" in html
    assert html.count("data:image/png") >= 6
    assert "runs/story/report.html" in out
    assert "It elicits" in out or "Training did not raise" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl", "model", "report.html", "summary.json",
    ]  # fmt: skip


def test_metrics_are_one_json_object_per_line(story_run):
    cwd, _, _ = story_run
    lines = (cwd / "runs" / "story" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    steps = {
        phase: [r["step"] for r in records if r["phase"] == phase]
        for phase in ("sft", "eval", "grpo")
    }
    assert steps == {"sft": [8], "eval": [0, 2], "grpo": [1, 2, 3]}
    assert {"reward", "kl", "entropy", "completions/mean_length", "grad_norm"} <= set(records[-1])


def test_the_model_is_read_by_transformers(story_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cwd, _, _ = story_run
    folder = cwd / "runs" / "story" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = "Q: Ada has 7 coins, finds 2. How many?\nA:\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == prompt
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_the_second_run_reuses_the_base_and_takes_the_next_folder(story_run):
    cwd, (first, _), (second, _) = story_run
    assert "loss" in first
    assert "base model: reused from" in second
    assert "make base" not in second
    one, two = (
        json.loads((cwd / "runs" / name / "summary.json").read_text())
        for name in ("story", "story-2")
    )
    assert one["base"] == two["base"]
    assert one["final"] == two["final"]  # the same seed, to the bit
    assert (cwd / "runs" / "latest").resolve().name == "story-2"


def test_plain_output_has_no_control_codes_and_shows_progress(story_run):
    _, (out, err), _ = story_run
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("fastgrpo ")
    assert any(line.startswith("make base") and "loss" in line and "eta" in line for line in lines)
    assert any(line.startswith("grpo") and "reward" in line for line in lines)
    assert err == ""


def test_eval_repeats_the_final_numbers(story_run):
    cwd, _, _ = story_run
    out, _ = run_here(
        ["eval", "--model", "runs/story/model", "--questions=4", "--samples=2", "--json"], cwd
    )
    summary = json.loads((cwd / "runs" / "story" / "summary.json").read_text())
    assert json.loads(out)["scores"] == summary["final"]


def test_an_existing_run_is_refused_before_torch_is_loaded(story_run):
    cwd, _, _ = story_run
    begun = time.monotonic()
    out, err = run(["train", "--output-dir", "runs/story"], cwd, code=2)
    assert "holds another run" in err
    assert "loading" not in out
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("job", ["copy", "gsm8k-equations"])
def test_the_other_jobs_run(job, tmp_path):
    data = []
    if job == "gsm8k-equations":
        lines = [
            json.dumps({"answer": f"<<{a}+{b}={a + b}>>"})
            for a in range(1, 40)
            for b in range(1, 6)
        ]
        (tmp_path / "d.jsonl").write_text("\n".join(lines))
        data = ["--data=d.jsonl", "--test-data=d.jsonl"]
    small = [a for a in SMALL if not (job == "copy" and "sft" in a)]
    out, _ = run_here(["train", job, *small, *data, "--output-dir=o", "--no-report"], tmp_path)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["config"]["job"] == job
    assert not (tmp_path / "o" / "report.html").exists()
    if data:
        assert set(summary["slices"]["final"]) <= {"seen", "unseen"}
        assert "seen" in out


def test_ctrl_c_saves_what_there_is(tmp_path):
    process = start(["train", *SMALL, "--max-steps=100000", "--output-dir=o"], tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("grpo"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step" in err
    assert "Traceback" not in err
    assert "Stopped by the user" in out
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["base"]
    assert summary["final"] is None
    assert "after" in summary["stopped"]
    assert (tmp_path / "o" / "model" / "model.safetensors").exists()
    assert (tmp_path / "o" / "report.html").exists()


def test_ctrl_c_while_torch_loads_ends_quietly(tmp_path):
    process = start(["train", *SMALL, "--output-dir=o"], tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if "loading" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_bad_data_file_is_named_and_the_folder_given_back(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"answer": "<<1+1=2>>"}\n{"answer": \n')
    _, err = run_here(
        ["train", "gsm8k-equations", "--data=bad.jsonl", "--output-dir=o"], tmp_path, code=2
    )
    assert "error: bad.jsonl, line 2: not JSON" in err
    assert not (tmp_path / "o").exists()


def test_threads_are_set_before_torch_is_imported():
    """In a fresh process: what the command line sets, with torch still unloaded."""
    code = (
        "import sys, os; from fastgrpo import cli; seen = {}\n"
        "import types; stub = types.ModuleType('stub')\n"
        "def main(rest): seen.update(os.environ); seen['torch'] = str('torch' in sys.modules); return 0\n"
        "stub.main = main; sys.modules['stub'] = stub; import importlib.machinery\n"
        "stub.__spec__ = importlib.machinery.ModuleSpec('stub', None)\n"
        "cli.COMMANDS['train'] = cli.Command('stub', '', True)\n"
        "cli.main(['train', '--threads', '2'])\n"
        "print(seen['OMP_NUM_THREADS'], seen['OMP_WAIT_POLICY'], seen['torch'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert out.splitlines()[-1] == "2 PASSIVE False"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--threads", "2"], "2"),
        (["--threads=3", "--seed", "1"], "3"),
        (["--threads", "2", "--threads=4"], "4"),
        (["--seed", "1"], None),
        (["--threads"], None),
    ],
)
def test_option_value(arguments, value):
    assert cli.option_value(arguments, "threads") == value


def test_overview_and_unknown_commands(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "eval" in shown
    assert cli.main(["tain"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastgrpo ")
