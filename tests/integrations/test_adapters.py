"""Adapters to hosts that are not installed here, called with what those hosts pass, against plain formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.choices import Correction, Reduce
from fastgrpo.integrations import areal, ms_swift, nemo_rl, prime_rl, slime
from tests import formulas as f
from tests.formulas import make_batch
from tests.integrations.fakes import fake_modules, function_with, method_class
from tests.test_losses import close


def log_softmax(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


# prime-rl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "arguments", "formula", "per_sequence"),
    [
        ("dppo_tv", {}, f.dppo_tv, "sum"),
        ("cispo", {"epsilon_high": 2.0}, lambda b: f.cispo(b, 0.0, 2.0), "sum"),
        ("grpo", {"epsilon": 0.1}, lambda b: f.ppo(b, 0.1, 0.1), "mean"),
        ("gspo", {"epsilon": 0.3, "epsilon_high": 0.3}, lambda b: f.gspo(b, 0.3, 0.3), "mean"),
    ],
)
def test_prime_rl_loss_of_one_sequence(preset, arguments, formula, per_sequence):
    batch = make_batch(6, 9, seed=2, noise=0.3)
    b = f.Batch(*(x[3:4] for x in vars(batch).values()))
    leaf = b.logprob[0].clone().requires_grad_()
    weights = torch.rand(9, dtype=torch.float64)
    inputs = SimpleNamespace(
        trainer_logprobs=leaf, inference_logprobs=b.old[0], advantages=b.advantage[0],
        loss_mask=b.mask[0], ref_logprobs=b.ref[0], loss_weights=weights,
    )  # fmt: skip
    result = prime_rl.loss(inputs, preset=preset, **arguments)
    result.loss.backward()
    plain = b.logprob.clone().requires_grad_()
    tokens = torch.where(b.mask, formula(b.with_logprob(plain)) * weights, 0.0)
    wanted = tokens.sum() / (int(b.mask.sum()) if per_sequence == "mean" else 1)
    wanted.backward()
    close(result.loss.detach(), wanted.detach(), "loss")
    close(leaf.grad, torch.where(b.mask, plain.grad, 0.0)[0], "gradient")
    assert all(value.dim() == 0 for value in result.metrics.values())


def test_prime_rl_refuses_what_is_no_preset():
    for name in ("nobody", "_dppo", "from_trl"):
        with pytest.raises(ValueError, match="preset must be one of"):
            prime_rl.loss(SimpleNamespace(), preset=name)


def test_prime_rl_head():
    """One temperature per token, and a gradient for the entropy, which prime-rl's own function refuses."""
    recorded = method_class("forward", "ctx hidden weight labels inv_temperature chunk_size")
    name = "prime_rl.trainer.models.layers.lm_head"
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    labels, inverse = torch.randint(37, (7,)), torch.rand(7) + 0.5
    with fake_modules({name: {"_SequenceChunkedLogProbEntropyFn": recorded}}):
        import prime_rl.trainer.models.layers.lm_head as host

        with prime_rl.HEAD.use():
            function = host._SequenceChunkedLogProbEntropyFn
            logprob, entropy = function.apply(hidden, weight, labels, inverse, 4)
        assert host._SequenceChunkedLogProbEntropyFn is recorded
    wanted = log_softmax(hidden @ weight.T * inverse[:, None], labels)
    for a, b in zip((logprob, entropy), wanted, strict=True):
        torch.testing.assert_close(a, b)
    total, plain = (x[0].sum() + 0.1 * x[1].sum() for x in ((logprob, entropy), wanted))
    for a, b in zip(
        torch.autograd.grad(total, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# slime ---------------------------------------------------------------------------------------------------------------


def slime_args(**options: object) -> SimpleNamespace:
    defaults = {
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": None,
        "use_kl_loss": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "use_tis": False,
        "tis_clip": 2.0,
        "tis_clip_low": 0.0,
        "entropy_coef": 0.0,
        "rollout_temperature": 1.0,
        "use_rollout_logprobs": False,
    }
    return SimpleNamespace(**{**defaults, **options})


def slime_batch():
    """Three packed samples of prompt and response, with a tool-call hole; log-probs per response token."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = [2, 3, 1], [4, 2, 5]
    totals = [p + r for p, r in zip(prompts, responses, strict=True)]
    logits = torch.randn(1, sum(totals), 13, generator=g, dtype=torch.float64)
    tokens = [torch.randint(13, (n,), generator=g) for n in totals]
    masks = [torch.ones(n) for n in responses]
    masks[0][1] = 0

    def per_token(size: float = 1.0) -> list[Tensor]:
        return [size * torch.randn(n, generator=g, dtype=torch.float64) for n in responses]

    rows = []
    end = 0
    for total, response in zip(totals, responses, strict=True):
        end += total
        rows.append(torch.arange(end - response - 1, end - 1))
    ids = torch.cat([t[-n:] for t, n in zip(tokens, responses, strict=True)])
    score = (
        logits[0, torch.cat(rows)].log_softmax(-1).gather(-1, ids[:, None])[:, 0].split(responses)
    )
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "advantages": per_token(),
        "log_probs": [s + n for s, n in zip(score, per_token(0.2), strict=True)],
        "ref_log_probs": [s + n for s, n in zip(score, per_token(0.2), strict=True)],
        "rollout_log_probs": [s + n for s, n in zip(score, per_token(0.2), strict=True)],
    }
    return batch, logits, torch.cat(rows), ids


def sum_of_sample_mean(batch):
    """slime's default reduction: the sum over samples of the mean over their live tokens."""
    lengths, masks = batch["response_lengths"], batch["loss_masks"]

    def reduce(x: Tensor) -> Tensor:
        return sum(
            (part * m).sum() / m.sum() for part, m in zip(x.split(lengths), masks, strict=True)
        )

    return reduce


SLIME = {
    "grpo": {},
    "dual-clip-and-temperature": {"eps_clip_c": 2.0, "rollout_temperature": 0.8},
    "gspo": {"advantage_estimator": "gspo"},
    "cispo": {"advantage_estimator": "cispo"},
    "kl": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"},
    "tis": {"use_tis": True, "tis_clip": 1.1},
    "entropy": {"entropy_coef": 0.05},
    "rollout-as-old": {"use_rollout_logprobs": True},
}


@pytest.mark.parametrize("name", SLIME)
def test_slime_policy_loss(name):
    args = slime_args(**SLIME[name])
    batch, logits, rows, ids = slime_batch()
    reduce = sum_of_sample_mean(batch)
    ours = logits.clone().requires_grad_()
    loss, log = slime.policy_loss_function(args, batch, ours, reduce)
    loss.backward()

    plain = logits.clone().requires_grad_()
    logprob, entropy = log_softmax(plain[0, rows] / args.rollout_temperature, ids)
    old = torch.cat(batch["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"])
    advantage = torch.cat(batch["advantages"])
    d = logprob - old
    if args.advantage_estimator == "gspo":
        parts = zip(d.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        d = torch.cat([((x * m).sum() / m.sum()).expand_as(x) for x, m in parts])
    ratio = d.exp()
    tokens = f.clipped(ratio, advantage, 0.2, 0.28)
    if args.eps_clip_c:
        tokens = torch.where(
            advantage < 0, torch.minimum(tokens, -args.eps_clip_c * advantage), tokens
        )
    if args.advantage_estimator == "cispo":
        tokens = -ratio.clamp(0.8, 1.28).detach() * advantage * logprob
    if args.use_tis:
        tokens = tokens * (old - torch.cat(batch["rollout_log_probs"])).exp().clamp(
            0, args.tis_clip
        )
    if args.use_kl_loss:
        delta = torch.cat(batch["ref_log_probs"]) - logprob
        tokens = tokens + args.kl_loss_coef * (delta.exp() - 1 - delta).clamp(-10, 10)
    wanted = reduce(tokens) - args.entropy_coef * reduce(entropy)
    wanted.backward()
    close(loss.detach(), wanted.detach(), "loss")
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-9, atol=1e-14)
    assert set(log) == {"loss", "entropy_loss", "pg_clipfrac", "ppo_kl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_opsm": True}, "use_opsm"),
        ({"use_unbiased_kl": True}, "use_unbiased_kl"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
        ({"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k9"}, "kl_loss_type"),
    ],
)
def test_slime_names_what_is_not_covered(options, message):
    with pytest.raises(ValueError, match=message):
        slime.objective_from_slime(slime_args(**options))


def test_slime_refuses_top_p_replay():
    batch, logits, _, _ = slime_batch()
    batch["rollout_top_p_token_ids"] = [[1]]
    with pytest.raises(ValueError, match="top-p replay"):
        slime.policy_loss_function(slime_args(), batch, logits, sum_of_sample_mean(batch))


# NeMo-RL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        Objective.dapo(),
        Objective.grpo(beta=0.1),
        Objective.gspo(),
        Objective.dapo().replace(correction=Correction(high=1.2)),
    ],
    ids=["dapo", "grpo-kl", "gspo", "tis"],
)
def test_nemo_rl_loss_function(objective):
    """Micro-batches divided by the global counts add up to the loss of the whole batch."""
    b = make_batch(6, 8, seed=3, noise=0.2)

    def first(
        x: Tensor,
    ) -> Tensor:  # NeMo-RL's tensors have a slot for the first token, which nothing predicts
        return torch.cat([torch.zeros(6, 1, dtype=x.dtype), x], 1)

    data = {
        "token_mask": first(b.mask.double()),
        "sample_mask": torch.tensor([1.0, 1, 0, 1, 1, 1]),
        "advantages": first(b.advantage),
        "prev_logprobs": first(b.old),
        "generation_logprobs": first(b.rollout),
        "reference_policy_logprobs": first(b.ref),
    }
    mask = b.mask & (data["sample_mask"][:, None] > 0)
    totals = {"global_valid_seqs": (mask.any(1)).sum(), "global_valid_toks": mask.sum()}
    function = nemo_rl.FastGRPOLossFn(objective)
    by_token = objective.reduce.per == "token"
    assert function.loss_type.value == ("token_level" if by_token else "sequence_level")
    assert function.input_type.value == "logprob"
    leaf = b.logprob.clone().requires_grad_()
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: x[rows] for name, x in data.items()}
        loss, metrics = function(leaf[rows], data=part, **totals)
        assert {"loss", "probs_ratio", "num_valid_samples"} <= metrics.keys()
        parts.append(loss)
    sum(parts).backward()
    plain = b.logprob.clone().requires_grad_()
    masked = f.Batch(plain, b.old, b.ref, b.rollout, b.advantage, mask)
    clip = f.ppo(masked, 0.2, 0.28 if by_token else 0.2)
    tokens = f.gspo(masked) if objective.level == "seq_mean" else clip
    if objective.correction is not None:
        tokens = tokens * (b.old - b.rollout).exp().clamp(0, 1.2)
    if objective.kl.beta:
        tokens = tokens + 0.1 * f.kl(masked, "k3", "path", torch.ones_like(tokens))
    per = "token" if by_token else "sequence"
    total = totals["global_valid_toks" if by_token else "global_valid_seqs"]
    wanted = f.reduce_tokens(tokens, mask, per, normalizer=float(total))
    wanted.backward()
    close(sum(parts).detach(), wanted.detach(), "loss")
    close(leaf.grad, torch.where(mask, plain.grad, 0.0), "gradient")


def test_nemo_rl_names_what_is_not_covered():
    with pytest.raises(ValueError, match="entropy_coef must be 0"):
        nemo_rl.FastGRPOLossFn(Objective(entropy_coef=0.1))
    with pytest.raises(ValueError, match="per='prompt' is not covered"):
        nemo_rl.FastGRPOLossFn(Objective(reduce=Reduce(per="prompt")))


# AReaL, ms-swift -----------------------------------------------------------------------------------------------------


def test_areal_scores():
    original = function_with("logits labels temperature tp_group chunk_size")
    logits, ids = torch.randn(3, 5, 17, requires_grad=True), torch.randint(17, (3, 5))
    with fake_modules({"areal.engine.fsdp_engine": {"gather_logprobs_entropy": original}}):
        import areal.engine.fsdp_engine as host

        with areal.SCORES.use():
            found = host.gather_logprobs_entropy(logits, ids, 0.7, None, 1024)
    for a, b in zip(found, log_softmax(logits / 0.7, ids), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sliced", [False, True], ids=["all-logits", "last-logits"])
def test_ms_swift_method(sliced):
    parameters = "self model model_inputs logits_to_keep input_ids compute_entropy"
    trainer_class = method_class("_get_logps_via_local_forward", parameters)
    logits, ids, keep = torch.randn(2, 9, 17), torch.randint(17, (2, 9)), 4

    def model(**inputs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=logits[:, -(keep + 1) :] if sliced else logits)

    with fake_modules({"swift.rlhf_trainers.grpo_trainer": {"GRPOTrainer": trainer_class}}):
        ms_swift.enable()
        ms_swift.enable()
        trainer = trainer_class()
        trainer.temperature = 0.9
        logps, entropy = trainer._get_logps_via_local_forward(model, {}, keep, ids, True)
        assert trainer._get_logps_via_local_forward(model, {}, keep, ids, False)[1] is None
        ms_swift.disable()
        assert trainer._get_logps_via_local_forward(model, {}, keep, ids, True) == "the host's own"
    wanted = log_softmax(logits[:, -(keep + 1) : -1] / 0.9, ids[:, -keep:])
    for a, b in zip((logps, entropy), wanted, strict=True):
        torch.testing.assert_close(a, b)
