"""Whole runs with `--sampler vllm` against servers on real sockets: by one process, by two, and when a server dies."""

import json
from dataclasses import replace

import pytest

from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.sampling import http_json
from fastgrpo.trainer.setup import make_run
from tests.trainer.fake_vllm import FakeVLLM
from tests.trainer.test_cli import run_here
from tests.trainer_faults.runs import fork_job, wait
from tests.trainer_faults.test_ranks import fork_ranks, logs

SMALL = replace(
    default_config("copy"),
    max_steps=3,
    prompts_per_step=5,
    num_generations=4,
    eval_steps=0,
    eval_questions=0,
    save_steps=1,
    report=False,
)
OPTIONS = [
    "--max-steps=3", "--prompts-per-step=5", "--num-generations=4", "--eval-steps=0", "--eval-questions=6",
    "--sampler=vllm", "--vllm-importance-sampling-correction",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(http_json, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def servers():
    """Two that begin with weights of their own."""
    model = make_run(replace(SMALL, seed=99)).policy.model
    both = [FakeVLLM(model) for _ in range(2)]
    yield both
    for server in both:
        server.close()


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["phase"] == "grpo"]


def test_a_run_by_one_process(servers, tmp_path):
    urls = ",".join(server.url for server in servers)
    run_here(
        ["train", "copy", *OPTIONS, f"--vllm-server-base-url={urls}", "--output-dir=out"], tmp_path
    )
    steps = records(tmp_path / "out")
    assert len(steps) == 3
    for record in steps:
        assert record["sampling/sampling_logp_difference/max"] < 1e-4
        assert record["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    for server in servers:  # training: at the start and after every step; each evaluation: once
        assert server.count("/collective_rpc") == 4 + 2
    assert not list((tmp_path / "out").glob("weights-*"))


def test_a_run_by_two_processes(servers, tmp_path):
    urls = ",".join(server.url for server in servers)
    config = replace(
        SMALL, sampler="vllm", vllm_server_base_url=urls, output_dir=str(tmp_path / "out")
    )
    log = tmp_path / "log"
    from fastgrpo.trainer.run import run_job

    pids = fork_ranks(lambda: run_job(config, 0.0), 2, log)
    assert [wait(pid) for pid in pids] == [0, 0], logs(log)
    for record in records(tmp_path / "out"):
        assert record["sampling/sampling_logp_difference/max"] < 1e-4
    asked = [server.count("/v1/completions") for server in servers]
    probes = 4 * 4  # four prompts, at the start and after every step
    assert sum(asked) == 2 * probes + 3 * 5, "every question once, by one of the ranks"
    assert [server.count("/collective_rpc") for server in servers] == [4, 4], "by one of the ranks"


def test_a_server_that_dies_ends_all_processes_and_is_named(servers, tmp_path):
    servers[1].dies_after = 16 + 3  # in the middle of a step
    urls = ",".join(server.url for server in servers)
    config = replace(
        SMALL,
        sampler="vllm",
        vllm_server_base_url=urls,
        output_dir=str(tmp_path / "out"),
        max_steps=50,
    )
    log = tmp_path / "log"
    from fastgrpo.trainer.run import run_job

    pids = fork_ranks(lambda: run_job(config, 0.0), 2, log)
    assert [wait(pid) for pid in pids] == [1, 1], logs(log)
    assert f"{servers[1].url}/v1/completions failed 4 times" in logs(log)
    assert list((tmp_path / "out" / "checkpoints").glob("step-*")), (
        "there is something to go on from"
    )


def test_stale_weights_end_the_run(servers, tmp_path):
    server = servers[0]
    server.fault_path, server.always = "/collective_rpc", "stale"
    config = replace(
        SMALL, sampler="vllm", vllm_server_base_url=server.url, output_dir=str(tmp_path / "out")
    )
    assert wait(fork_job(config, tmp_path / "log")) == 1
    assert "does not sample from the policy" in (tmp_path / "log").read_text()


def test_no_server_is_said_before_anything_is_made(tmp_path):
    arguments = ["train", "copy", *OPTIONS, "--vllm-server-base-url=http://127.0.0.1:9"]
    _, err = run_here(
        [*arguments, "--vllm-server-timeout=0.1", "--output-dir=out"], tmp_path, code=2
    )
    assert "error: no vLLM server answers at http://127.0.0.1:9 after 0.1 s" in err
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--sampler=vllm"], ["--vllm-server-base-url=http://127.0.0.1:9"]]
)
def test_sampler_and_address_belong_together(tmp_path, options):
    _, err = run_here(["train", "copy", *options], tmp_path, code=2)
    assert "--vllm-server-base-url must name servers under --sampler vllm" in err
