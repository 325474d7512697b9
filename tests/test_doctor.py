"""`fastgrpo doctor`: what it says and what it returns, on this machine and on machines that it is told about."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import fastgrpo
from fastgrpo import doctor
from fastgrpo.ops.report import Kernel


@pytest.fixture
def diagnosis():
    return doctor.diagnose()


def with_kernels(diagnosis, device_type, **kernels):
    """The diagnosis of a machine where these kernels serve, and a native one everything else."""
    calls = {
        name: {**by_device, device_type: kernels.get(name, Kernel("C++", "here"))}
        for name, by_device in diagnosis.report.calls.items()
    }
    report = replace(diagnosis.report, calls=calls)
    return replace(diagnosis, device_type=device_type, report=report)


def test_report_has_a_line_per_function_and_the_versions(diagnosis):
    text = doctor.render(diagnosis)
    for name, by_device in diagnosis.report.calls.items():
        kernel = by_device[diagnosis.device_type]
        assert f"{name:<22}{kernel.name:<20}{kernel.why}" in text
    for name in (
        "torch",
        "triton",
        "transformers",
        "C++ compiler",
        "nvcc",
        diagnosis.report.cpu_isa,
    ):
        assert name in text


def test_the_functions_are_those_of_the_readme(diagnosis):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    table = readme.split("## Operations")[1].split("##")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert list(diagnosis.report.calls) == re.findall(r"`(\w+)`", " ".join(rows))
    assert set(diagnosis.report.calls) < set(fastgrpo.__all__)


def test_a_function_is_as_slow_as_its_slowest_op(monkeypatch):
    """The backward of the log-prob by the reference: both functions that need it say so, others do not."""
    from fastgrpo.ops import report

    ops = {op: {"cpu": Kernel("C++", "here")} for own in report.CALLS.values() for op in own}
    ops["token_logprob_bwd"]["cpu"] = Kernel("reference", "missing")
    served = {name: report._call(name, "cpu", ops).name for name in report.CALLS}
    slow = [name for name, kernel in served.items() if kernel == "reference"]
    assert slow == ["token_logprob", "linear_token_logprob"]
    assert served["linear_grpo_loss"] == "oneDNN + C++"
    assert served["support_logprob"] == "torch"


def test_exit_code_is_0_only_if_everything_is_native(diagnosis, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda **_: with_kernels(diagnosis, "cpu"))
    assert doctor.main([]) == 0
    assert "ok: everything has a native kernel for cpu." in capsys.readouterr().out
    slow = Kernel("reference", "_C_cpu.so was not built")
    monkeypatch.setattr(
        doctor, "diagnose", lambda **_: with_kernels(diagnosis, "cpu", grpo_loss=slow)
    )
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "no native kernel here: reference (_C_cpu.so was not built)" in out
    assert "pip install --no-build-isolation" in out


def test_interpreter_is_not_a_native_kernel(diagnosis):
    interpreted = with_kernels(diagnosis, "cpu", grpo_loss=Kernel("Triton interpreter", "switch"))
    assert interpreted.slow == {"grpo_loss": "Triton interpreter (switch)"}


# Each missing tool is named where it is needed, and only there.
@pytest.mark.parametrize(
    ("library", "tools", "named"),
    [
        (
            "_C_cpu",
            {"C++ compiler": None, "ninja": "x", "nvcc": None},
            "first install: C++ compiler)",
        ),
        ("_C_cuda", {"C++ compiler": "x", "ninja": "x", "nvcc": None}, "first install: nvcc)"),
        ("_C_cuda", {"C++ compiler": "x", "ninja": "x", "nvcc": "x"}, "--no-deps fastgrpo."),
    ],
)
def test_missing_tools_are_named(diagnosis, library, tools, named):
    slow = Kernel("reference", f"{library}.so was not built")
    there = replace(with_kernels(diagnosis, "cuda", group_advantage=slow), tools=tools)
    assert named in doctor.render(there).splitlines()[-1]


def test_json_says_the_same(diagnosis, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda **_: diagnosis)
    code = doctor.main(["--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["slow"] == diagnosis.slow
    assert told["report"]["ops"].keys() == diagnosis.report.ops.keys()
    assert code == (1 if diagnosis.slow else 0)


def test_unknown_option_is_refused():
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--gpu"])
    assert stop.value.code == 2
