"""`fastgrpo plan`: formulas against measured peaks, and what the command prints."""

import json

import pytest
import torch

from fastgrpo.planner import formulas, main
from fastgrpo.planner.formulas import PLANS, Case
from fastgrpo.planner.peaks import measure

QUICK = [  # the smallest heads whose peaks dwarf what a process needs anyway
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=700)),  # one product: no float32 sum
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=1400)),  # several: sum, then conversion
    ("eager", Case(hidden=512, vocabulary=65_536, tokens=256)),
]
SLOW = [
    ("TRL 1.16", Case(hidden=512, vocabulary=65_536, tokens=256)),
    ("fastgrpo", Case(hidden=896, vocabulary=151_936, tokens=512)),
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=900, frozen=True)),
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=600, dtype="fp32")),
    ("fastgrpo", Case(hidden=1024, vocabulary=50_257, tokens=700, dtype="fp16")),
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=1024, precision="float32")),
    ("fastgrpo", Case(hidden=512, vocabulary=65_536, tokens=2048, precision="input")),
    ("fastgrpo", Case(hidden=1024, vocabulary=65_536, tokens=300, active=0.25)),
    ("eager", Case(hidden=512, vocabulary=65_536, tokens=256, dtype="fp32")),
    ("eager", Case(hidden=896, vocabulary=151_936, tokens=512, frozen=True)),
]


def check(name, case):
    if name == "TRL 1.16":
        pytest.importorskip("trl")
    planned, measured = PLANS[name](case), measure(name, case)
    assert planned == pytest.approx(measured, rel=0.05), (
        f"{planned / 2**20:.0f} vs {measured / 2**20:.0f} MiB"
    )


@pytest.mark.parametrize(("name", "case"), QUICK)
def test_measured_within_five_per_cent(name, case):
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), SLOW)
def test_more_measured_within_five_per_cent(name, case):
    check(name, case)


def test_memory_is_constant_in_the_number_of_tokens():
    """Beyond one chunk only the gradient of the hidden states grows."""
    sizes = [
        PLANS["fastgrpo"](Case(hidden=896, vocabulary=151_936, tokens=n)) for n in (2048, 65_536)
    ]
    assert sizes[1] - sizes[0] == (65_536 - 2048) * 896 * 2


def test_a_gpu_is_planned_without_one(monkeypatch):
    """80 GiB card: a workspace of 2.5 GiB, float32 logits and their half-precision gradients within it."""
    monkeypatch.setattr(formulas, "default_workspace_bytes", lambda _: 2560 << 20)
    case = Case(hidden=4096, vocabulary=128_256, tokens=8192, device="cuda")
    head = 128_256 * 4096
    workspace = 8192 * 128_256 * 6
    assert workspace > 2560 << 20
    expected = (2560 << 20) + 4 * head + 8192 * 4096 * 2
    assert PLANS["fastgrpo"](case) == pytest.approx(expected, rel=0.01)
    assert PLANS["TRL 1.16"](case) == 4 * (head + 8192 * 4096) + 2 * (head + 8192 * 4096)


def test_command(capsys):
    arguments = ["--hidden", "896", "--vocab", "151936", "--tokens", "512", "--device", "cpu"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "trained head (151,936 x 896 bf16, 260 MiB) on cpu" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["eager", "TRL", "fastgrpo"]
    assert main([*arguments, "--json", "--frozen", "--active", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"]["frozen"]
    planned = {row["name"]: row["planned_bytes"] for row in found["rows"]}
    assert planned["fastgrpo"] < planned["TRL 1.16"] < planned["eager"]


def test_a_model_by_name(capsys):
    assert main(["--preset", "qwen2.5-0.5b", "--tokens", "8", "--device", "cpu"]) == 0
    assert "(151,936 x 896 bf16" in capsys.readouterr().out
    for sizes in (
        [],
        ["--preset", "one", "--hidden", "8"],
        ["--hidden", "8"],
        ["--preset", "gpt9"],
    ):
        with pytest.raises(SystemExit):
            main([*sizes, "--tokens", "8"])
        assert "--preset" in (error := capsys.readouterr().err) or "--vocab is missing" in error


def test_a_whole_step_is_planned_by_the_step_model(capsys):
    assert main(["--step", "--model", "qwen2.5-7b", "--gpus", "1,8"]) == 0
    assert capsys.readouterr().out.startswith("policy")
    with pytest.raises(SystemExit) as stop:
        main(["--step", "--gpus", "1,some"])
    assert stop.value.code == 2
    assert "--gpus must be whole numbers" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--step", "--mfu", "2"])
    assert "--mfu must be within 0.01 and 1, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--tokens", "0"], ["--active", "2"], ["--dtype", "int8"]])
def test_bad_arguments(bad, capsys):
    arguments = ["--hidden", "8", "--vocab", "8", "--tokens", "8", *bad]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert bad[0] in capsys.readouterr().err


def test_threads_are_counted(monkeypatch):
    case = Case(hidden=512, vocabulary=65_536, tokens=64)
    one = PLANS["fastgrpo"](case)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert PLANS["fastgrpo"](case) >= one
