"""What a provider is: a name, what must be known to read its figure, and a way to make its call for a problem."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

from torch import Tensor

from fastgrpo.bench.problems import Problem

Outputs = dict[str, Tensor]


class Unavailable(Exception):
    """Why a provider does not take part."""


class NotApplicable(Exception):
    """The case is none of the provider's: it gets no row."""


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Contestant:
    """The timed call, and what restores its inputs before each one."""

    run: Callable[[], Outputs]
    prepare: Callable[[], None] = field(default=nothing)


@dataclass(frozen=True)
class Provider:
    """A contestant by name; `has_entropy`: it gives the entropy too, `skips`: which rows it leaves out."""

    name: str
    make: Callable[[Problem], Contestant]
    is_ours: bool
    is_floor: bool
    has_entropy: bool
    skips: str
    note: str


PROVIDERS: dict[str, list[Provider]] = {"logprob": [], "loss": [], "linear": [], "advantage": []}


def provider(
    what: str,
    name: str,
    *,
    ours: bool = False,
    floor: bool = False,
    entropy: bool = False,
    skips: str = "",
    needs: str = "",
    note: str = "",
) -> Callable[[Callable[[Problem], Contestant]], Callable[[Problem], Contestant]]:
    """Register a provider of one kind of problem; `needs` is a module it cannot do without."""

    def register(make: Callable[[Problem], Contestant]) -> Callable[[Problem], Contestant]:
        def checked(problem: Problem) -> Contestant:
            if needs and find_spec(needs) is None:
                raise Unavailable(f"{needs} is not installed")
            return make(problem)

        PROVIDERS[what].append(Provider(name, checked, ours, floor, entropy, skips, note))
        return make

    return register
