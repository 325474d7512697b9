"""What is installed with the package, and that two builds of one source are the same bytes."""

import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from itertools import chain
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_core_needs_torch_and_triton_only():
    names = {re.split(r"[<>=;\[ ]", text)[0] for text in PROJECT["dependencies"]}
    assert names == {"torch", "triton"}


def test_no_dependency_comes_from_an_address():
    """Names on the index that pip uses: no URL, no git, no file."""
    everything = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    assert len(everything) > 10
    assert not [text for text in everything if "@" in text or "://" in text]


def test_nothing_runs_at_install_or_start_of_python():
    """No .pth file, no entry point but the command, no build step that is not in setup.py."""
    assert set(PROJECT["scripts"]) == {"fastgrpo"}
    assert "entry-points" not in PROJECT
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = listed.stdout.split()
    assert not [n for n in names if n.endswith((".pth", ".so", ".pkl", ".bin", ".pt", ".exe"))]


def build(source: Path, target: Path) -> dict[str, str]:
    """SHA-256 of a wheel and a source distribution."""
    shutil.copytree(source, target)
    settings = {"CXX": "/bin/false", "FASTGRPO_REQUIRE_EXT": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    environment = {**os.environ, **settings}
    for kind in ("bdist_wheel", "sdist"):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", kind, "-d", "dist"],
            cwd=target, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in (target / "dist").iterdir()}


def test_two_builds_are_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("fastgrpo", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    first, second = build(source, tmp_path / "a"), build(source, tmp_path / "b" / "deeper")
    assert len(first) == 2
    wheel = next(name for name in first if name.endswith(".whl"))
    assert first[wheel] == second[wheel]
    assert set(first) == set(second)
