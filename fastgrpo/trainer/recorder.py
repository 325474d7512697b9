"""metrics.jsonl: one JSON object per line, readable while the run goes on."""

import json
from pathlib import Path
from types import TracebackType

from fastgrpo.trainer.rundir import finite


class Recorder:
    """Appends records to the file and keeps them for the report."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, float | str]] = []
        self._file = path.open("w", encoding="utf-8")

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
