"""What only the source of the kernels can promise without a GPU (N35-N37): no atomics, no autotuning, no TF32."""

import ast
import re
from pathlib import Path

import pytest

import fastgrpo

PACKAGE = Path(fastgrpo.__file__).resolve().parent
TRITON = sorted((PACKAGE / "kernels").glob("*.py"))
NATIVE = sorted(p for p in (PACKAGE.parent / "csrc").rglob("*") if p.is_file())


def names(path: Path) -> set[str]:
    """Every attribute and name of a module, without its strings and comments."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {getattr(node, "attr", getattr(node, "id", "")) for node in tree}


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_N35_N37_triton_kernels_sum_in_a_fixed_order_and_choose_nothing_at_run_time(path):
    used = names(path)
    assert not {name for name in used if name.startswith("atomic_")}, "sums would depend on timing"
    assert not used & {"autotune", "Autotuner", "heuristics"}, "the first call would differ"


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_N36_products_inside_of_triton_are_float32(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "dot":
            precision = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert precision.get("input_precision") == "ieee", f"{path.name}:{node.lineno}"


@pytest.mark.skipif(not NATIVE, reason="needs the source tree")
def test_N35_native_kernels_have_no_atomic_floats():
    for path in NATIVE:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(
            r"atomicAdd\s*\(|red\.global|#pragma omp atomic|atomic<\s*(float|double)", code
        ), path


def test_no_kernel_is_specialised_on_a_number_that_changes():
    """Thresholds, temperatures and lengths are run-time arguments: nothing is compiled anew for another value."""
    changing = re.compile(
        r"temperature|eps|beta|length|num_tokens|batch|coef|normalizer|scale\b", re.IGNORECASE
    )
    found = []
    for path in TRITON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for argument in node.args.args:
                kind = ast.unparse(argument.annotation) if argument.annotation else ""
                is_flag = argument.arg.startswith(("HAS_", "WITH_", "IS_"))
                if "constexpr" in kind and changing.search(argument.arg) and not is_flag:
                    found.append(f"{path.name}: {node.name}({argument.arg})")
    assert not found, found
