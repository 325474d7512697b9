"""The language-model head of a model, read without the rest of it: weight, bias, scale and softcap."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class ModelHead:
    """What turns a hidden state into logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    tied: bool
    source: str


def load_head(path: str, dtype: torch.dtype | None) -> ModelHead:
    """Read the head of a checkpoint folder; of a configuration alone (a folder or a config.json) make a random one.

    Raises ValueError if nothing is there, or if the checkpoint does not hold the head's tensors.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"--model must be a folder or a config.json on this machine, got {path!r}")
    if not (place / "config.json").exists() and (place / "model").is_dir():
        place /= "model"  # of a run
    config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings to verify")
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    scaling: dict[str, Any] = {
        "logit_scale": _scale(text),
        "logit_softcap": getattr(text, "final_logit_softcapping", None),
    }
    files = _shards(place)
    if not files:
        wide = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        weight = wide.mul_(getattr(text, "initializer_range", 0.02)).to(dtype or torch.float32)
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype) if layer.bias is not None else None
        return ModelHead(weight, bias, **scaling, tied=tied, source="random (no weights found)")
    weight = _read(
        files,
        _names(model, layer.weight)
        + (_names(model, model.get_input_embeddings().weight) if tied else []),
    )
    bias = _read(files, _names(model, layer.bias)) if layer.bias is not None else None
    return ModelHead(
        weight.to(dtype or weight.dtype), bias, **scaling, tied=tied, source="checkpoint"
    )


def _scale(text: Any) -> float:
    """Factor on the logits: Cohere's, Falcon-H1's, or Granite's divisor."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)


def _names(model: nn.Module, parameter: Tensor) -> list[str]:
    """Every name of a parameter in the model's state."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]


def _shards(place: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file."""
    folder = place if place.is_dir() else place.parent
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in table.values() if Path(file).name != file]
        if outside:
            raise ValueError(f"{index.name} must name files of its own folder, got {outside[0]!r}")
        return {name: folder / file for name, file in table.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _read(files: dict[str, Path], names: list[str]) -> Tensor:
    """Read the first tensor of these names; a checkpoint may leave a wrapper's prefix out."""
    for name in names:
        for key in (name, name.removeprefix("model.")):
            if key in files:
                with safe_open(files[key], "pt") as tensors:
                    return tensors.get_tensor(key)
    raise ValueError(
        f"the checkpoint holds none of {', '.join(names)}; it has {', '.join(sorted(files)[:6])}, ..."
    )
