"""Base models that earlier runs have made, so that the second run with the same options starts with GRPO at once."""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import nn

from fastgrpo.trainer.options.config import TrainConfig

DEPENDS_ON = ("job", "seed", "threads", "data", "sft_steps", "sft_batch_size", "sft_learning_rate")
WEIGHTS = "model.safetensors"


def cache_key(config: TrainConfig, sources: Sequence[ModuleType]) -> str:
    """Changes with everything that decides the base: options, the user's file, the code that makes it, versions."""
    facts: dict[str, object] = {name: getattr(config, name) for name in DEPENDS_ON}
    facts["versions"] = [torch.__version__, transformers.__version__]
    facts["device"] = config.device
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for module in sources:
        digest.update(inspect.getsource(module).encode())
    if config.data is not None:
        digest.update(Path(config.data).read_bytes())
    return f"{config.job}-{digest.hexdigest()[:20]}"


def cache_folder(output_dir: Path) -> Path | None:
    """A folder beside the runs that only its owner can write to, None if there can be none."""
    folder = output_dir.absolute().parent / ".cache" / "fastgrpo"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None  # others may have put a base there
        folder.chmod(0o700)
    except OSError:
        return None
    return folder


def load_base(model: nn.Module, folder: Path, key: str) -> bool:
    """Puts a cached base's weights into `model`; False if there is none that fits."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, folder / key / WEIGHTS)
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def store_base(model: nn.Module, folder: Path, key: str) -> None:
    """Adds a base to the cache, whole or not at all."""
    from safetensors.torch import save_model

    draft = Path(tempfile.mkdtemp(dir=folder))
    save_model(model, str(draft / WEIGHTS))
    try:
        draft.rename(folder / key)
    except OSError:  # another run has just stored the same
        shutil.rmtree(draft)
