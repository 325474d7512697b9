"""What gets built, how it is tagged, and how the package behaves with and without it; each case in its own process."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastgrpo
from fastgrpo import host
from fastgrpo.ops.backend import LAUNCHERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastgrpo.__file__).resolve().parent
CPU_LIBRARY = PACKAGE / "_C_cpu.so"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.xdist_group("build"),  # one worker: the wheels are built once
]
needs_library = pytest.mark.skipif(
    not CPU_LIBRARY.exists() and os.environ.get("FASTGRPO_REQUIRE_EXT") != "1",
    reason="fastgrpo/_C_cpu.so is not built",
)

# A library small enough to compile in a test, and wrong on purpose: only its kernel multiplies by 7.
PROBE = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
static void scale_gradient_(torch::stable::Tensor grad, torch::stable::Tensor) {
  auto* data = static_cast<float*>(grad.mutable_data_ptr());
  for (int64_t i = 0; i < grad.numel(); ++i) data[i] *= 7.0f;
}
STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) { m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_)); }
"""
HOST_PROBE = r"""
#include <Python.h>
static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString("baseline"); }
static PyMethodDef methods[] = {{"detect_cpu_isa", isa, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&module); }
"""
FAST = {"CXXFLAGS": "-O0 -w", "FASTGRPO_CUDA": "0"}
SERVED = """
import torch
def served():
    grad = torch.ones(2)
    torch.ops.fastgrpo.scale_gradient_(grad, torch.full((1,), 2.0))
    return {2.0: "reference", 7.0: "probe"}[grad[0].item()]
"""


def run(command, cwd, **environment):
    """Run to the end; return exit code and everything printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGRPO_", "TRITON_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def python(code, cwd, **environment):
    """Run code that must succeed."""
    status, output = run([sys.executable, "-c", code], cwd, **environment)
    assert status == 0, output
    return output


def copy_source(target):
    """The tracked kind of files, with the probe instead of the real kernels, which take too long to compile here."""
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, target / "fastgrpo", ignore=skip)
    for folder, text in (("cpu", PROBE), ("host", HOST_PROBE)):
        (target / "csrc" / folder).mkdir(parents=True)
        (target / "csrc" / folder / "probe.cpp").write_text(text)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def wheel(source, target, **environment):
    """Build a wheel as an installer does; return it and the log."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"]
    status, log = run([*command, "-w", target, source], source, **environment)
    assert status == 0, log
    (path,) = target.glob("*.whl")
    return path, log


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """An unpacked wheel made without a compiler."""
    source = copy_source(tmp_path_factory.mktemp("pure_source"))
    path, log = wheel(source, tmp_path_factory.mktemp("pure_wheel"), CXX="/bin/false")
    unpacked = tmp_path_factory.mktemp("pure")
    zipfile.ZipFile(path).extractall(unpacked)
    return path, log, unpacked


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A source tree, its wheel made with the compiler, and the wheel unpacked."""
    if run([os.environ.get("CXX", "c++"), "--version"], ROOT)[0]:
        pytest.skip("no C++ compiler")
    source = copy_source(tmp_path_factory.mktemp("native_source"))
    path, log = wheel(
        source, tmp_path_factory.mktemp("native_wheel"), FASTGRPO_REQUIRE_EXT="1", **FAST
    )
    unpacked = tmp_path_factory.mktemp("native")
    zipfile.ZipFile(path).extractall(unpacked)
    return source, path, log, unpacked


def test_without_compiler_the_wheel_is_pure(pure):
    path, log, unpacked = pure
    assert path.name.endswith("-py3-none-any.whl")
    assert "without compiled kernels: no C++20 compiler" in log
    assert not list(unpacked.rglob("*.so"))
    modules = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    assert modules == {p.relative_to(unpacked / "fastgrpo") for p in unpacked.rglob("*.py")}
    assert (unpacked / "fastgrpo" / "py.typed").exists()


def test_pure_package_works_and_says_so_once(pure):
    code = SERVED + (
        "import fastgrpo.ops, fastgrpo.losses, fastgrpo.ops.report as report\n"
        "kernel = report.backend_report().ops['scale_gradient_']['cpu']\n"
        "assert (kernel.name, kernel.why) == ('reference', '_C_cpu.so was not built'), kernel\n"
        "print(served(), fastgrpo.__file__)"
    )
    output = python(code, pure[2])
    assert f"reference {pure[2]}" in output
    assert output.count("without its compiled CPU kernels") == 1


def test_compiled_wheel_is_tagged_for_what_is_in_it(native):
    _, path, _, unpacked = native
    names = {p.name.partition(".")[0] for p in unpacked.rglob("*.so")}
    assert "_C_cpu" in names
    python_tag = (
        f"cp{sys.version_info.major}{sys.version_info.minor}" if "_host" in names else "py3"
    )
    assert f"-{python_tag}-" in path.name
    assert path.name.endswith("linux_x86_64.whl") or path.name.endswith("linux_aarch64.whl")


def test_compiled_package_uses_its_kernels_silently(native):
    output = python(SERVED + "import fastgrpo.ops\nprint(served(), fastgrpo.__file__)", native[3])
    assert output.startswith(f"probe {native[3]}")
    assert "UserWarning" not in output


def test_only_changed_files_are_compiled(native):
    source = native[0]
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    log = run(build, source, **FAST)[1]
    assert "no work to do" in log
    assert "] compile " not in log
    (source / "csrc" / "cpu" / "probe.cpp").touch()
    log = run(build, source, **FAST)[1]
    assert log.count("] compile ") == 1, log


def test_a_library_without_python_modules_serves_every_python(tmp_path):
    source = copy_source(tmp_path / "source")
    shutil.rmtree(source / "csrc" / "host")
    path, _ = wheel(source, tmp_path / "out", FASTGRPO_REQUIRE_EXT="1", **FAST)
    assert "-py3-none-linux_" in path.name


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"FASTGRPO_REQUIRE_EXT": "1", "CXX": "/bin/false"},
            "REQUIRE_EXT=1, but no C++20 compiler",
        ),
        (
            {"FASTGRPO_REQUIRE_EXT": "1", "CXX": "/no/such/compiler"},
            "REQUIRE_EXT=1, but no C++20 compiler",
        ),
        ({"FASTGRPO_CUDA": "yes"}, "FASTGRPO_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"FASTGRPO_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "/nowhere", "NVCC": ""},
            "FASTGRPO_CUDA=1, but there is no nvcc",
        ),
    ],
    ids=["broken-compiler", "no-compiler", "cuda-value", "no-nvcc"],
)
def test_impossible_requests_fail(environment, message):
    status, output = run([sys.executable, "setup.py", "--version"], ROOT, **environment)
    assert status != 0
    assert message in output


def test_code_that_does_not_compile(tmp_path):
    source = copy_source(tmp_path / "source")
    shutil.rmtree(source / "csrc" / "host")
    (source / "csrc" / "cpu" / "probe.cpp").write_text("#error deliberate\n")
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    for required in ("0", "1"):
        status, output = run(build, source, **{**FAST, "FASTGRPO_REQUIRE_EXT": required})
        assert "deliberate" in output  # the compiler's own words are shown
        assert "fastgrpo._C_cpu was not built" in output
        assert (status != 0) == (required == "1")
        assert not list((tmp_path / "lib").rglob("_C_cpu.so"))


def test_a_library_that_does_not_load_is_reported_and_replaced(pure, tmp_path):
    tree = shutil.copytree(pure[2], tmp_path / "broken")
    (tree / "fastgrpo" / "_C_cpu.so").write_bytes(b"not a library")
    code = SERVED + (
        "from fastgrpo.ops.report import backend_report\n"
        "report = backend_report()\n"
        "assert 'does not load' in report.ops['scale_gradient_']['cpu'].why, report\n"
        "assert any('_C_cpu.so does not load' in note for note in report.notes), report\n"
        "print(served())"
    )
    output = python(code, tree)
    assert output.strip().endswith("reference")
    assert output.count("UserWarning: fastgrpo: _C_cpu.so does not load") == 1


# A kernel under the device's key is preferred to the op's default; that it is when it comes second is tested above.
def test_a_library_loaded_before_the_ops_takes_precedence(native, pure):
    library = native[3] / "fastgrpo" / "_C_cpu.so"
    code = (
        SERVED + f"torch.ops.load_library({str(library)!r})\nimport fastgrpo.ops\nprint(served())"
    )
    assert python(code, pure[2], FASTGRPO_BACKEND="reference").strip() == "probe"


REPORT = """
import fastgrpo.ops.report as b
for op, kernels in b.backend_report().ops.items(): print(op, kernels['cpu'].name, kernels['cpu'].why, sep=" | ")
"""
REFUSED = (
    SERVED
    + """
try:
    served()
except RuntimeError as error:
    print("refused", error, sep=" | ")
"""
)


@needs_library
@pytest.mark.parametrize(
    ("environment", "kernel"),
    [
        ({"FASTGRPO_BACKEND": "", "FASTGRPO_CPU_ISA": "baseline"}, "C++ | _C_cpu.so on baseline"),
        ({"FASTGRPO_BACKEND": "auto"}, f"C++ | _C_cpu.so on {host.cpu_capability()}"),
        ({"FASTGRPO_BACKEND": "reference"}, "reference | FASTGRPO_BACKEND=reference"),
    ],
    ids=["unset", "auto", "reference"],
)
def test_backend_switch(environment, kernel):
    served = dict(line.split(" | ", 1) for line in python(REPORT, ROOT, **environment).splitlines())
    assert len(served) >= 6
    assert served == dict.fromkeys(served, kernel)


def test_backend_switch_to_triton():
    lines = python(REPORT + REFUSED, ROOT, FASTGRPO_BACKEND="triton").splitlines()
    served = dict(line.split(" | ", 1) for line in lines)
    # Without the interpreter there is an answer instead of a driver error.
    assert "set TRITON_INTERPRET=1" in served.pop("refused")
    for op, kernel in served.items():
        # Where the CUDA kernel is C++ (group_advantage) there is nothing for the interpreter to run.
        name = "Triton interpreter" if op in LAUNCHERS else "reference"
        assert kernel == f"{name} | FASTGRPO_BACKEND=triton"


def test_unknown_backend_is_refused_at_import():
    status, output = run(
        [sys.executable, "-c", "import fastgrpo.ops"], ROOT, FASTGRPO_BACKEND="cuda"
    )
    assert status != 0
    assert (
        "ValueError: FASTGRPO_BACKEND must be one of auto, reference, triton, got 'cuda'" in output
    )


@needs_library
def test_library_has_no_python_symbols_and_one_openmp():
    symbols = run(["nm", "-D", "--undefined-only", CPU_LIBRARY], ROOT)[1]
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    # Py*: tied to one Python. GOMP, omp: a second thread pool beside torch's. at::, c10::: not ABI-stable.
    bad = [n for n in names if n.startswith(("Py", "_Py", "GOMP_", "omp_", "_ZN2at", "_ZN3c10"))]
    assert not bad


def test_source_distribution_has_the_kernels(native, tmp_path):
    status, output = run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], native[0])
    assert status == 0, output
    (archive,) = tmp_path.glob("fastgrpo-*.tar.gz")
    names = run(["tar", "-tzf", archive], tmp_path)[1]
    for name in ("csrc/cpu/probe.cpp", "csrc/host/probe.cpp", "fastgrpo/py.typed"):
        assert name in names
