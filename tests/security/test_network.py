"""No command opens a socket to the world: not at import, help, build, doctor or training; none listens.

Python's own sockets are seen by an audit hook in the child, those of native code by strace where it can be used, and
where the kernel allows it the training runs in a network namespace that has no network at all.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent.parent
HOOK = """
import os, sys
def _hook(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "ftplib", "smtplib") and event not in ALLOWED:
        if event == "socket.__new__" and arguments[1] == 1:
            return  # AF_UNIX
        with open(os.environ["FASTGRPO_TEST_SOCKETS"], "a") as file:
            file.write(f"{event} {arguments!r}\\n")
ALLOWED = ("socket.gethostname",)
sys.addaudithook(_hook)
"""


@pytest.fixture
def watched(tmp_path):
    """(environment with the hook in every Python that starts, a function that returns what was seen)."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    seen = tmp_path / "sockets"
    path = os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "FASTGRPO_TEST_SOCKETS": str(seen)}
    return environment, lambda: seen.read_text().splitlines() if seen.exists() else []


def run(command, environment, cwd, timeout=250):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_the_hook_sees_a_socket(watched, tmp_path):
    environment, seen = watched
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); s.connect_ex(('127.0.0.1', 9))"
    run([sys.executable, "-c", code], environment, tmp_path)
    assert {line.split()[0] for line in seen()} == {
        "socket.__new__",
        "socket.bind",
        "socket.connect",
    }


EVERYTHING = """
import importlib, pkgutil, fastgrpo
for name in fastgrpo.__all__:
    getattr(fastgrpo, name)
for module in pkgutil.walk_packages(fastgrpo.__path__, "fastgrpo."):
    if not module.name.startswith(("fastgrpo.integrations", "fastgrpo.__main__", "fastgrpo._", "fastgrpo.bench")):
        importlib.import_module(module.name)
"""


def test_importing_every_module(watched, tmp_path):
    environment, seen = watched
    run([sys.executable, "-c", EVERYTHING], environment, tmp_path)
    assert seen() == []


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_help(watched, tmp_path, name):
    environment, seen = watched
    run(
        [sys.executable, "-m", "fastgrpo", *([name] if name else []), "--help"],
        environment,
        tmp_path,
    )
    assert seen() == []


def test_doctor(watched, tmp_path):
    environment, seen = watched
    run([sys.executable, "-m", "fastgrpo", "doctor", "--json"], environment, tmp_path)
    assert seen() == []


def test_building_a_wheel(watched, tmp_path):
    """What a user's `pip install --no-build-isolation` runs, without a compiler: nothing is downloaded for it."""
    environment, seen = watched
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastgrpo", source / "fastgrpo", ignore=ignore)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path / "dist"],
        {**environment, "CXX": "/bin/false", "FASTGRPO_REQUIRE_EXT": "0"},
        source,
    )
    assert list((tmp_path / "dist").glob("*.whl"))
    assert seen() == []


def without_network() -> list[str]:
    """A prefix that takes the network away; empty where the kernel does not let this user."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def traced(log: Path) -> list[str]:
    """A prefix that records what native code does with sockets; empty where processes cannot be traced."""
    if shutil.which("strace") is None:
        return []
    prefix = ["strace", "-f", "-qq", "-e", "trace=connect,bind,listen,sendto", "-o", str(log)]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


JOB = ["train", "copy", "--sft-steps=2", "--max-steps=2", "--eval-questions=4", "--eval-steps=0", "--no-cache-base",
       "--prompts-per-step=2", "--threads=1"]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the report needs it")
def test_training_with_report_and_checkpoints(watched, tmp_path, record_property):
    environment, seen = watched
    log = tmp_path / "strace"
    prefix = [*without_network(), *traced(log)]
    record_property("prefix", " ".join(prefix) or "none")
    out = tmp_path / "run"
    run(
        [*prefix, sys.executable, "-m", "fastgrpo", *JOB, f"--output-dir={out}"],
        environment,
        tmp_path,
    )
    assert (out / "report.html").exists()
    assert json.loads((out / "summary.json").read_text())["stopped"] is None
    assert seen() == []
    if log.exists():
        calls = log.read_text().splitlines()
        outside = [call for call in calls if re.search(r"AF_INET6?|AF_PACKET|listen\(", call)]
        assert not outside, outside[:5]
