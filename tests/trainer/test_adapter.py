"""LoRA, bfloat16 and gradient checkpointing: what is trained, what the reference and the sampler are, what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastgrpo.trainer.adapter import add_adapter, layers, plain_copy, write_merged
from fastgrpo.trainer.checkpoint.contents import contents, model_files, position, restore
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.commands.train import main
from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.settings import parse_train
from fastgrpo.trainer.policy import Policy, recompute_blocks
from fastgrpo.trainer.state import State
from tests.trainer.conftest import tiny_llama
from tests.trainer_faults.runs import SMALL, everything, make_run, train

pytest.importorskip("peft")
LORA = replace(SMALL, use_peft=True, lora_r=4, lora_target_modules="all-linear")
HALF = {"bf16": True, "gradient_checkpointing": True}
BATCH = make_batch([[1, 2, 3], [4, 5]], [[6, 7], [8]], 0)


def trained(config: TrainConfig) -> State:
    state = State(make_run(config))
    train(state)
    return state


def frozen(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])).logits


def test_only_the_adapter_is_trained_and_only_it_has_moments():
    before = frozen(make_run(LORA).policy)
    state = trained(LORA)
    after = frozen(state.run.policy)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        len(state.optimizer.state) == len(state.named_parameters()) == 2 * 7 * 2
    )  # A, B; layers; blocks
    fresh = State(make_run(LORA)).named_parameters()
    assert all(not torch.equal(p, fresh[name]) for name, p in state.named_parameters().items())


def test_samplers_draw_from_the_merged_weights():
    """W = W_0 + (alpha / r) B A: two ways to compute the same logits, to float32 rounding of both."""
    state = trained(LORA)
    policy, plain = state.run.policy.model, state.run.sampled
    assert not hasattr(plain, "peft_config")
    assert type(plain) is type(policy)
    expected = logits(policy)
    assert torch.allclose(logits(plain), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(logits(make_run(LORA).policy.model), expected, atol=0.1)
    name, layer = next(layers(policy))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = (layer.base_layer.weight.double() + 32 / 4 * b.double() @ a.double()).detach()
    found = plain.get_submodule(name).weight.double()
    assert torch.allclose(found, by_hand, rtol=0, atol=1e-5 * float(by_hand.abs().max()))


def test_the_reference_is_the_model_without_its_adapter_to_the_bit():
    state = trained(LORA)
    assert state.reference is not None
    assert state.others() == {}
    with torch.no_grad():
        found = state.reference(BATCH)
        plain = Policy(plain_copy(state.run.policy.model))(BATCH)
        assert torch.equal(found, plain)
        assert not torch.equal(found, state.run.policy(BATCH))
    assert len(state.named_parameters()) == 28  # all that had gradients still have
    start = State(make_run(LORA))
    assert start.reference is not None
    with torch.no_grad():
        assert torch.equal(start.reference(BATCH), start.run.policy(BATCH))  # KL 0 at first


@pytest.mark.parametrize(
    "changes",
    [{}, HALF, {"objective": "ppo", "beta": 0.05, **HALF}],
    ids=["float32", "bfloat16", "ppo"],
)
def test_resume_is_exact(changes, tmp_path):
    config = replace(LORA, max_steps=2, **changes)
    store = Store(tmp_path, limit=0)
    state = State(make_run(config))
    train(state, lambda: store.save(position(state), contents(state, {}, [])))
    expected = everything(state)
    assert len(store.names()) == 10
    for path in store.names()[::3]:
        other = State(make_run(config))
        restore(other, Checkpoint(path), pytest.fail)
        train(other)
        assert everything(other) == expected, path.name


def save_whole(state: State, folder: Path) -> Path:
    return Store(folder, 0).save(position(state), contents(state, {}, model_files(state.run)))


def test_a_checkpoint_holds_the_adapter_alone_and_peft_reads_it(tmp_path):
    from peft import PeftModel

    state = trained(LORA)
    path = save_whole(state, tmp_path)
    names = {file.name for file in path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(name.startswith(("model", "reference")) for name in names)
    stored = load_file(path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(
        p.numel() for p in state.named_parameters().values()
    )
    base = plain_copy(make_run(LORA).policy.model)
    adapted = PeftModel.from_pretrained(base, path)
    expected = logits(state.run.policy.model)
    assert torch.allclose(
        logits(adapted), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_an_adapter_of_another_model_is_refused(tmp_path):
    state = trained(replace(LORA, max_steps=1))
    path = save_whole(state, tmp_path)
    other = make_run(LORA)
    other.base_sha256 = "0" * 64
    with pytest.raises(Unusable, match="belongs to another model"):
        restore(State(other), Checkpoint(path), print)
    thin = State(make_run(replace(LORA, lora_r=2)))
    with pytest.raises(Unusable, match=r"lora_A.weight has shape \(4, 16\), expected \(2, 16\)"):
        restore(thin, Checkpoint(path), print)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("nothing", "must name linear layers: Target modules"),
        ("lm_head", "must leave out embedding and head"),
        ("q_proj,embed_tokens", "must leave out embedding and head"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(tokenizer, targets, words):
    model = tiny_llama(tokenizer)
    with pytest.raises(ValueError, match=words):
        add_adapter(model, replace(LORA, lora_target_modules=targets))


def test_options_that_do_not_go_together(capsys):
    with pytest.raises(ValueError, match="--ref-sync-steps must be 0 with --use-peft"):
        replace(LORA, ref_sync_steps=2)
    assert main(["copy", "--use-peft"]) == 2
    assert "--use-peft needs --model-name-or-path DIR" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--lora-r must be at least 1, got 0"):
        parse_train(["copy", "--lora-r", "0"])


class Saved:
    """Counts bytes that autograd keeps for backward."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.nbytes
        return tensor


def gradients(config: TrainConfig) -> tuple[dict[str, torch.Tensor], int]:
    policy = make_run(config).policy
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        result = policy(BATCH, advantage=torch.tensor([1.0, -0.5]), objective=objective())
    result.loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}, saved.bytes


def objective():
    from fastgrpo import Objective

    return Objective.grpo()


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, bf16=True), LORA], ids=["all", "bf16", "lora"]
)
def test_gradient_checkpointing_keeps_less_and_gives_the_same_bits(config):
    plain, kept = gradients(config)
    recomputed, less = gradients(replace(config, gradient_checkpointing=True))
    assert less < 0.5 * kept
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_blocks_recompute_in_training_passes_only():
    """A sampler that runs the same blocks keeps its cache; parts with dropout never think they train."""
    run = make_run(replace(SMALL, gradient_checkpointing=True))
    seen: list[tuple[bool, bool]] = []
    block = run.policy.model.model.layers[0]
    block.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, module.self_attn.training))
    )
    run.policy(BATCH)
    with torch.no_grad():
        run.policy(BATCH)
    assert seen == [(True, False), (False, False)]
    assert not any(module.training for module in run.policy.modules())


def test_a_model_that_cannot_recompute_is_named():
    class Plain(nn.Module):
        supports_gradient_checkpointing = False

    with pytest.raises(ValueError, match="--gradient-checkpointing is not possible with Plain"):
        recompute_blocks(Plain())


def test_bfloat16_computes_in_half_and_keeps_trained_weights_whole():
    """float32 weights and moments; the first gradient is that of float32 to bfloat16 rounding."""
    state = trained(replace(SMALL, bf16=True))
    assert {p.dtype for p in state.run.policy.parameters()} == {torch.float32}
    assert {m.dtype for s in state.optimizer.state.values() for m in s.values()} == {torch.float32}
    assert {p.dtype for p in state.run.sampled.parameters()} == {torch.bfloat16}
    exact, half = gradients(SMALL)[0], gradients(replace(SMALL, bf16=True))[0]
    assert any(not torch.equal(exact[name], half[name]) for name in exact)
    distance = sum(float((exact[n] - half[n]).square().sum()) for n in exact) ** 0.5
    size = sum(float(exact[n].square().sum()) for n in exact) ** 0.5
    assert (
        distance / size < 16 * torch.finfo(torch.bfloat16).eps
    )  # 2 blocks of a dozen roundings each


def test_under_bfloat16_the_adapted_model_is_kept_in_half_and_the_adapter_is_not():
    state = trained(replace(LORA, **HALF))
    assert {p.dtype for p in frozen(state.run.policy).values()} == {torch.bfloat16}
    assert {p.dtype for p in state.named_parameters().values()} == {torch.float32}


def test_from_a_folder_to_a_run_its_checkpoints_and_back(tmp_path, tokenizer, capsys):
    """The command line: train an adapter of a saved model, evaluate a checkpoint and the merged model, go on."""
    from fastgrpo.trainer.commands.eval import main as evaluate
    from fastgrpo.trainer.tasks.copy_digits import CopyDigits

    words = CopyDigits().tokenizer()
    base = tmp_path / "base"
    tiny_llama(words, hidden_size=16, intermediate_size=24).save_pretrained(base)
    words.save_pretrained(base)
    options = [
        "copy", f"--model-name-or-path={base}", "--use-peft", "--lora-r=4", "--bf16", "--gradient-checkpointing",
        "--max-steps=3", "--prompts-per-step=4", "--num-generations=4", "--save-steps=1", "--eval-steps=0",
        "--eval-questions=4", "--eval-samples=2", "--no-report", f"--output-dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(options) == 0
    path = tmp_path / "run" / "checkpoints" / "step-3"
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    scores = []
    for model in (path, tmp_path / "run"):
        capsys.readouterr()
        asked = [f"--model={model}", "--job=copy", "--questions=16", "--samples=2", "--json"]
        assert evaluate(asked) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"])
    assert scores[0].keys() == scores[1].keys()
    assert main([*options[:-1], f"--resume={tmp_path / 'run'}", "--max-steps=4"]) == 0
    assert (
        main(
            [
                "copy",
                f"--model-name-or-path={path}",
                "--use-peft",
                "--output-dir",
                str(tmp_path / "x"),
            ]
        )
        == 2
    )
    assert "--use-peft cannot adapt what has an adapter" in capsys.readouterr().err
    (base / "model.safetensors").write_bytes(
        (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    )
    assert main([*options[:-1], f"--resume={tmp_path / 'run'}", "--max-steps=5"]) == 2
    assert "belongs to another model" in capsys.readouterr().err


def test_merging_writes_into_what_it_is_given(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=24)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    add_adapter(model, LORA)
    plain = plain_copy(model)
    with torch.no_grad():
        next(layers(model))[1].lora_B["default"].weight.fill_(1.0)
    write_merged(model, plain)
    moved = [name for name, p in plain.named_parameters() if not torch.equal(p, weights[name])]
    assert moved == ["model.layers.0.self_attn.q_proj.weight"]
