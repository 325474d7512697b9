"""Builds at the same time, builds that are killed, damaged compiler caches: never a hang, never half a library.

A build is an ordinary `setup.py build_ext` here: no lock that a killed process could leave behind, and the library
appears under its name in one step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_build import FAST, HOST_PROBE, PROBE

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
ENVIRONMENT = {**os.environ, **FAST, "FASTGRPO_REQUIRE_EXT": "1"}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def source_tree(target: Path) -> Path:
    """A checkout with a small library in the place of the real one."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastgrpo", target / "fastgrpo", ignore=ignore)
    for folder, text in (("cpu", PROBE), ("host", HOST_PROBE)):
        (target / "csrc" / folder).mkdir(parents=True)
        (target / "csrc" / folder / "probe.cpp").write_text(text)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


LOADS = """
import torch, fastgrpo.ops
grad = torch.ones(2)
torch.ops.fastgrpo.scale_gradient_(grad, torch.full((1,), 2.0))
print("probe" if grad[0].item() == 7.0 else "reference", fastgrpo.ops.__file__)
"""


def served(tree: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=tree, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernel, path = done.stdout.split()
    assert path.startswith(str(tree))
    return kernel


def start(tree: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        BUILD, cwd=tree, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_builds_at_the_same_time(tmp_path):
    """Eight ranks that start a build in one checkout: whoever comes last, the library is whole and right."""
    tree = source_tree(tmp_path / "tree")
    builds = [start(tree) for _ in range(3)]
    outputs = [build.communicate(timeout=240)[0] for build in builds]
    failed = [out for build, out in zip(builds, outputs, strict=True) if build.returncode]
    assert len(failed) < len(builds), failed[0]
    again = start(tree)
    assert again.wait(timeout=240) == 0, again.communicate()[0]
    assert served(tree) == "probe"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "after", [1.5, *(pytest.param(t, marks=SLOW) for t in (0.3, 0.6, 1.0, 2.0, 3.0))]
)
def test_a_killed_build_leaves_no_lock_and_no_half_library(tmp_path, after):
    tree = source_tree(tmp_path / "tree")
    build = start(tree)
    time.sleep(after)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    kernel = served(tree)  # works, whatever there is
    assert kernel in ("probe", "reference")
    again = start(tree)
    assert again.wait(timeout=240) == 0, again.communicate()[0]
    assert served(tree) == "probe"


def test_a_library_cut_in_half_is_replaced_loudly_and_rebuilt(tmp_path):
    tree = source_tree(tmp_path / "tree")
    build = start(tree)
    assert build.wait(timeout=240) == 0, build.communicate()[0]
    (library,) = (tree / "fastgrpo").glob("_C_cpu*.so")
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    assert served(tree) == "reference"
    for path in (tree / "build").rglob("_C_cpu*.so"):
        path.unlink()
    again = start(tree)
    assert again.wait(timeout=240) == 0, again.communicate()[0]
    assert served(tree) == "probe"


COMPILE = """
import json, os, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastgrpo.kernels.scale_gradient import *
import fastgrpo.kernels.scale_gradient as module
kernel = next(f for f in vars(module).values() if isinstance(f, triton.JITFunction))
names = kernel.arg_names
signature = {n: "constexpr" if p.is_constexpr else ("*fp32" if n.endswith("_ptr") else "i32")
             for n, p in zip(names, kernel.params)}
constants = {(i,): 128 for i, p in enumerate(kernel.params) if p.is_constexpr}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(json.dumps(sorted(built.asm)))
"""


def compile_kernel(cache: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_truncated_triton_cache(tmp_path):
    """What a power cut leaves: a file of the cache cut in half. It never hangs, and deleting the cache always helps.

    Triton itself stops (exit code 1) where its index of a kernel is no JSON: it names the file in no message.
    """
    pytest.importorskip("triton")
    cache = tmp_path / "cache"
    first = compile_kernel(cache)
    assert first.returncode == 0, first.stderr
    assert "cubin" in json.loads(first.stdout)
    spoilt = [p for p in sorted(cache.rglob("*")) if p.suffix in (".json", ".cubin")]
    assert len(spoilt) >= 3
    for path in spoilt:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        done = compile_kernel(cache)
        assert done.returncode in (0, 1)
        assert done.returncode == 0 or "JSONDecodeError" in done.stderr, done.stderr
        path.write_bytes(content)
    shutil.rmtree(cache)
    assert compile_kernel(cache).returncode == 0
