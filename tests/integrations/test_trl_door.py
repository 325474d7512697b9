"""The swap itself: contract, restoring, delegation, the head function against TRL's, ZeRO-3, TRL's other trainers."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import fastgrpo.integrations.trl as door
from tests.integrations import tiny
from tests.integrations.test_trl_trainer import (
    assert_same,
    compare,
    history,
    make_trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save_model(kind, folder) for kind in ("qwen2", "llama")}


@pytest.fixture(autouse=True)
def _trl_is_left_as_it_was():
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    yield
    door.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


# The symbol ----------------------------------------------------------------------------------------------------------


def test_enable_disable_and_nesting():
    assert not door.is_enabled()
    door.enable()
    door.enable()
    assert door.is_enabled()
    with door.use_fastgrpo():
        assert door.is_enabled()
    assert door.is_enabled(), "the block must restore what was there before it"
    door.disable()
    door.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match="inside"), door.use_fastgrpo():
        raise RuntimeError("inside")
    assert not door.is_enabled()


def test_unknown_signature_is_refused_with_the_version(monkeypatch):
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, inv_temperature):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(ImportError, match=r"takes .*'inv_temperature'.*trl .* is installed"):
        door.enable()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match="does not exist"):
        door.enable()


# The function --------------------------------------------------------------------------------------------------------


def head(
    rows: int = 13, hidden: int = 8, vocabulary: int = 37, dtype=torch.float32, bias: bool = True
):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
    ids = torch.randint(0, vocabulary, (rows,), generator=g)
    return make(rows, hidden), make(vocabulary, hidden), make(vocabulary) if bias else None, ids


def run_head(function, hidden, weight, bias, ids, scaling, outputs, upstream) -> tuple:
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    scores = function.apply(hidden, weight, bias, ids, *scaling, outputs)
    total = sum((s * u).sum() for s, u in zip(scores[:2], upstream, strict=True) if s is not None)
    return scores, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy")], ids=["plain", "entropy"]
)
@pytest.mark.parametrize(
    "scaling", [(1.0, 64, None, 1.0), (0.7, 8, 3.0, 1.5)], ids=["unscaled", "softcap"]
)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_head_function_equals_trl(dtype, autocast, scaling, outputs):
    """Values, gradients and their dtypes; half-precision tiles are rounded alike on a CPU."""
    hidden, weight, bias, ids = head(dtype=dtype, bias=dtype == torch.float32)
    upstream = torch.randn(2, 13)
    results = []
    for function in (ChunkedLogProbFunction, door.FastLogProbFunction):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results.append(
                run_head(function, hidden, weight, bias, ids, scaling, outputs, upstream)
            )
    (theirs, their_grads), (ours, our_grads) = results
    half = autocast is not None or dtype == torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    assert [x is None for x in ours] == [x is None for x in theirs]
    if half:  # rounded logits tie, and argmax of a tie is anybody's
        ours, theirs = ours[:4], theirs[:4]
    for a, b in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **tolerance)


def test_frozen_head_and_no_rows():
    hidden, weight, bias, ids = head()
    frozen = weight.detach()
    logprob, *_ = door.FastLogProbFunction.apply(hidden, frozen, None, ids, 1.0, 64)
    logprob.sum().backward()
    assert hidden.grad is not None
    assert frozen.grad is None
    empty, entropy, *_ = door.FastLogProbFunction.apply(
        hidden[:0], weight, bias, ids[:0], 1.0, 64, None, 1.0, ("log_probs", "entropy")
    )
    assert empty.shape == entropy.shape == (0,)
    empty.sum().backward()
    assert float(weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("changed", ["an output of tomorrow", "scale"])
def test_what_the_head_lacks_goes_to_trl(changed):
    hidden, weight, bias, ids = head()
    scale = 0.0 if changed == "scale" else 1.0
    outputs = ("log_probs",) if changed == "scale" else ("log_probs", changed)
    door.enable()
    before = door.report()
    ours = utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, 1.0, 64, None, scale, outputs
    )
    theirs = ChunkedLogProbFunction.apply(hidden, weight, bias, ids, 1.0, 64, None, scale, outputs)
    assert door.report() == {"fastgrpo": before["fastgrpo"], "trl": before["trl"] + 1}
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_a_weight_sharded_by_zero3_is_gathered_again_in_backward(monkeypatch):
    """DeepSpeed empties the weight after the forward; TRL's context fills it again, in our backward too."""
    hidden, weight, bias, ids = head()
    upstream = torch.randn(2, 13)
    scaling, outputs = (0.7, 64, 3.0, 1.5), ("log_probs", "entropy")
    _, wanted = run_head(
        ChunkedLogProbFunction, hidden, weight, bias, ids, scaling, outputs, upstream
    )
    full, gathered = weight.data.clone(), []
    sharded = torch.nn.Parameter(full.clone())
    sharded.ds_status = "NOT_AVAILABLE"

    @contextmanager
    def gather(*parameters):
        gathered.append(len(parameters))
        sharded.data = full.clone()
        yield
        sharded.data = torch.zeros_like(full)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    with gather(sharded):
        scores = door.FastLogProbFunction.apply(hidden, sharded, bias, ids, *scaling, outputs)
    total = sum((s * u).sum() for s, u in zip(scores[:2], upstream, strict=True))
    grads = torch.autograd.grad(total, (hidden, sharded, bias))
    assert len(gathered) == 2
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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


def test_rows_that_are_not_the_batchs_are_left_to_the_plain_head():
    """Prompt-learning PEFT lengthens the sequences: the request does not fit, and nothing is guessed."""
    from fastgrpo import Objective
    from fastgrpo.integrations.trl_loss import LossRequest

    mask = torch.tensor([[True, True, False], [True, False, False]])
    request = LossRequest(
        objective=Objective.grpo(), normalizer=1.0, mask=mask, scored=mask, width=4,
        advantage=torch.ones(2), old_logprob=None, ref_logprob=None, rollout_logprob=None, token_weight=None,
    )  # fmt: skip
    hidden, weight, _, ids = head(rows=11)
    scaling = {"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": None, "bias": None}
    assert request.serve(hidden, weight, ids, **scaling) is None
    assert not request.served
    with door.serving(request), door.use_fastgrpo():
        found = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, 64, None, 1.0, ("log_probs", "entropy")
        )
    assert not request.served
    assert found[0].shape == (11,)
    logprob, _ = request.serve(
        hidden[:3], weight, ids[:3], **scaling
    )  # the three scored rows, packed
    assert request.served
    torch.testing.assert_close(logprob, found[0][:3])
