"""Builds the compiled parts of fastgrpo; all metadata is in pyproject.toml.

    fastgrpo/_C_cpu.so    csrc/cpu/*.cpp    kernels for CPU tensors: libtorch's stable ABI, no Python symbols
    fastgrpo/_C_cuda.so   csrc/cuda/*.cu    kernels for CUDA tensors, the same
    fastgrpo/_host.*.so   csrc/host/*.cpp   token-budget packing, CPU capability: pybind11, no torch

What cannot be built here is left out, and the package works without it. An isolated build sees no torch, so it takes
`pip install --no-build-isolation` to get them. Switches:

    FASTGRPO_CUDA=auto|0|1    auto: nvcc found and torch has CUDA. 1: nvcc alone (on a CPU torch a compile check)
    FASTGRPO_REQUIRE_EXT=1    without the CPU library there is no package: fail instead
    CXX, CXXFLAGS, NVCC, CUDA_HOME, MAX_JOBS
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
CUDA = os.environ.get("FASTGRPO_CUDA", "auto")
REQUIRED = os.environ.get("FASTGRPO_REQUIRE_EXT", "0") == "1"
SM = (80, 90, 100)

CXX = shlex.split(os.environ.get("CXX", "c++"))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and every later one
# No -march: kernels pick an instruction set at run time. No OpenMP: torch::stable::parallel_for runs in torch's pool.
CXXFLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", STABLE_ABI),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", f"-ffile-prefix-map={ROOT}/="),
    *shlex.split(os.environ.get("CXXFLAGS", "")),
]
RULES = """ninja_required_version = 1.5
rule compile
  command = $tool -MD -MF $out.d -c $in -o $out > $out.log 2>&1; status=$$?; cat $out.log; exit $$status
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $tool $in -o $out $libraries
  description = link $out
"""


def find_ninja():
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin"))
    return os.environ.get("NVCC") or shutil.which("nvcc", path=folders)


def find_torch():
    """Folder and version module of the installed torch; read, not imported, which would take seconds."""
    spec = find_spec("torch")
    if spec is None:
        raise LookupError("torch is not importable (install it; use --no-build-isolation)")
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    if tuple(map(int, version["__version__"].split(".")[:2])) < (2, 10):
        raise LookupError(f"torch >= 2.10 is needed, found {version['__version__']}")
    return folder, version


def check_tools():
    if sys.platform != "linux":
        raise LookupError(f"the build supports Linux only, this is {sys.platform}")
    if not find_ninja():
        raise LookupError("ninja is not installed")
    probe = [*CXX, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    try:
        subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LookupError(f"no C++20 compiler: {error}") from None


class Library(Extension):
    """A shared library and its edges in the ninja graph: `compile` once per source, `link` once."""

    def __init__(self, name, sources, compile, link, libraries=(), required=False):
        paths = sorted(ROOT.glob(sources))
        relative = [str(path.relative_to(ROOT)) for path in paths]
        super().__init__(f"fastgrpo.{name}", relative, optional=not required)
        self.target = OBJECTS / f"{name}.so"
        objects = [OBJECTS / f"{source}.o" for source in self.sources]
        self.edges = [
            f"build {out}: compile {path}\n  tool = {shlex.join(compile)}"
            for path, out in zip(paths, objects, strict=True)
        ]
        self.edges.append(f"build {self.target}: link {' '.join(map(str, objects))}")
        self.edges.append(f"  tool = {shlex.join(link)}\n  libraries = {shlex.join(libraries)}")


def cuda_library(nvcc, include, libraries):
    """The architectures of SM that this nvcc knows: machine code for each, PTX of the newest for later GPUs."""
    codes = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    sms = [sm for sm in SM if f"sm_{sm}" in codes]
    tool = [nvcc, "-ccbin", CXX[0], "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    tool += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sms]
    tool += [f"-gencode=arch=compute_{sms[-1]},code=compute_{sms[-1]}"]
    compile = [*tool, "-O3", "-lineinfo", STABLE_ABI, "-DUSE_CUDA", *include, "-Xptxas", "-v"]
    link = [*tool, "-shared"]
    return Library("_C_cuda", "csrc/cuda/*.cu", compile, link, libraries, CUDA == "1")


def libraries():
    """The libraries that this machine can build; says once what it cannot, and why."""
    if CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"FASTGRPO_CUDA must be auto, 0 or 1, got {CUDA!r}")
    nvcc = find_nvcc()
    if CUDA == "1" and not nvcc:
        raise SystemExit("FASTGRPO_CUDA=1, but there is no nvcc in PATH, CUDA_HOME or NVCC")
    try:
        check_tools()
        folder, version = find_torch()
    except LookupError as reason:
        if REQUIRED:
            raise SystemExit(f"FASTGRPO_REQUIRE_EXT=1, but {reason}") from None
        sys.stderr.write(f"fastgrpo: a pure-Python package, without compiled kernels: {reason}\n")
        return []
    include, link = ["-isystem", str(folder / "include")], [*CXX, "-shared"]
    torch_cpu = [f"-L{folder / 'lib'}", "-ltorch_cpu"]
    compile = [*CXX, *CXXFLAGS, *include]
    found = [Library("_C_cpu", "csrc/cpu/*.cpp", compile, link, torch_cpu, REQUIRED)]
    python = Path(sysconfig.get_path("include"))
    if (python / "Python.h").exists():  # torch's wheel brings the headers of pybind11
        compile = [*compile, "-isystem", str(python)]
        found.append(Library("_host", "csrc/host/*.cpp", compile, link))
    if nvcc and (CUDA == "1" or (CUDA == "auto" and version["cuda"])):
        torch_cuda = ["-ltorch_cuda"] if (folder / "lib" / "libtorch_cuda.so").exists() else []
        found.append(cuda_library(nvcc, include, torch_cpu + torch_cuda))
    return [library for library in found if library.sources]


class NinjaBuild(build_ext):
    """Setuptools decides where the libraries go; ninja makes them, and only what has changed."""

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2].startswith("_C_"):  # no Python module: no ABI in its name
            return f"{fullname.replace('.', os.sep)}.so"
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with open(OBJECTS / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            edges = [edge for library in self.extensions for edge in library.edges]
            (OBJECTS / "build.ninja").write_text(RULES + "\n".join(edges) + "\n")
            super().build_extensions()

    def build_extension(self, ext):
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(OBJECTS), *jobs, str(ext.target)]).returncode:
            raise CompileError(f"{ext.name} was not built; the compiler's messages are above")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ext.target, output)


class TaggedWheel(bdist_wheel):
    """Tags the wheel by what is in it: nothing compiled, libraries without Python symbols, or a Python module too."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        files = Path(self.bdist_dir).glob("**/fastgrpo/*.so")
        built = {path.name.partition(".")[0] for path in files}
        self.root_is_pure = not built
        if not built:
            return "py3", "none", "any"
        return (python, abi, platform) if "_host" in built else ("py3", "none", platform)


setup(ext_modules=libraries(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": TaggedWheel})
