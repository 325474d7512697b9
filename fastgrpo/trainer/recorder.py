"""metrics.jsonl: one JSON object per line, readable while the run goes on."""

import json
import os
from pathlib import Path
from types import TracebackType

from fastgrpo.trainer.rundir import finite


class Recorder:
    """Appends records to the file and keeps them for the report."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.records: list[dict[str, float | str]] = []
        self._file = path.open("a+" if resume else "w", encoding="utf-8")

    def rewind(self, size: int) -> None:
        """Keeps the whole lines of the first `size` bytes: what an interrupted run had written when it was saved."""
        self._file.seek(0)
        kept = bytes(self._file.buffer.read(size))
        kept = kept[: kept.rfind(b"\n") + 1]
        self._file.truncate(len(kept))
        self._file.seek(0, os.SEEK_END)
        lines = [json.loads(line) for line in kept.splitlines()]
        nan = float("nan")
        self.records = [{k: nan if v is None else v for k, v in line.items()} for line in lines]

    def sync(self) -> int:
        """Waits until the disk has every record; returns the size of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
        """One record; `phase` is sft, grpo or eval."""
        record: dict[str, float | str] = {"phase": phase, "step": step, **numbers}
        self.records.append(record)
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def of(self, phase: str) -> list[dict[str, float | str]]:
        """The records of one phase."""
        return [record for record in self.records if record["phase"] == phase]

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
