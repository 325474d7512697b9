"""metrics.jsonl: one JSON object per line, readable while the run goes on."""

import json
import os
from pathlib import Path
from types import TracebackType

from fastgrpo.trainer.output.rundir import finite

Record = dict[str, float | str]


class Recorder:
    """Appends records to the file. They are not kept in memory: a run may last for months."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self._path = path
        self._file = path.open("a+" if resume else "w", encoding="utf-8")
        self._evaluated: set[float | str] = set()

    def rewind(self, size: int) -> None:
        """Keeps the whole lines of the first `size` bytes: what an interrupted run had written when it was saved."""
        self._file.flush()
        kept = self._path.read_bytes()[:size]
        self._file.truncate(kept.rfind(b"\n") + 1)
        self._evaluated = {r["step"] for r in self.records if r["phase"] == "eval"}

    @property
    def size(self) -> int:
        """Bytes so far."""
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Waits until the disk has every record; may be called by another thread."""
        os.fsync(self._file.fileno())

    def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
        """One record; `phase` is sft, grpo or eval."""
        record: Record = {"phase": phase, "step": step, **numbers}
        if phase == "eval":
            self._evaluated.add(step)
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def is_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        return step in self._evaluated

    @property
    def records(self) -> list[Record]:
        """Every record so far, read back."""
        nan = float("nan")
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return [{k: nan if v is None else v for k, v in json.loads(line).items()} for line in lines]

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
