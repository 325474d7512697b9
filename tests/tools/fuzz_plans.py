"""What a fuzz case is made of, and the tensors that a plan stands for."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.common import INF, LINEAR_PATHS, NAN, OBJECTIVES, PATHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "offset", "row stride", "transposed", "sliced")
LOGITS = (
    "normal",
    "peaked",
    "huge",
    "-inf columns",
    "-inf anywhere",
    "NaN",
    "+inf",
    "all -inf",
    "equal",
)
FINITE = (
    "normal",
    "peaked",
    "huge",
    "equal",
)  # what a product of finite tensors can be in one row alone
IDS = ("drawn", "drawn", "drawn", "out of range")
MASKS = ("all", "ragged", "random", "none", "one row")
ADVANTAGES = ("normal", "per token", "zero", "large", "equal")
RATIOS = (
    0.0,
    1e-3,
    0.2,
    3.0,
    60.0,
    INF,
)  # noise of the other policies' log-probs; the last one puts in infinities


@dataclass(frozen=True)
class Plan:
    """Everything that a case is made of; small values first, so that Hypothesis shrinks towards the plain case."""

    seed: int
    path: str
    batch: int
    length: int
    vocabulary: int
    layout: str
    logits: str
    ids: str
    mask: str
    advantage: str
    ratio: float
    objective: str
    old: bool
    temperature: float | str
    scale: float
    softcap: float | None
    packed: bool
    weights: bool
    normalizer: float | None
    overwrite: bool


PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**20),
    path=st.sampled_from((*PATHS, *LINEAR_PATHS)),
    batch=st.integers(1, 4),
    length=st.integers(0, 5),
    vocabulary=st.sampled_from((5, 1, 2, 3, 8, 16, 31, 33, 64, 100, 257, 1025)),
    layout=st.sampled_from(LAYOUTS),
    logits=st.sampled_from(LOGITS),
    ids=st.sampled_from(IDS),
    mask=st.sampled_from(MASKS),
    advantage=st.sampled_from(ADVANTAGES),
    ratio=st.sampled_from(RATIOS),
    objective=st.sampled_from(tuple(OBJECTIVES)),
    old=st.booleans(),
    temperature=st.sampled_from((1.0, 0.3, 2.5, "per row")),
    scale=st.sampled_from((1.0, 0.1, 4.0)),
    softcap=st.sampled_from((None, None, 2.0, 30.0)),
    packed=st.booleans(),
    weights=st.booleans(),
    normalizer=st.sampled_from((None, 3.0)),
    overwrite=st.booleans(),
)


def possible(plan: Plan) -> Plan:
    """The plan, for a linear path without faults: in the weight's gradient one faulty row makes all columns NaN."""
    if plan.path not in LINEAR_PATHS:
        return plan
    kind = plan.logits if plan.logits in FINITE else "normal"
    return replace(plan, logits=kind, ids="drawn", layout="contiguous", overwrite=False)


def make_logits(plan: Plan, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """[B, T, V] with the plan's special values."""
    shape = (plan.batch, plan.length, plan.vocabulary)
    values = torch.randn(shape, generator=g) * {"peaked": 15.0, "huge": 3e4, "equal": 0.0}.get(
        plan.logits, 3.0
    )
    where = torch.rand(shape, generator=g) < 0.3
    row = torch.rand(shape[:2], generator=g) < 0.3
    if plan.logits == "-inf columns":
        values[..., : plan.vocabulary // 2] = -INF
    elif plan.logits == "-inf anywhere":
        values = values.masked_fill(where, -INF)
    elif plan.logits in ("NaN", "+inf"):
        bad = NAN if plan.logits == "NaN" else INF
        values = values.masked_fill(where & row[..., None], bad)
    elif plan.logits == "all -inf":
        values = values.masked_fill(row[..., None], -INF)
    if plan.path in LINEAR_PATHS:
        values = values.clamp(-6e4, 6e4)  # finite in float16 too
    return values.to(dtype)


def lay_out(plan: Plan, logits: Tensor) -> Tensor:
    """The same values with other strides."""
    if plan.layout == "offset":
        memory = torch.empty(logits.numel() + 3, dtype=logits.dtype)
        return memory[3:].copy_(logits.flatten()).view(logits.shape)
    if plan.layout == "row stride":
        return torch.cat([logits, logits[..., :3], logits], -1)[..., : plan.vocabulary]
    if plan.layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if plan.layout == "sliced":
        return torch.cat([logits, logits[:, :1]], 1)[:, : plan.length]
    return logits


def make_mask(plan: Plan, g: torch.Generator) -> Tensor:
    """[B, T] bool."""
    shape = (plan.batch, plan.length)
    if plan.mask == "ragged":
        lengths = torch.randint(0, plan.length + 1, (plan.batch, 1), generator=g)
        return torch.arange(plan.length) < lengths
    if plan.mask == "random":
        return torch.rand(shape, generator=g) < 0.6
    mask = torch.full(shape, plan.mask != "none")
    if plan.mask == "one row":
        mask[0] = False
    return mask


def make_case(plan: Plan, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional tensors (logits, token_ids, advantage, mask) and options of a loss."""
    g = torch.Generator().manual_seed(plan.seed)
    logits, mask = make_logits(plan, dtype, g), make_mask(plan, g)
    shape = mask.shape
    ids = torch.randint(plan.vocabulary, shape, generator=g)
    if plan.ids == "out of range":
        ids = torch.where(torch.rand(shape, generator=g) < 0.3, ids - plan.vocabulary, ids)
    advantage = torch.randn(shape[0], generator=g)
    if plan.advantage == "per token":
        advantage = torch.randn(shape, generator=g)
    elif plan.advantage != "normal":
        advantage = {"zero": 0.0, "large": 1e4, "equal": 1.0}[plan.advantage] * torch.ones_like(
            advantage
        )

    def near(offset: float) -> Tensor:
        """Log-probs of another policy: the policy's own up to noise, where it is finite."""
        own = torch.log_softmax(logits.double().nan_to_num(0.0, 50.0, -50.0), -1)
        own = own.gather(-1, ids.clamp(0, plan.vocabulary - 1)[..., None])[..., 0].float()
        noise = torch.randn(shape, generator=g)
        if plan.ratio == INF:
            return torch.where(noise > 1.0, -INF, own + noise)
        return own + offset * plan.ratio * noise

    options: dict[str, Any] = {
        "objective": OBJECTIVES[plan.objective], "ref_logprob": near(1.0), "rollout_logprob": near(0.5),
        "group_ids": torch.randint(0, 2, shape[:1], generator=g), "normalizer": plan.normalizer,
        "logit_scale": plan.scale, "logit_softcap": plan.softcap, "temperature": plan.temperature,
    }  # fmt: skip
    objective = OBJECTIVES[plan.objective]
    if (
        plan.old
        or objective.correction
        or any(gate.between == "old_rollout" for gate in objective.gates)
    ):
        options["old_logprob"] = near(1.0)
    if plan.weights:
        options["token_weight"] = torch.rand(shape, generator=g).round(decimals=1)
        options["kl_weight"] = torch.rand(shape, generator=g)
    if plan.temperature == "per row":
        options["temperature"] = 0.3 + 2 * torch.rand(shape, generator=g)
    logits = lay_out(plan, logits)
    if plan.packed:
        flat = {
            k: v.flatten() for k, v in options.items() if isinstance(v, Tensor) and v.shape == shape
        }
        offsets = torch.arange(plan.batch + 1, dtype=torch.int32) * plan.length
        per_token = advantage.flatten() if advantage.dim() == 2 else advantage
        if per_token.shape[0] == mask.numel() != plan.batch or advantage.dim() == 1:
            return (logits.flatten(0, 1), ids.flatten(), per_token, mask.flatten()), {
                **options, **flat, "cu_seqlens": offsets,
            }  # fmt: skip
    return (logits, ids, advantage, mask), options


def poison(mask: Tensor, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Put NaN and an impossible id into every masked slot."""
    logits, ids, advantage, _ = tensors
    logits = logits.masked_fill(~mask[..., None], NAN) if not mask.all() else logits
    poisoned = {
        k: v.masked_fill(~mask, NAN) if isinstance(v, Tensor) and v.is_floating_point() and v.shape == mask.shape
        and k != "temperature" else v
        for k, v in options.items()
    }  # fmt: skip
    return (logits, ids.masked_fill(~mask, -7), advantage, mask), poisoned
