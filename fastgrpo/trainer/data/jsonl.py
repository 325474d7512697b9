"""JSON-lines files of users: read strictly, so that a bad line is named and not guessed at."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A file that cannot be used; its text names file and line."""


def parse_lines(path: str, text_fields: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a file, each of which must have the given fields as text. Empty lines are skipped."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        for field in text_fields:
            if not isinstance(record.get(field), str):
                raise DataError(f"{where}: expected text in field {field!r}")
        yield record


def parse(content: bytes) -> Any:
    """JSON as Python values.

    Raises:
        ValueError: It is none, or none that can be worked with: 100,000 brackets, 5,000 digits, half a character.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if rb"\ud" in content.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(r"text with half of a surrogate pair (\udXXX)") from None
    return value
