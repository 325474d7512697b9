"""LoRA by peft: the model's own weights stay as they are, small matrices beside them are trained.

W = W_0 + s B A,  B [out, r], A [r, in],  s = lora_alpha / r

Only A and B have gradients, moments, and a place in checkpoints. The reference is the same model with s = 0, which
takes no memory. Samplers draw from a plain copy of the model that W is written into, so that they need not know.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.trainer.checkpoint.files import hash_file
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.parallel.distributed import full

NAME = "default"
FILE = "adapter_model"
"""peft's name for its file of weights, without the ending."""


def add_adapter(model: Any, config: TrainConfig) -> None:
    """Puts an adapter, which changes nothing yet (B = 0), beside linear layers of a transformers model.

    Raises:
        ValueError: peft is not installed, or `lora_target_modules` names what is not there or cannot be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("--use-peft needs peft: pip install 'fastgrpo[peft]'") from None
    wanted = config.lora_target_modules
    targets = wanted.split(",") if wanted is not None and wanted != "all-linear" else wanted
    options = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,  # the sampler has none
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(options, model, NAME)
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--lora-target-modules must name linear layers: {why}") from None
    for _, layer in layers(model):
        layer.lora_A.float()
        layer.lora_B.float()
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    if any(layer in ends for _, layer in layers(model)):
        raise ValueError(f"--lora-target-modules must leave out embedding and head, got {wanted!r}")
    options.base_model_name_or_path = str(Path(model.name_or_path).resolve())


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter."""
    return bool(getattr(model, "peft_config", None))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def plain_copy(model: Any) -> Any:
    """A copy of the model without its adapter."""
    plain = copy.deepcopy(model)
    for name, layer in list(layers(plain)):
        plain.set_submodule(name, layer.base_layer)
    del plain.peft_config
    return plain.requires_grad_(False)


@torch.no_grad()
def write_merged(model: nn.Module, plain: Any) -> None:
    """Writes W into a plain copy, sharded or not (then every rank has to call this)."""
    for name, layer in layers(model):
        a, b = full(layer.lora_A[NAME].weight).float(), full(layer.lora_B[NAME].weight).float()
        merged = full(layer.base_layer.weight).float() + layer.scaling[NAME] * (b @ a)
        plain.get_submodule(name).weight.copy_(merged)


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """A and B under the names that peft's files have."""
    from peft import get_peft_model_state_dict

    stored: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=NAME, save_embedding_layers=False
    )
    return {f"base_model.model.{name}": tensor for name, tensor in stored.items()}


def base_of(folder: Path) -> str | None:
    """The model that the adapter in a folder changes; None: the folder has no adapter."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    name: str = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    return name


def merge_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in a folder merged into its weights. Nothing is unpickled."""
    if not (folder / f"{FILE}.safetensors").is_file():
        raise ValueError(f"{folder} has an adapter_config.json, and no {FILE}.safetensors")
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"the adapter in {folder} needs peft: pip install 'fastgrpo[peft]'"
        ) from None
    merged = PeftModel.from_pretrained(model, folder, local_files_only=True).merge_and_unload()
    return merged.requires_grad_(True)


class WithoutAdapter:
    """A policy with s = 0."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The policy's forward. Parameters keep `requires_grad`: FSDP2 looks at it once only."""
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(self.policy.model, 0.0):
            return self.policy(*arguments, **options)


def identity(folder: Path) -> str:
    """SHA-256 over the weight files of a model: an adapter fits no other."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(hash_file(path, path.stat().st_size)[1].encode())
    return digest.hexdigest()
