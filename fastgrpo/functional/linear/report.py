"""Which path the linear ops took in this process: nothing falls back silently."""

import logging

_logger = logging.getLogger("fastgrpo")
_paths: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


def note_path(op: str, path: str) -> None:
    """Remember the path that an op takes, and log it the first time."""
    _paths[op] = path
    if (op, path) not in _logged:
        _logged.add((op, path))
        _logger.info("%s: %s", op, path)


def path_report() -> dict[str, str]:
    """The path that each linear op took last, in words; empty before the first call."""
    return dict(_paths)
