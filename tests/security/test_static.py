"""What the source must not contain: ways to run what was read, and ways out to the network.

Every exception stands in a table with its reason, and a table entry that nothing needs any more fails too.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgrpo

PACKAGE = Path(fastgrpo.__file__).resolve().parent
ROOT = PACKAGE.parent
SOURCES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "setup.py"]

# Modules whose loading runs code, or that unpack archives or talk to others by themselves.
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "pty"),
    *("zipfile", "tarfile", "zipimport", "ftplib", "smtplib", "telnetlib", "xmlrpc", "socketserver", "wsgiref"),
    *("requests", "httpx", "aiohttp", "urllib3", "huggingface_hub", "torch.package", "torch.hub"),
}  # fmt: skip
NETWORK = {"socket", "urllib.request", "http.client", "http.server", "asyncio"}
BUILT_IN = {"eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.serialization.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.dump"),
    *("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "subprocess.getoutput"),
    *("shutil.unpack_archive", "shutil.make_archive", "tempfile.mktemp", "load_state_dict_from_url"),
    *("importlib.reload", "types.FunctionType", "types.CodeType", "os.chmod"),
}  # fmt: skip
METHODS = {"extractall", "exec_module", "load_module", "loads_pickle"}
KEYWORDS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}

# (file, what it uses) -> why that is fine.
ALLOWED = {
    ("trainer/rewards/child.py", "exec_module"): "the user's reward function, in a process of its own",
    ("trainer/rewards/child.py", "asyncio"): "awaits an async reward function; opens no connection",
    ("trainer/checkpoint/lock.py", "socket"): "gethostname, so that a lock names its holder",
    ("trainer/parallel/heartbeat.py", "socket"): "gethostname, so that a dead rank is named",
    ("trainer/sampling/http_json.py", "http.client"): "the client of a vLLM server that the user names",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a call's function, or its last part."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def findings(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of everything in a file that is on one of the lists."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names.append(str(node.module))
        for name in names:
            for bad in MODULES | NETWORK | CALLS:
                if name == bad or name.startswith(f"{bad}."):
                    yield bad, node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in BUILT_IN or called in CALLS:
            yield called, node.lineno
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield node.func.attr, node.lineno
        for keyword in node.keywords:
            if keyword.arg in KEYWORDS and (
                not isinstance(keyword.value, ast.Constant)
                or keyword.value.value is KEYWORDS[keyword.arg]
            ):
                yield f"{keyword.arg}={ast.unparse(keyword.value)}", node.lineno


def relative(path: Path) -> str:
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return str(path.relative_to(base))


def test_nothing_that_runs_what_was_read():
    found = {(relative(p), name): line for p in SOURCES for name, line in findings(p)}
    unexpected = {key: line for key, line in found.items() if key not in ALLOWED}
    assert not unexpected, f"forbidden here, or in need of a reason in ALLOWED: {unexpected}"
    existing = {relative(p) for p in SOURCES}
    stale = [key for key in ALLOWED if key not in found and key[0] in existing]
    assert not stale, f"no longer needed: {stale}"


HOSTILE = """
import pickle, tarfile
from torch import load
from yaml import unsafe_load as quiet
import yaml, os, torch, subprocess, numpy
eval("1"); exec("1"); compile("1", "", "exec"); __import__("os")
torch.load("x"); yaml.load("x"); os.system("x"); subprocess.run("x", shell=True)
torch.load("x", weights_only=False); numpy.load("x", allow_pickle=True); flag = True
model.from_pretrained("x", trust_remote_code=True); model.from_pretrained("x", trust_remote_code=flag)
archive.extractall("/"); spec.loader.exec_module(m); os.popen("x")
"""


def test_the_gate_sees_what_it_is_for(tmp_path):
    (tmp_path / "bad.py").write_text(HOSTILE)
    found = Counter(name for name, _ in findings(tmp_path / "bad.py"))
    expected = {
        *("pickle", "tarfile", "torch.load", "yaml.unsafe_load", "eval", "exec", "compile", "__import__"),
        *("yaml.load", "os.system", "shell=True", "weights_only=False", "allow_pickle=True"),
        *("trust_remote_code=True", "trust_remote_code=flag", "extractall", "exec_module", "os.popen"),
    }  # fmt: skip
    assert set(found) == expected
    assert found["torch.load"] == 3


def test_models_are_read_without_code_of_theirs_and_without_a_hub():
    """Every `from_pretrained` and `from_config` of the package says so, in the call or by a constant that does."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            given = {k.arg: k.value for k in node.keywords}
            spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
            where = f"{relative(path)}:{node.lineno}"
            fixed = {name: getattr(value, "value", None) for name, value in given.items()}
            if "LOCAL" not in spread:
                needs_no_flag = dotted(node.func).startswith("PeftModel.")  # it loads no classes
                assert needs_no_flag or fixed.get("trust_remote_code") is False, where
                assert node.func.attr == "from_config" or fixed.get("local_files_only") is True, (
                    where
                )
            if "ModelFor" in dotted(node.func) and node.func.attr == "from_pretrained":
                assert fixed.get("use_safetensors") is True, f"{where}: reads pickled weights"
    from fastgrpo.trainer.setup import LOCAL

    assert LOCAL == {"local_files_only": True, "trust_remote_code": False}


# Bandit's findings that are no faults: (file or everywhere, test) -> why. Severity high has no exceptions at all.
SUPPRESSED = {
    ("*", "B101"): "assert states our own invariants; what callers rely on raises (digest under python -O)",
    ("*", "B105"): "the word token is a language model's here",
    ("*", "B311"): "random numbers choose data and seeds, not secrets",
    ("*", "B404"): "subprocess is imported where it is used, and each use is listed below",
    ("setup.py", "B603"): "compilers, by argument list",
    ("fastgrpo/bench/run.py", "B603"): "git describe, by argument list",
    ("fastgrpo/bench/step.py", "B603"): "this Python with a module of ours",
    ("fastgrpo/planner/peaks.py", "B603"): "this Python with a module of ours",
    ("fastgrpo/trainer/rewards/process.py", "B603"): "this Python with a module of ours",
    ("fastgrpo/trainer/setup.py", "B615"): "a local folder; LOCAL forbids the hub",
    ("fastgrpo/verify/head.py", "B615"): "a local folder; local_files_only",
}  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("bandit") is None,
    reason="bandit is not installed (it is in the extra `test`)",
)
def test_bandit():
    command = [sys.executable, "-m", "bandit", "-q", "-r", "fastgrpo", "setup.py", "-f", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert not report["errors"]
    issues = [(r["filename"].removeprefix("./"), r["test_id"], r) for r in report["results"]]
    high = [r["filename"] for _, _, r in issues if r["issue_severity"] == "HIGH"]
    assert not high
    keys = {(file, test) for file, test, _ in issues} | {("*", test) for _, test, _ in issues}
    unexplained = [
        f"{file}:{r['line_number']} {test} {r['issue_text']}"
        for file, test, r in issues
        if (file, test) not in SUPPRESSED and ("*", test) not in SUPPRESSED
    ]
    assert not unexplained, unexplained
    assert not [k for k in SUPPRESSED if k not in keys and (ROOT / k[0]).exists()], (
        "no longer needed"
    )


def test_pip_audit_of_what_the_core_needs():
    """Known vulnerabilities of the installed torch and triton; needs its database, so it is skipped without network."""
    if importlib.util.find_spec("pip_audit") is None:
        pytest.skip(
            "NOT CHECKED: pip-audit is not installed (pip install pip-audit, needs network)"
        )
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "ConnectionError" in done.stderr or "Failed to" in done.stderr:
        pytest.skip("NOT CHECKED: pip-audit cannot reach its vulnerability database")
    core = [line for line in done.stdout.splitlines() if line.startswith(("torch ", "triton "))]
    assert not core, core
