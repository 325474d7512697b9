"""`fastgrpo sft`: supervised fine-tuning of a model of the user's on prompts with completions."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgrpo.trainer.options.config import option
from fastgrpo.trainer.options.inputs import model_folder, need_file
from fastgrpo.trainer.options.settings import SettingsError, fail, parse_options
from fastgrpo.trainer.output.rundir import RunDirError, check

STARTED = time.time()


@dataclass(frozen=True, kw_only=True)
class SFTOptions:
    """Options of `fastgrpo sft`."""

    model_name_or_path: str
    """Folder of the model to start from."""
    data: str
    """Prompts and completions: .jsonl, .json, .csv or .parquet, columns like prompt/question and completion/answer."""
    test_data: str | None = None
    """Examples to measure the loss on; without it a twentieth of `data` is held out."""
    format: Literal["custom", "gsm8k"] = "custom"
    """gsm8k: questions get the instruction of the job gsm8k, solutions lose the calculator's annotations."""
    output_dir: str | None = None
    """Folder for everything the run leaves. Default: runs/sft, or the next free runs/sft-2, -3, ..."""
    overwrite: bool = False
    """Replace the run that `output_dir` holds."""
    seed: int = 0
    """Order of the examples."""
    threads: int = 1
    """CPU threads."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights stay float32."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    learning_rate: float = 5e-5
    """Constant after the warm-up."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    per_device_train_batch_size: int = 8
    """Rows per step."""
    max_length: int = 4096
    """Tokens per row; longer examples are left out and counted."""
    packing: bool = True
    """Fill rows with several examples; attention does not cross between them."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        """Reject numbers that cannot be meant, naming the option."""
        for name in ("threads", "per_device_train_batch_size", "max_length"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{option(name)} {rule}, got {getattr(self, name)!r}")

    @property
    def folder(self) -> Path | None:
        """Where everything goes, if the options say so."""
        return None if self.output_dir is None else Path(self.output_dir)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 for options that cannot be meant, 130 after Ctrl-C."""
    try:
        options = parse_options(SFTOptions, arguments, "fastgrpo sft", __doc__ or "")
        for name in ("data", "test_data"):
            need_file(option(name), getattr(options, name))
        model_folder("--model-name-or-path", options.model_name_or_path)
        if options.folder is not None:
            check(options.folder, options.overwrite)
    except (SettingsError, RunDirError) as error:
        return fail(error)
    print("loading torch and transformers ...", flush=True)
    os.umask(0o077)  # a run holds examples of its owner
    from fastgrpo.trainer.sft.run import run_sft

    return run_sft(options, STARTED)
