"""Tables of users: JSON lines, JSON, CSV or Parquet, with the columns found by their usual names."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.trainer.data.jsonl import DataError, parse, parse_lines

PROMPT = ("prompt", "question", "problem", "instruction", "input")
ANSWER = ("answer", "ground_truth", "solution", "target", "label")
COMPLETION = ("completion", "response", "output", "answer", "solution")


def read_table(path: str) -> list[dict[str, Any]]:
    """The records of a file, read by what its name ends in.

    Raises:
        DataError: the file or a record cannot be read; the text names the file, and the line where there are lines.
    """
    kind = Path(path).suffix
    try:
        if kind in (".jsonl", ".ndjson"):
            return list(parse_lines(path))
        if kind == ".json":
            records = parse(Path(path).read_bytes())
            if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                raise DataError(f"{path}: expected a list of objects")
            return records
        if kind == ".csv":
            with Path(path).open(encoding="utf-8", newline="") as file:
                return _read_csv(path, csv.DictReader(file, strict=True))
        if kind == ".parquet":
            return _read_parquet(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    raise DataError(f"{path}: expected .jsonl, .json, .csv or .parquet")


def _read_csv(path: str, reader: "csv.DictReader[str]") -> list[dict[str, Any]]:
    records = []
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} cells"
                )
            records.append(record)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return records


def _read_parquet(path: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid  # type: ignore[import-untyped]
        from pyarrow.parquet import read_table as read  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        records: list[dict[str, Any]] = read(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    return records


def find_column(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column of the file."""
    columns = records[0] if records else {}
    return next((name for name in names if name in columns), None)


def need_column(
    path: str, records: Sequence[Mapping[str, Any]], names: Sequence[str], what: str
) -> str:
    """`find_column`, or an error that says what is missing."""
    found = find_column(records, names)
    if found is None:
        has = ", ".join(records[0]) if records else "no records"
        raise DataError(f"{path}: no column for the {what} (one of {', '.join(names)}), got {has}")
    return found


def text_of(path: str, number: int, record: Mapping[str, Any], column: str) -> str:
    """A cell that must hold text (or a number, which is written out)."""
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{path}, record {number}: expected text in {column!r}, got {type(value).__name__}"
        )
    return str(value)
