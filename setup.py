"""Builds the compiled parts of fastgrpo; all metadata is in pyproject.toml.

    fastgrpo/_C_cpu.so    csrc/cpu/*.cpp    kernels for CPU tensors: libtorch's stable ABI, no Python symbols
    fastgrpo/_C_cuda.so   csrc/cuda/*.cu    kernels for CUDA tensors, the same
    fastgrpo/_host.*.so   csrc/host/*.cpp   token-budget packing, CPU capability: pybind11, no torch

What cannot be built is left out, and the package works without it. That is decided by what this Python can see, so
`pip install --no-build-isolation` is the way to get them: an isolated build sees no torch. Switches:

    FASTGRPO_CUDA=auto|0|1    auto: nvcc found and torch has CUDA. 1: nvcc alone (on a CPU torch: a compile check)
    FASTGRPO_REQUIRE_EXT=1    a missing or failing CPU library is an error, not a pure-Python package
    CXX, CXXFLAGS, NVCC, MAX_JOBS
"""

import fcntl
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "native"
SM = (80, 90, 100)
REQUIRED = os.environ.get("FASTGRPO_REQUIRE_EXT", "0") == "1"
CUDA = os.environ.get("FASTGRPO_CUDA", "auto")

CXX = os.environ.get("CXX", "c++")
# No -march: kernels pick an instruction set at run time. No OpenMP runtime: torch::stable::parallel_for has torch's.
CXXFLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra"
    f" -DTORCH_TARGET_VERSION=0x020a000000000000 -ffile-prefix-map={ROOT}/="
).split() + shlex.split(os.environ.get("CXXFLAGS", ""))


def say(text):
    print(f"fastgrpo: {text}", file=sys.stderr)


def find_torch():
    """Folder of the installed torch and its version module (read, not imported: that takes seconds), or why not."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not importable here (install torch, then use --no-build-isolation)"
    folder = Path(spec.submodule_search_locations[0])
    version = runpy.run_path(str(folder / "version.py"))
    if tuple(int(part) for part in version["__version__"].split(".")[:2]) < (2, 10):
        return None, f"torch >= 2.10 is needed, found {version['__version__']}"
    return (folder, version), ""


def find_ninja():
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def compiler_fault():
    """Why CXX cannot compile C++20, or the empty string."""
    command = [*shlex.split(CXX), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    try:
        probe = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler: {error}"
    return (
        "" if probe.returncode == 0 else f"{CXX} cannot compile C++20 {probe.stderr.strip()[:200]}"
    )


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths = os.pathsep.join(
        [f"{home}/bin" for home in homes] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    )
    return os.environ.get("NVCC") or shutil.which("nvcc", path=paths)


def nvcc_command(nvcc):
    """nvcc for the architectures of SM that it knows: machine code for each, and PTX of the newest."""
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    sms = [sm for sm in SM if f"sm_{sm}" in known]
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sms]
    codes.append(f"-gencode=arch=compute_{sms[-1]},code=compute_{sms[-1]}")
    host = "-fPIC,-fvisibility=hidden"
    return [nvcc, "-ccbin", shlex.split(CXX)[0], "-std=c++20", "-O3", "-Xcompiler", host, *codes]


class Product(Extension):
    """A shared library and how ninja makes it: `compile` per source, `link` once."""

    def __init__(self, name, pattern, compile, link, required=False):
        sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        super().__init__(f"fastgrpo.{name}", sources, optional=not required)
        self.target, self.compile, self.link = OBJECTS / f"{name}.so", compile, link

    def ninja_edges(self):
        lines, objects = [], []
        for source in self.sources:
            objects.append(OBJECTS / f"{source}.o")
            lines += [
                f"build {objects[-1]}: compile {ROOT / source}",
                f"  tool = {shlex.join(self.compile)}",
            ]
        lines += [
            f"build {self.target}: link {' '.join(map(str, objects))}",
            f"  tool = {shlex.join(self.link[0])}",
        ]
        return [*lines, f"  libraries = {shlex.join(self.link[1])}"]


def products():
    """What this machine can build, and a reason for everything that it cannot."""
    if CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"FASTGRPO_CUDA must be auto, 0 or 1, got {CUDA!r}")
    torch, fault = find_torch()
    fault = (
        "only Linux is supported by this build"
        if sys.platform != "linux"
        else fault or compiler_fault()
    )
    fault = fault or ("" if find_ninja() else "ninja is not installed")
    if fault:
        if REQUIRED:
            raise SystemExit(f"fastgrpo: FASTGRPO_REQUIRE_EXT=1, but {fault}")
        say(f"pure-Python package, without compiled kernels: {fault}")
        return []
    folder, version = torch
    cxx, include = shlex.split(CXX), ["-isystem", str(folder / "include")]
    libtorch = [f"-L{folder / 'lib'}", "-ltorch_cpu"]
    found = [
        Product(
            "_C_cpu",
            "csrc/cpu/*.cpp",
            [*cxx, *CXXFLAGS, *include],
            ([*cxx, "-shared"], libtorch),
            REQUIRED,
        )
    ]
    python = Path(sysconfig.get_paths()["include"])
    if (python / "Python.h").exists():
        host = [
            *cxx,
            *CXXFLAGS,
            *include,
            f"-I{python}",
        ]  # torch's wheel brings the pybind11 headers
        found.append(Product("_host", "csrc/host/*.cpp", host, ([*cxx, "-shared"], [])))
    else:
        say("no Python.h: fastgrpo.host uses its Python twin")
    nvcc = find_nvcc() if CUDA == "1" or (CUDA == "auto" and version.get("cuda")) else None
    if nvcc:
        tool = nvcc_command(nvcc)
        libtorch += ["-ltorch_cuda"] if (folder / "lib" / "libtorch_cuda.so").exists() else []
        flags = [
            *include,
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DUSE_CUDA",
            "-Xptxas",
            "-v",
        ]
        link = ([*tool, "-shared", "-cudart", "static"], libtorch)
        found.append(Product("_C_cuda", "csrc/cuda/*.cu", [*tool, *flags], link, CUDA == "1"))
    elif CUDA == "1":
        raise SystemExit("fastgrpo: FASTGRPO_CUDA=1, but there is no nvcc (CUDA_HOME, PATH)")
    return [product for product in found if product.sources]


class NinjaBuild(build_ext):
    """setuptools decides where the libraries go; ninja makes them, and only what has changed."""

    built: set[str] = set()

    def get_ext_filename(self, fullname):
        loaded = fullname.rpartition(".")[2].startswith(
            "_C_"
        )  # not a Python module: no ABI in its name
        return f"{fullname.replace('.', '/')}.so" if loaded else super().get_ext_filename(fullname)

    def build_extensions(self):
        OBJECTS.mkdir(parents=True, exist_ok=True)
        rules = (
            "ninja_required_version = 1.5",
            "rule compile",  # the log keeps what the compiler said: for .cu the registers and spills of ptxas
            "  command = $tool -MD -MF $out.d -c $in -o $out > $out.log 2>&1 && cat $out.log || (cat $out.log; false)",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            "rule link\n  command = $tool $in -o $out $libraries\n  description = link $out",
        )
        with open(OBJECTS / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [
                *rules,
                *(line for product in self.extensions for line in product.ninja_edges()),
            ]
            (OBJECTS / "build.ninja").write_text("\n".join(lines) + "\n")
            super().build_extensions()

    def build_extension(self, ext):
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(OBJECTS), *jobs, str(ext.target)]).returncode:
            raise CompileError(f"{ext.name} was not built; the compiler's messages are above")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ext.target, output)
        self.built.add(ext.name)


class TaggedWheel(bdist_wheel):
    """Tags the wheel by what is in it: nothing compiled, libraries without Python symbols, or a Python module too."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        if not NinjaBuild.built:
            return "py3", "none", "any"
        return (
            (python, abi, platform)
            if "fastgrpo._host" in NinjaBuild.built
            else ("py3", "none", platform)
        )


setup(ext_modules=products(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": TaggedWheel})
