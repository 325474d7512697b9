"""Replace one function of a host, wherever the host has imported it by name, and put it back."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastgrpo.integrations.contracts import contract


class Swap:
    """A named symbol of a host and what stands in for it; `enable` checks the contract first."""

    def __init__(self, host: str, module: str, name: str, replacement: Any) -> None:
        """Remember what to replace."""
        self.host, self.module, self.name, self.replacement = host, module, name, replacement
        self._saved: list[tuple[Any, Any]] = []

    @property
    def is_enabled(self) -> bool:
        """Whether the host uses the replacement."""
        return bool(self._saved)

    def enable(self) -> None:
        """Replace the symbol in every module of the host that holds it; a second call does nothing."""
        if self.is_enabled:
            return
        contract(self.host).check()
        home = importlib.import_module(self.module)
        original, package = getattr(home, self.name), self.module.partition(".")[0]
        for name, module in list(sys.modules.items()):
            inside = name == package or name.startswith(f"{package}.")
            if inside and getattr(module, self.name, None) is original:
                self._saved.append((module, original))
                setattr(module, self.name, self.replacement)

    def disable(self) -> None:
        """Put the original back everywhere."""
        for module, original in self._saved:
            setattr(module, self.name, original)
        self._saved.clear()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Enable for a block and restore what was there before."""
        before = self.is_enabled
        self.enable()
        try:
            yield
        finally:
            if not before:
                self.disable()
