"""`fastgrpo doctor`: what it says and what it returns, on this machine and on machines that it is told about."""

import json
from dataclasses import replace

import pytest

from fastgrpo import doctor
from fastgrpo.ops.backend import Kernel


@pytest.fixture
def diagnosis():
    return doctor.diagnose()


def with_kernels(diagnosis, device_type, **kernels):
    """The diagnosis of a machine where these kernels serve, and a native one everything else."""
    ops = {
        name: {**by_device, device_type: kernels.get(name, Kernel("C++", "here"))}
        for name, by_device in diagnosis.report.ops.items()
    }
    return replace(diagnosis, device_type=device_type, report=replace(diagnosis.report, ops=ops))


def test_report_has_a_line_per_op_and_the_versions(diagnosis):
    text = doctor.render(diagnosis)
    for name, by_device in diagnosis.report.ops.items():
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


def test_exit_code_is_0_only_if_every_op_is_native(diagnosis, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda **_: with_kernels(diagnosis, "cpu"))
    assert doctor.main([]) == 0
    assert "ok: every op has a native kernel for cpu." in capsys.readouterr().out
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
    assert interpreted.slow_ops == {"grpo_loss": "Triton interpreter (switch)"}


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
    there = replace(with_kernels(diagnosis, "cuda", group_advantage_fwd=slow), tools=tools)
    assert named in doctor.render(there).splitlines()[-1]


def test_json_says_the_same(diagnosis, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda **_: diagnosis)
    code = doctor.main(["--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["slow_ops"] == diagnosis.slow_ops
    assert told["report"]["ops"].keys() == diagnosis.report.ops.keys()
    assert code == (1 if diagnosis.slow_ops else 0)


def test_unknown_option_is_refused():
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--gpu"])
    assert stop.value.code == 2
