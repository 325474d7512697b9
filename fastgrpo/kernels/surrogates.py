"""Registered surrogates: a user's jit function, inlined into the kernels like the built-in policy terms."""

from collections.abc import Callable

SURROGATES: dict[str, Callable[..., object]] = {}


def register(name: str, jit: Callable[..., object]) -> None:
    """Register `(log_ratio, advantage, params) -> (value, dvalue)`; `params` points to eight numbers."""
    SURROGATES[name] = jit


def lookup(name: str) -> Callable[..., object] | None:
    """Return the jit function of a surrogate, None for the empty name of the built-in ones."""
    if name and name not in SURROGATES:
        raise ValueError(
            f"surrogate {name!r} has no Triton function; pass one to register_surrogate"
        )
    return SURROGATES[name] if name else None
