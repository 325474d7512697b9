"""Who is measured, by kind of problem: `PROVIDERS[what]` is filled by the modules of this folder."""

from fastgrpo.bench.providers import advantage, gpu_peers, linear, logits
from fastgrpo.bench.providers.base import (
    PROVIDERS,
    Contestant,
    NotApplicable,
    Provider,
    Unavailable,
)

__all__ = [
    "PROVIDERS",
    "Contestant",
    "NotApplicable",
    "Provider",
    "Unavailable",
    "advantage",
    "gpu_peers",
    "linear",
    "logits",
]
