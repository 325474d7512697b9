"""Named tensors, sharded over ranks or not, as files of whole tensors; and back into any number of ranks.

Tensors are dealt out to files and files to ranks, so that every rank writes as much. Of a sharded tensor all ranks send
their rows to the one that writes it: nobody ever has more than its part of the state and one tensor beside. So the
policy's files are those that `from_pretrained` reads, without a conversion. When a run goes on, torch.distributed's
checkpoint reader (DCP, safetensors storage) takes from them the rows that each rank needs, whatever their number now.

DCP's writer is not used: its own format has a pickled `.metadata`; its safetensors files hold pieces of tensors, which
nothing but DCP reads; and neither can be hashed while it is written or synced before it is named.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Shard

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.files import File
from fastgrpo.trainer.parallel.distributed import Ranks

Keep = Callable[[str, Tensor], Tensor]
"""What to write in a tensor's place: itself, or a copy that training does not change."""
FILE_BYTES = 512 << 20
"""Where a part of the state is divided into several files: they are written and hashed at once."""


class Unusable(ValueError):
    """A whole checkpoint that does not fit this run; the text says where."""


def deal(tensors: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """The names in each file: the largest first, each into the file that has least. The same on every rank."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    count = min(len(tensors), world_size * max(1, -(-total // (world_size * FILE_BYTES))))
    files: list[list[str]] = [[] for _ in range(max(1, count))]
    filled = [0] * len(files)
    order = {name: number for number, name in enumerate(tensors)}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, order[name])):
        index = filled.index(min(filled))
        files[index].append(name)
        filled[index] += max(1, tensors[name].nbytes)
    return [sorted(names, key=order.__getitem__) for names in files]


def file_name(part: str, index: int, count: int) -> str:
    """As transformers names them."""
    middle = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
    return f"{part}{middle}.safetensors"


def part_files(
    part: str, tensors: Mapping[str, Tensor], ranks: Ranks, keep: Keep, one_file: bool = False
) -> Iterator[File]:
    """This rank's files of a part, one after the other. Every rank has to run through all of them."""
    files = [list(tensors)] if one_file else deal(tensors, ranks.world_size)
    for index, names in enumerate(files):
        owner = index % ranks.world_size
        mine: dict[str, Tensor] = {}
        for name in names:
            whole = at_rank(tensors[name], owner, ranks.rank)
            if whole is not None:
                mine[name] = keep(name, whole)
        if owner == ranks.rank:
            yield file_name(part, index, len(files)), tree.Pieces(mine)
    if ranks.is_main and len(files) > 1:
        yield f"{part}.safetensors.index.json", [_index(part, tensors, files)]


def _index(part: str, tensors: Mapping[str, Tensor], files: list[list[str]]) -> bytes:
    """Which file has which tensor, for `from_pretrained`."""
    places = {
        name: file_name(part, index, len(files))
        for index, names in enumerate(files)
        for name in names
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(content, indent=1, sort_keys=True).encode()


def at_rank(tensor: Tensor, owner: int, rank: int) -> Tensor | None:
    """The whole of a tensor at one rank, None at the others; every rank has to ask for a sharded one."""
    if not isinstance(tensor, DTensor):
        return tensor if rank == owner else None
    if tensor.placements != (Shard(0),) or tensor.device_mesh.size() != dist.get_world_size():
        raise tree.StateError(f"cannot be stored: a tensor laid out as {tensor.placements}")
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # of each rank but the last ones
    local = tensor.to_local().detach()
    mine = local.new_empty(rows, *local.shape[1:])
    mine[: len(local)] = local
    if rank != owner:
        dist.gather(mine, dst=owner)
        return None
    everyone = [torch.empty_like(mine) for _ in range(tensor.device_mesh.size())]
    dist.gather(mine, everyone, dst=owner)
    return torch.cat(everyone)[: tensor.shape[0]]


class StoredTensors:
    """The tensors in all files of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        self.about: dict[str, TensorStorageMetadata] = {
            name: about
            for name, about in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }

    def has(self, prefix: str) -> bool:
        """Whether there are any whose names begin so."""
        return any(name.startswith(prefix) for name in self.about)

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fills tensors, of sharded ones the rows that this rank has."""
        with (
            warnings.catch_warnings()
        ):  # that no ranks take part: they need not, each reads for itself
            warnings.simplefilter("ignore", UserWarning)
            load(dict(targets), storage_reader=self._reader, no_dist=True)

    def read_module(self, module: nn.Module, prefix: str = "") -> None:
        """Fills the weights of a module; of tied ones the checkpoint may have any.

        Raises:
            Unusable: One is missing, or has another shape.
        """
        own: dict[str, Tensor] = module.state_dict()
        distinct, aliases = tree.distinct(own)
        targets: dict[str, Tensor] = {}
        for name, tensor in distinct.items():
            names = [name, *(alias for alias, of in aliases.items() if of == name)]
            stored = next((n for n in names if prefix + n in self.about), None)
            if stored is None:
                raise Unusable(f"{prefix}{name} is missing")
            targets[prefix + stored] = tensor
        self.read_named(targets)

    def read_named(self, targets: Mapping[str, Tensor]) -> None:
        """`read_into` that refuses what does not fit."""
        for name, tensor in targets.items():
            if name not in self.about:
                raise Unusable(f"{name} is missing")
            found, expected = tuple(self.about[name].size), tuple(tensor.shape)
            if found != expected:
                raise Unusable(f"{name} has shape {found}, expected {expected}")
            kind = self.about[name].properties.dtype
            if kind != tensor.dtype:
                raise Unusable(f"{name} is {kind}, expected {tensor.dtype}")
        self.read_into(targets)

    def new(self, name: str, like: Tensor) -> Tensor:
        """A stored tensor, laid out over ranks as `like` is if their shapes agree."""
        about = self.about.get(name)
        if about is None:
            raise Unusable(f"{name} is missing")
        dtype = about.properties.dtype
        if about.size == like.shape:
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(about.size, dtype=dtype)
