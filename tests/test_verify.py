"""`fastgrpo verify` on tiny checkpoints and configurations: green where right, red where broken, 2 for nothing."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'fastgrpo[train]'"
)
from fastgrpo.cli import main as cli
from fastgrpo.functional.token_logprob import TokenLogprob
from fastgrpo.verify import compare, main
from tests.integrations import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {"qwen2": 37, "llama": 1001, "gemma2": 257}  # odd vocabularies; tied, untied, softcap
    return {kind: tiny.save_model(kind, folder, vocab_size=size) for kind, size in kinds.items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2"])
def test_green_on_a_checkpoint(kind, dtype, models, capsys):
    arguments = [
        "--model",
        models[kind],
        "--tokens",
        "24",
        "--temperature",
        "0.8",
        "--device",
        "cpu",
    ]
    assert main([*arguments, *(["--dtype", dtype] if dtype else [])]) == 0
    out = capsys.readouterr().out
    assert "green" in out
    assert ("softcap 4" in out) == (kind == "gemma2")
    assert ("tied" in out) == (kind != "llama")
    assert "weights: checkpoint" in out


def test_the_checkpoints_own_weight_is_used(models):
    from transformers import AutoModelForCausalLM

    from fastgrpo.verify.head import load_head

    for path in models.values():
        model = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(load_head(path, None).weight, model.get_output_embeddings().weight)


def test_a_configuration_alone_gets_a_random_head(models, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((Path(models["gemma2"]) / "config.json").read_bytes())
    for place in (tmp_path, tmp_path / "config.json"):
        assert main(["--model", str(place), "--tokens", "8", "--json", "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["source"].startswith("random")
        assert found["vocabulary"] == 257
        assert found["softcap"] == 4.0
        assert [row["quantity"] for row in found["results"]] == [
            "logprob",
            "entropy",
            "dHidden",
            "dWeight",
        ]


@pytest.mark.parametrize("broken", ["softcap", "gradient", "nan"])
def test_red_on_a_wrong_kernel(broken, models, capsys, monkeypatch):
    honest = compare.linear_token_logprob

    def wrong(hidden, weight, ids, **options):
        if broken == "softcap":
            options["logit_softcap"] = None
        found = honest(hidden, weight, ids, **options)
        if broken == "nan":
            return TokenLogprob(found.logprob * float("nan"), found.entropy)
        if broken == "gradient":  # right values, a gradient that is 1 % off
            value = found.logprob
            return TokenLogprob(value.detach() + 1.01 * (value - value.detach()), found.entropy)
        return found

    monkeypatch.setattr(compare, "linear_token_logprob", wrong)
    assert main(["--model", models["gemma2"], "--tokens", "16", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RED" in out
    assert "TOO LARGE" in out


def test_nothing_to_verify(tmp_path, models, capsys):
    assert cli(["verify", "--model", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model must be a folder or a config.json on this machine")
    assert error.count("\n") == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli(["verify", "--model", str(empty)]) == 2
    assert cli(["verify", "--model", models["qwen2"], "--tokens", "4", "--device", "cpu"]) == 0
