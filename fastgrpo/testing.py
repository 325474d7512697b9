"""Shapes, inputs and comparisons shared by tests, benchmarks and users who want to check their own set-up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective
from fastgrpo.reference import SURROGATES
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.surrogates import is_inlined


@dataclass(frozen=True)
class Shape:
    """A language-model head: hidden size and vocabulary, named after the model that has it."""

    name: str
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        """Return the name, which test ids show."""
        return self.name


SHAPES = (
    Shape("one", 4, 1),  # a single token: probability exactly 1
    Shape("tiny", 8, 31),  # smaller than every block, odd
    Shape("story", 96, 71),  # the bundled default job
    Shape("odd", 16, 1001),  # rows are not 16-byte aligned
    Shape("gpt2", 768, 50_257),  # odd and real
    Shape("llama-2-7b", 4096, 32_000),
    Shape("llama-3-8b", 4096, 128_256),
    Shape("qwen2.5-0.5b", 896, 151_936),
    Shape("qwen2.5-7b", 3584, 152_064),
    Shape("gemma-2-2b", 2304, 256_000),  # softcap
)


@dataclass(frozen=True)
class Inputs:
    """A batch of completions as it comes out of a rollout."""

    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantage: Tensor  # [B]
    old_logprob: Tensor  # [B, T]
    ref_logprob: Tensor  # [B, T]

    def loss_arguments(self) -> dict[str, Tensor]:
        """The keyword arguments of a loss besides the logits and the tokens."""
        return {
            "advantage": self.advantage,
            "mask": self.mask,
            "old_logprob": self.old_logprob,
            "ref_logprob": self.ref_logprob,
        }


def make_inputs(
    batch: int,
    length: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    scale: float = 3.0,
    noise: float = 0.2,
    seed: int = 0,
) -> Inputs:
    """Random completions of ragged length whose tokens are drawn from the policy itself.

    Log-probs of the old and the reference policy are the policy's own plus normal noise, as after a few updates.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, length, vocabulary, generator=g) * scale).to(dtype)
    wide = logits.to(accumulate_dtype(dtype))
    flat = wide.reshape(-1, vocabulary).softmax(-1)
    token_ids = torch.multinomial(flat, 1, generator=g).view(batch, length) if flat.numel() else flat.new_zeros(
        (batch, length), dtype=torch.int64
    )  # fmt: skip
    lengths = torch.randint(1, length + 1, (batch,), generator=g) if length else torch.zeros(batch)
    mask = torch.arange(length)[None, :] < lengths[:, None]
    logprob = wide.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old, ref = (logprob + noise * torch.randn(batch, length, generator=g) for _ in range(2))
    advantage = torch.randn(batch, generator=g).to(logprob.dtype)
    tensors = (logits, token_ids, mask, advantage, old, ref)
    return Inputs(*(tensor.to(device) for tensor in tensors))


def logprob_tolerance(logits: Tensor, temperature: float = 1.0) -> float:
    """Bound on the float32 error of a log-prob or log-sum-exp: a few roundings of the largest |x| = |logits| / T."""
    finite = logits[logits.isfinite()]
    largest = float(finite.abs().max()) / temperature if finite.numel() else 1.0
    return 4 * torch.finfo(torch.float32).eps * max(largest, 1.0)


def assert_matches_reference(
    actual: Tensor, expected: Tensor, *, atol: float, rtol: float | None = None
) -> None:
    """Compare with a float64 reference: rtol defaults to one rounding of the actual dtype, NaN and inf must agree."""
    rtol = torch.finfo(actual.dtype).eps if rtol is None else rtol
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, want {tuple(expected.shape)}"
    )
    special = ~expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same[special].all()), "NaN or infinity in one of the two only"
    assert bool(actual[~special].isfinite().all()), "not finite where the reference is"
    error = (actual - expected)[~special].abs()
    excess = error - (atol + rtol * expected[~special].abs())
    worst = float(error.max()) if error.numel() else 0.0
    assert not bool((excess > 0).any()), (
        f"error {worst:.3g} exceeds atol {atol:.3g} + rtol {rtol:.3g}"
    )


def check_surrogate(name: str, *, params: tuple[float, ...] = (), seed: int = 0) -> None:
    """Raise unless the registered surrogate's derivative matches finite differences in float64.

    On a GPU (or in Triton's interpreter) the jit function is compared with the torch expression too.
    """
    if name not in SURROGATES:
        raise ValueError(
            f"surrogate {name!r} is not registered; call fastgrpo.register_surrogate first"
        )
    g = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(64, dtype=torch.float64, generator=g)
    advantage = torch.randn(64, dtype=torch.float64, generator=g)
    user = torch.zeros(8, dtype=torch.float64)
    user[: len(params)] = torch.tensor(params, dtype=torch.float64)
    step = 1e-6
    _, slope = SURROGATES[name](log_ratio, advantage, user)
    above, _ = SURROGATES[name](log_ratio + step, advantage, user)
    below, _ = SURROGATES[name](log_ratio - step, advantage, user)
    numeric = (above - below) / (2 * step)
    error = float((slope - numeric).abs().max())
    assert error <= 1e-6 * max(1.0, float(numeric.abs().max())), (
        f"surrogate {name!r}: derivative differs from finite differences by {error:.3g}"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_inlined(name, torch.device(device)):
        _check_inlined(name, params, log_ratio.to(device), advantage.to(device), user.to(device))


def _check_inlined(
    name: str, params: tuple[float, ...], log_ratio: Tensor, advantage: Tensor, user: Tensor
) -> None:
    """Raise unless the jit function, inside the loss kernel, gives the values and slopes of the torch expression."""
    leaf = log_ratio[:, None].clone().requires_grad_()
    objective = Objective(surrogate=name, surrogate_params=params, d_clamp=None)
    mask, old = torch.ones_like(leaf, dtype=torch.bool), torch.zeros_like(leaf)
    loss = policy_loss(leaf, advantage, mask, old_logprob=old, objective=objective, normalizer=1.0)
    loss.loss.backward()
    value, slope = SURROGATES[name](log_ratio, advantage, user)
    assert leaf.grad is not None
    for got, want in ((loss.token_loss.detach(), value), (leaf.grad, slope)):
        error = float((got.flatten() - want).abs().max())
        assert error <= 1e-9 * max(1.0, float(want.abs().max())), (
            f"surrogate {name!r}: the jit function differs from the torch expression by {error:.3g}"
        )
