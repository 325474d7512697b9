"""What `fastgrpo.checks("strict")` says: which argument holds the fault, where, its value, and the rule."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def raise_on_fault(
    op: str,
    faulty: Tensor,  # [N] bool
    shape: Sequence[int],  # of the tokens, as the user has them; N in all
    vocabulary: int | None = None,  # None: not known here
    **arguments: object,
) -> None:
    """Raise if any token is faulty (one sync), naming what is wrong with the first.

    `arguments` are what the user passed, by name: tensors of one value per token or per sequence, of a row per token
    (`logits`, `hidden`), or shared by all tokens (`weight`, `bias`); anything else is passed over.

    Raises:
        ValueError: A token is faulty.
    """
    if not bool(faulty.any()):
        return
    index = tuple(int(i) for i in torch.unravel_index(faulty.nonzero()[0, 0], tuple(shape)))
    others = int(faulty.sum()) - 1
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    found = (_blame(name, tensors, index, tuple(shape), vocabulary) for name in tensors)
    text = next(
        filter(None, found), f"the result at {index} is not finite, though the arguments are"
    )
    more = f"; {others} more token{'s' * (others > 1)} at fault" if others else ""
    raise ValueError(f"{op}: {text}{more}")


def _blame(
    name: str,
    tensors: Mapping[str, Tensor],
    index: tuple[int, ...],
    shape: tuple[int, ...],
    vocabulary: int | None,
) -> str | None:
    """What is wrong with an argument at a token, if it is this one."""
    value, place = tensors[name], index
    if name in ("mask", "group_ids", "cu_seqlens"):  # those are checked in any case
        return None
    if name == "token_ids":
        token = int(value[index])
        if token >= 0 and (vocabulary is None or token < vocabulary):
            return None
        end = "V" if vocabulary is None else vocabulary
        return f"{_at(name, index)} must be in [0, {end}), got {token}"
    if name in ("weight", "bias") or value.dim() == 0:
        place = ()
    elif value.shape[: len(shape)] != shape:
        place = (_sequence(index, tensors.get("cu_seqlens")),)
    part = value[place]
    if name == "logits":
        # -inf is a token that cannot be sampled: a fault only where it was.
        token = int(tensors["token_ids"][index])
        if bool(part[token] == -torch.inf):
            return f"{_at(name, (*index, token))} must not be -inf: it is the sampled token's"
        part, rule = part.where(part != -torch.inf, 0), "must be finite or -inf"
    else:
        rule = "must be finite"
    bad = (~part.isfinite()).nonzero()
    if not len(bad):
        return None
    where = tuple(bad[0].tolist())
    return f"{_at(name, (*place, *where))} {rule}, got {float(part[where]):g}"


def _sequence(index: tuple[int, ...], cu_seqlens: Tensor | None) -> int:
    """Which sequence a token belongs to."""
    if cu_seqlens is None:
        return index[0]
    ends = cu_seqlens.to(torch.int64)
    return int(torch.searchsorted(ends, torch.tensor(index[0], device=ends.device), right=True)) - 1


def _at(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name
