"""The architecture as a test: who may import whom, inside the package and outside of it.

`BELOW` is the picture in the design: a module may import its own layer and any layer below. A new top-level module has
to be placed here before the test passes, which is the moment to ask where it belongs.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastgrpo

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastgrpo.__file__).resolve().parent

# Layer -> its top-level modules. Leaves first.
LAYERS = {
    "leaf": {"spec", "host", "_host", "words"},
    "reference": {"reference"},
    "kernels": {"kernels"},
    "ops": {"ops"},
    "functional": {"functional"},
    "algorithm": {
        "advantages",
        "batch",
        "choices",
        "convert",
        "encoding",
        "linear_losses",
        "losses",
        "masks",
        "metrics",
        "objective",
        "reduction",
        "rollout_correction",
        "row_plan",
        "surrogates",
    },
    "testing": {"testing"},
    "trainer": {"trainer"},
    "bench": {"bench"},
    "integrations": {"integrations"},
    "doctor": {"doctor"},
    "planner": {"planner"},
    "verify": {"verify"},
    "cli": {"cli", "__main__"},
}
BELOW = {
    "leaf": set(),
    "reference": {"leaf"},
    "kernels": {"leaf"},
    "ops": {"leaf", "reference", "kernels"},
    "functional": {"leaf", "reference", "kernels", "ops"},
    "algorithm": {"leaf", "reference", "kernels", "ops", "functional"},
    "testing": {"leaf", "reference", "algorithm"},
    "trainer": {"leaf", "reference", "ops", "functional", "algorithm"},
    "bench": {"leaf", "reference", "kernels", "ops", "functional", "algorithm", "testing"},
    "integrations": {"leaf", "ops", "functional", "algorithm"},
    "doctor": {"leaf", "ops", "integrations"},
    "verify": {"leaf", "functional"},
    "planner": {"leaf", "ops", "functional", "algorithm", "bench"},
    "cli": {"leaf", "ops", "functional", "algorithm", "testing", "trainer", "bench", "doctor"},
}
# Foreign packages that a layer may import. None: any; these layers exist to meet other libraries.
FOREIGN: dict[str, set[str] | None] = {
    "leaf": set(),
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "functional": {"torch"},
    "algorithm": {"torch"},
    "testing": {"torch"},
    "trainer": None,
    "bench": None,
    "integrations": None,
    "doctor": {"torch"},
    "verify": None,
    "planner": {"torch", "trl"},
    "cli": {"torch", "rich", "tyro"},
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
CORE = [path for path in SOURCES if path != PACKAGE / "__init__.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES} | {"fastgrpo._host"}


def layer_of(module: str) -> str:
    top = module.split(".")[1]
    assert top in LAYER_OF, (
        f"fastgrpo.{top} has no layer: place it in LAYERS of {Path(__file__).name}"
    )
    return LAYER_OF[top]


def imports(path: Path, inside_functions: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if node.module == "fastgrpo" and alias.name in fastgrpo._HOMES:
                    inner = fastgrpo._HOMES[alias.name]  # a public name counts as its home
                yield node.lineno, inner if inner in MODULES else str(node.module)


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_imports_go_downwards_only(path):
    layer = layer_of(module_name(path))
    for line, name in imports(path):
        if not name.startswith("fastgrpo."):
            continue
        other = layer_of(name)
        allowed = other == layer or other in BELOW[layer]
        assert allowed, f"{path}:{line}: {layer} may not import {name} ({other})"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_foreign_imports(path):
    name = module_name(path)
    allowed = set() if name == "fastgrpo" else FOREIGN[layer_of(name)]
    for line, imported in imports(path):
        top = imported.split(".")[0]
        if top == "fastgrpo" or top in sys.stdlib_module_names or allowed is None:
            continue
        assert top in allowed, f"{path}:{line}: {name} may not import {top}"


def test_layers_are_a_downward_order():
    assert BELOW.keys() == LAYERS.keys() == FOREIGN.keys()
    TopologicalSorter(BELOW).prepare()  # raises CycleError


def test_no_module_imports_itself_in_a_circle():
    """When modules load, that is: an alternative constructor may import what is built on its class."""
    graph = {}
    for path in CORE:
        loaded = {name for _, name in imports(path, inside_functions=False) if name in MODULES}
        graph[module_name(path)] = loaded - {module_name(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in SOURCES}
    missing = [relative(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py, so no wheel would contain it: {missing}"


# What csrc may include besides the C++ library and its own files. Anything else of torch is not ABI-stable, and
# Python.h would tie a library to one Python.
NATIVE = {
    "cpu": r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/",
    "cuda": r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/|<(cuda|cub|cooperative_groups)",
    "host": r"<pybind11/",
}


@pytest.mark.parametrize("folder", NATIVE)
def test_native_includes(folder):
    files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            header = re.match(r"\s*#\s*include\s+(\S+)", line)
            if header is None or ("." not in header[1] and "/" not in header[1]):
                continue  # <vector> and its like
            own = header[1].startswith('"')
            system = header[1] in ("<cpuid.h>", "<immintrin.h>")
            assert own or system or re.match(NATIVE[folder], header[1]), (
                f"{path.name}: {line.strip()}"
            )
