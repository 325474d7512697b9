"""Stand-ins for hosts that cannot be installed here: modules with the recorded signatures, removed after the test."""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec


@contextmanager
def fake_modules(attributes: dict[str, dict[str, object]]) -> Iterator[None]:
    """Put modules (dotted name -> attributes) and their parents into sys.modules for a block."""
    made: dict[str, types.ModuleType] = {}
    for name in attributes:
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            path = ".".join(parts[:k])
            if path not in made:
                made[path] = types.ModuleType(path)
                made[path].__path__ = []
                made[path].__spec__ = ModuleSpec(path, None)
    for name, values in attributes.items():
        for key, value in values.items():
            setattr(made[name], key, value)
    assert not made.keys() & sys.modules.keys(), "a fake must not hide a real host"
    sys.modules |= made
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def function_with(parameters: str) -> Callable[..., str]:
    """A function that takes these parameters and returns "the host's own"."""
    space: dict[str, Callable[..., str]] = {}
    exec(f'def f({", ".join(parameters.split())}):\n    return "the host\'s own"', space)
    return space["f"]


def method_class(method: str, parameters: str) -> type:
    """A class with one method of the recorded signature."""
    return type("Host", (), {method: function_with(parameters)})
