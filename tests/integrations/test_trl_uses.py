"""The door and the trainer in other uses: SFT, DPO, KTO, RLOO, autocast, resume, subclasses, head work, two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import fastgrpo.integrations.trl as door
from tests.integrations import tiny
from tests.integrations.test_trl_trainer import assert_same, compare, history, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save_model(kind, folder) for kind in ("qwen2", "llama")}


# TRL's other trainers ------------------------------------------------------------------------------------------------

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 3,
    "per_device_train_batch_size": 4,
}


def other_trainer(name: str, model: str, folder: Path):
    """A run of one of TRL's other trainers on the tiny model."""
    import trl

    words = [" ".join(tiny.WORDS[k : k + 3]) for k in range(24)]
    prompt = {"prompt": words, "completion": [f" {w}" for w in reversed(words)]}
    data = {
        "SFT": {"text": words},
        "RLOO": {"prompt": words},
        "DPO": {**prompt, "chosen": prompt["completion"], "rejected": [f" {w}" for w in words]},
        "KTO": {**prompt, "label": [k % 2 == 0 for k in range(24)]},
    }[name]
    if name == "DPO":
        del data["completion"]
    extra = {"num_generations": 4, "max_completion_length": 6} if name == "RLOO" else {}
    config = getattr(trl, f"{name}Config")(output_dir=str(folder), **COMMON, **extra)
    rewards = {"reward_funcs": [tiny.reward]} if name == "RLOO" else {}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny.tokenizer(),
        **rewards,
    )


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "RLOO"])
def test_other_trainers_run_unchanged_with_the_door_open(name, models, tmp_path):
    wanted = history(other_trainer(name, models["llama"], tmp_path / "theirs"))
    before = door.report()
    with door.use_fastgrpo():
        assert_same(history(other_trainer(name, models["llama"], tmp_path / "ours")), wanted)
    served = {side: count - before[side] for side, count in door.report().items()}
    assert served["fastgrpo"] >= 3
    assert served["trl"] == 0


# Further ways to run GRPO --------------------------------------------------------------------------------------------


def test_bfloat16_autocast_stays_within_its_rounding(models, tmp_path):
    """Under autocast both sides round logits to bfloat16; TRL re-rounds in other places, so not to 1e-6."""
    options = {"bf16": True, "loss_type": "grpo", "beta": 0.05}
    theirs = history(make_trainer(GRPOTrainer, models, tmp_path / "theirs", options))
    ours = history(make_trainer(door.FastGRPOTrainer, models, tmp_path / "ours", options))
    for name, tolerance in (("loss", 2e-3), ("grad_norm", 0.05), ("entropy", 0.02)):
        a, b = ours[0][name], theirs[0][name]
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), name


def test_resume_from_a_checkpoint(models, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = history(make_trainer(door.FastGRPOTrainer, models, tmp_path / "run", options))
    again = make_trainer(door.FastGRPOTrainer, models, tmp_path / "run", options)
    resumed = history(again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for a, b in zip(resumed[2:4], straight[2:4], strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), name


def test_a_trainer_with_a_loss_of_its_own_keeps_it(models, tmp_path):
    """trl#6808: a subclass's objective must never be silently replaced by GRPO's."""

    class Mine(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 2.0

    class Mixed(door.FastGRPOTrainer, Mine):
        pass

    wanted = history(make_trainer(Mine, models, tmp_path / "theirs", {}))
    trainer = make_trainer(Mixed, models, tmp_path / "ours", {})
    assert "loss of its own" in trainer.delegates
    assert_same(history(trainer), wanted)


def test_an_unknown_loss_source_is_left_to_trl(models, tmp_path, monkeypatch):
    from fastgrpo.integrations import trl_trainer

    monkeypatch.setattr(trl_trainer, "KNOWN", {"0.0": "0"})
    ours, _ = compare(models, tmp_path, {}, door.FastGRPOTrainer)
    assert "is not the known one" in ours.delegates


def test_evaluation_is_trls(models, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    runs = [
        history(
            make_trainer(c, models, tmp_path / c.__name__, options, eval_dataset=tiny.prompts(8))
        )
        for c in (GRPOTrainer, door.FastGRPOTrainer)
    ]
    evaluated = [[log for log in run if "eval_loss" in log] for run in runs]
    assert len(evaluated[0]) >= 1
    for a, b in zip(*evaluated, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-6)
        assert a["eval_entropy"] == pytest.approx(b["eval_entropy"], abs=1e-6)


def mostly_tied(prompts: list[str], **_: object) -> list[float]:
    """Three of five groups get one reward: no advantage, nothing to learn from."""
    order = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    return [1.0 if order[prompt] < 3 else float(k % 4) for k, prompt in enumerate(prompts)]


class Products(TorchDispatchMode):
    """Multiplications of matrix products, in-place and `out=` forms included (FlopCounterMode leaves those out)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def products_of_a_step(trainer_class, model: str, folder: Path) -> tuple[int, list[dict]]:
    """Multiplications of one training step, forward and backward, and what was logged."""
    counter = Products()

    class Counting(trainer_class):
        def compute_loss(self, *args, **kwargs):  # generation comes before it
            counter.__enter__()
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            counter.__exit__(None, None, None)
            return loss

    sizes = {"per_device_train_batch_size": 20, "max_steps": 1}
    config = GRPOConfig(
        output_dir=str(folder), num_generations=4, max_completion_length=6, **COMMON | sizes
    )
    trainer = Counting(
        model=model,
        reward_funcs=[mostly_tied],
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    logs = history(trainer)
    return counter.count, logs


def test_dead_rows_cost_no_products(tmp_path):
    """60 % of the groups have no advantage: the head's work falls from 4 products over all rows to 1 + 2 x 40 %."""
    wide = tiny.save_model("llama", tmp_path, vocab_size=4096, num_hidden_layers=1)
    theirs, their_logs = products_of_a_step(GRPOTrainer, wide, tmp_path / "theirs")
    ours, our_logs = products_of_a_step(door.FastGRPOTrainer, wide, tmp_path / "ours")
    assert_same(our_logs[:1], their_logs[:1])
    assert their_logs[0]["frac_reward_zero_std"] == pytest.approx(0.6)
    assert ours < 0.4 * theirs, f"{ours / theirs:.2f} of TRL's products"


RANKS = """
import json, sys
from pathlib import Path
from tests.integrations import tiny
from tests.integrations.test_trl_trainer import make_trainer, history
import fastgrpo.integrations.trl as door


def rollout(prompts, trainer):
    seen, ids, completions = {}, [], []
    for prompt in prompts:
        turn = seen[prompt] = seen.get(prompt, -1) + 1
        ids.append(trainer.processing_class(prompt)["input_ids"])
        first = sum(ids[-1]) + 5 * turn
        completions.append([3 + (first + 7 * k) % 33 for k in range(2 + (first % 4))] + [1])
    logprobs = [[[0.0] for _ in c] for c in completions]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}


model, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
trainer = make_trainer(door.FastGRPOTrainer, {"qwen2": model}, folder, options, rollout_func=rollout)
logs = history(trainer)
assert trainer.delegates is None
if trainer.accelerator.is_main_process:
    names = ("loss", "grad_norm", "entropy", "reward", "kl")
    print("LOGS" + json.dumps([[log[n] for n in names] for log in logs if "loss" in log]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_ranks_equal_one(loss_type, models, tmp_path):
    """Two processes under DDP (gloo) with 4 completions each against one process with 8, completions given."""
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    found = []
    for ranks in (1, 2):
        sizes = {"per_device_train_batch_size": 8 // ranks, "beta": 0.05, "loss_type": loss_type}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
        command += [str(script), models["qwen2"], str(tmp_path / str(ranks)), json.dumps(sizes)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment, cwd=root
        )
        assert run.returncode == 0, run.stderr[-3000:]
        line = next(line for line in run.stdout.splitlines() if line.startswith("LOGS"))
        found.append(torch.tensor(json.loads(line[4:])))
    assert found[0].shape == (3, 5)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
