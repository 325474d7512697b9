"""`import fastgrpo` is cheap, and every public name is where `__init__` says it is."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrpo


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


# What each import may not pull in: torch takes seconds, Triton needs a driver, transformers takes more seconds.
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastgrpo", ("torch", "numpy", "triton")),
        ("import fastgrpo.host; fastgrpo.host.balance([3, 2, 1], 2)", ("torch", "numpy")),
        ("import fastgrpo.spec", ("torch",)),
        ("import fastgrpo.ops", ("triton", "transformers", "trl")),
        ("from fastgrpo import grpo_loss, Objective", ("transformers", "trl", "datasets", "rich")),
    ],
    ids=["package", "host", "spec", "ops", "losses"],
)
def test_import_stays_light(statement, absent):
    code = f"{statement}\nimport sys\nfound = [m for m in {absent!r} if m in sys.modules]\nassert not found, found"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", fastgrpo.__all__)
def test_public_name_resolves(name):
    value = getattr(fastgrpo, name)
    assert value is getattr(importlib.import_module(fastgrpo._HOMES[name]), name)
    assert value.__doc__, f"fastgrpo.{name} has no docstring"


def test_every_list_of_public_names_agrees():
    tree = ast.parse(Path(fastgrpo.__file__).read_text(encoding="utf-8"))
    imports = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    typed = {
        alias.name: node.module
        for node in imports.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == fastgrpo._HOMES
    assert sorted(fastgrpo.__all__) == sorted(fastgrpo._HOMES)
    assert set(fastgrpo.__all__) <= set(dir(fastgrpo))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'grpo_los'"):
        fastgrpo.grpo_los  # noqa: B018
