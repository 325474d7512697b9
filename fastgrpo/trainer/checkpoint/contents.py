"""What a checkpoint of a run consists of, and how a run takes it up again.

model*.safetensors, config.json, tokenizer ...  the policy, as `from_pretrained` reads it; of LoRA its adapter alone
reference, critic, optimizer                    weights of the reference and of PPO's value model; AdamW's state
rank-R                                          random numbers and the sampled batch of process R, cursor included
trainer                                         place in the run, options, what has been reported so far
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.trainer.adapter import FILE as ADAPTER
from fastgrpo.trainer.adapter import NAME, adapter_tensors, is_adapted
from fastgrpo.trainer.checkpoint import rng, tree
from fastgrpo.trainer.checkpoint.files import File
from fastgrpo.trainer.checkpoint.store import BETWEEN_STEPS, Checkpoint, Position
from fastgrpo.trainer.checkpoint.weights import Keep, StoredTensors, Unusable, part_files
from fastgrpo.trainer.data.batch import TokenBatch
from fastgrpo.trainer.microbatch import MicroBatch, Portion
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.inputs import reward_file
from fastgrpo.trainer.rewards.replay import Replay
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.state import Scored, State
from fastgrpo.trainer.tally import Tally

FREE = {
    "output_dir", "overwrite", "threads", "cache_base", "max_steps", "eval_questions",
    "eval_samples", "eval_temperature", "eval_steps", "save_steps", "save_total_limit", "async_save", "resume",
    "check_resume", "max_bad_steps", "parallel", "sampling_streams", "dead_rank_seconds",
    "logging_steps", "report", "completions_to_show", "vllm_server_base_url", "vllm_server_timeout",
}  # fmt: skip
"""Options that a resumed run may change and still be the same run."""


def position(state: State) -> Position:
    """Where a state stands."""
    return state.step, BETWEEN_STEPS if state.scored is None else state.scored.update


def model_files(run: Run) -> list[tuple[str, bytes]]:
    """Config and tokenizer: with model.safetensors beside them a checkpoint is a folder for `from_pretrained`."""
    with tempfile.TemporaryDirectory() as name:
        run.policy.model.config.save_pretrained(name)
        run.tokenizer.save_pretrained(name)
        if is_adapted(run.policy.model):
            run.policy.model.peft_config[NAME].save_pretrained(name)
        return [(path.name, path.read_bytes()) for path in sorted(Path(name).iterdir())]


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    """Nothing is copied: training waits until the checkpoint is on the disk."""
    return tensor


def contents(
    state: State, progress: dict[str, Any], extra: list[tuple[str, bytes]], keep: Keep = as_it_is
) -> Iterator[File]:
    """The files of this rank, one after the other. Every rank has to run through all of them."""
    ranks = state.run.ranks
    if ranks.is_main:
        yield from ((name, [content]) for name, content in extra)
    for part, tensors in weights(state).items():
        one_file = part == ADAPTER  # peft reads no more
        yield from part_files(part, tree.distinct(tensors)[0], ranks, keep, one_file)
    moments: dict[str, Tensor] = {}
    form = tree.pack(state.optimizer.state_dict(), moments, "optimizer")
    yield from part_files("optimizer", moments, ranks, keep)
    if ranks.is_main:
        yield "optimizer.json", [tree.describe(form, {})]
    yield from _part(f"rank-{ranks.rank}", rank_state(state), keep)
    if ranks.is_main:
        yield from _part("trainer", trainer_state(state) | {"progress": progress}, keep)


def weights(state: State) -> dict[str, dict[str, Tensor]]:
    """Weights by part, under the names that they have in its files."""
    model = state.run.policy.model
    parts = {"model": dict(model.state_dict())}
    if is_adapted(model):
        parts = {ADAPTER: adapter_tensors(model)}
    for part, module in state.others().items():
        parts[part] = {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    return parts


def _part(name: str, value: Any, keep: Keep) -> Iterator[File]:
    tensors, text = tree.encode(value, name, keep)
    yield f"{name}.safetensors", tensors
    yield f"{name}.json", [text]


def all_finite(module: nn.Module) -> bool:
    """Whether no weight that this rank has is NaN or infinite."""
    local = [getattr(p, "_local_tensor", p) for p in module.parameters()]
    return all(bool(torch.isfinite(p).all()) for p in local)


def trainer_state(state: State) -> dict[str, Any]:
    """The place in the run."""
    with_grad = [n for n, p in state.named_parameters().items() if p.grad is not None]
    return {
        "step": state.step,
        "num_tokens": state.num_tokens,
        "bad_updates": state.bad_updates,
        "micro_batch_size": state.micro_batch_size,
        "num_streams": state.num_streams,
        "with_grad": with_grad,
        "replay": _values(state.replay),
        "learned": {
            name: None
            if reward.state is None
            else torch.frombuffer(bytearray(reward.state), dtype=torch.uint8)
            for name, reward in state.run.rewards.learning.items()
        },
        "config": asdict(state.run.config),
        "base_sha256": state.run.base_sha256,
        "data": fingerprint(state.run.config),
    }


def fingerprint(config: TrainConfig) -> str:
    """SHA-256 of the user's data files and reward files."""
    digest = hashlib.sha256()
    own = [reward_file(spec.strip()) for spec in (config.reward or "").split(",")]
    for path in (config.data, config.test_data, *filter(None, own)):
        digest.update(b"-" if path is None else hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def rank_state(state: State) -> dict[str, Any]:
    """Random numbers and the sampled batch of this process."""
    scored = state.scored
    return {
        "rng": rng.capture(),
        "streams": state.streams,
        "scored": None if scored is None else _scored_state(scored),
    }


def _values(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _scored_state(scored: Scored) -> dict[str, Any]:
    portions = [
        {
            "batches": [_values(b) | {"tokens": _values(b.tokens)} for b in portion.batches],
            "normalizer": portion.normalizer,
        }
        for portion in scored.portions
    ]
    rollout, tally = _values(scored.rollout), scored.tally.state()
    return _values(scored) | {"rollout": rollout, "portions": portions, "tally": tally}


def _scored_of(stored: dict[str, Any], device: torch.device) -> Scored:
    portions = [
        Portion([_batch_of(b, device) for b in p["batches"]], p["normalizer"].to(device))
        for p in stored["portions"]
    ]
    rollout, tally = Rollout(**stored["rollout"]), Tally.of(stored["tally"])
    return Scored(**stored | {"rollout": rollout, "portions": portions, "tally": tally})


def _batch_of(stored: dict[str, Any], device: torch.device) -> MicroBatch:
    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    moved = {name: there(value) for name, value in stored.items() if name != "tokens"}
    return MicroBatch(tokens=TokenBatch(**stored["tokens"]).to(device), **moved)


@torch.no_grad()
def restore(state: State, checkpoint: Checkpoint, note: Callable[[str], None]) -> dict[str, Any]:
    """Puts a fresh state where the checkpoint was saved; returns its `progress`.

    Raises:
        Unusable: Another model, options without which it cannot be continued, or another number of processes.
    """
    run = state.run
    stored = checkpoint.part("trainer")
    compare(stored, run.config, note)
    tensors = StoredTensors(checkpoint.path)
    if is_adapted(run.policy.model):
        if stored["base_sha256"] != run.base_sha256:
            raise Unusable("its adapter belongs to another model than --model-name-or-path")
        tensors.read_named(adapter_tensors(run.policy.model))
    else:
        tensors.read_module(run.policy.model)
    for name, module in state.others().items():
        if not tensors.has(f"{name}."):
            option = "beta = 0" if name == "reference" else "another objective than ppo"
            raise Unusable(f"it has no {name}: it was saved with {option}")
        tensors.read_module(module, f"{name}.")
    if tensors.has("critic.") and state.critic is None:
        raise Unusable("it has a critic: it was saved with objective ppo")
    restore_optimizer(state.optimizer, checkpoint, tensors)
    for name, parameter in state.named_parameters().items():
        if name in stored["with_grad"]:  # zero_grad makes zeros of them, and Adam moves on
            parameter.grad = torch.zeros_like(parameter)
    for name in ("step", "num_tokens", "bad_updates"):
        if type(stored[name]) is not int:
            raise Unusable(f"{name} is {stored[name]!r}")
        setattr(state, name, stored[name])
    if state.step != checkpoint.position[0]:
        raise Unusable(f"it stands at step {state.step}, its name says {checkpoint.position[0]}")
    state.replay = Replay(**stored["replay"])
    for name, reward in run.rewards.learning.items():
        learned = stored["learned"].get(name)
        reward.restore(None if learned is None else learned.numpy().tobytes())
    if run.config.per_device_train_batch_size == stored["config"]["per_device_train_batch_size"]:
        state.micro_batch_size = stored["micro_batch_size"]
    _restore_rank(state, checkpoint, stored["num_streams"])
    state.publish()
    progress: dict[str, Any] = stored["progress"]
    return progress


def _restore_rank(state: State, checkpoint: Checkpoint, num_streams: int) -> None:
    ranks, before = state.run.ranks, checkpoint.world_size
    if num_streams < ranks.world_size:
        raise Unusable(
            f"it has {num_streams} sampling streams, too few for {ranks.world_size} processes "
            "(start long runs with --sampling-streams)"
        )
    everyone = [checkpoint.part(f"rank-{r}") for r in range(before)]
    streams = {k: s for stored in everyone for k, s in stored["streams"].items()}
    state.num_streams = num_streams
    state.streams = {k: streams[k] for k in ranks.span(num_streams)}
    if checkpoint.position[1] != BETWEEN_STEPS:
        if ranks.world_size != before:
            raise Unusable(
                f"it was saved in the middle of a step by {before} processes, and there are {ranks.world_size}"
            )
        state.scored = _scored_of(everyone[ranks.rank]["scored"], state.run.device)
        if not state.scored.portions:
            raise Unusable("its sampled batch is empty")
    rng.restore(everyone[ranks.rank if ranks.rank < before else 0]["rng"])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, tensors: StoredTensors
) -> None:
    """Moments are laid out as their parameters are now."""
    stored = checkpoint.form("optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets: dict[str, Tensor] = {}
    for index, moments in stored["state"].items():
        for key, name in moments.items():
            moments[key] = targets[name] = tensors.new(name, like=parameters[index])
    tensors.read_into(targets)
    optimizer.load_state_dict(stored)


def compare(stored: dict[str, Any], config: TrainConfig, note: Callable[[str], None]) -> None:
    """Says which options differ from those of the checkpoint: then the run is another one from here on."""
    before = stored["config"]
    free = FREE - ({"max_steps"} if config.lr_scheduler_type != "constant" else set())
    for name, value in asdict(config).items():
        if name not in free and before.get(name, value) != value:
            if name in ("job", "model_name_or_path"):
                raise Unusable(f"{name} was {before[name]!r}, now {value!r}")
            note(f"note: {name} was {before[name]!r} when the checkpoint was saved, now {value!r}")
    if stored["data"] != fingerprint(config):
        note("note: the data or reward files are not those of the checkpoint")
