"""Training by several processes under torchrun: DDP (every rank has the model) or FSDP2 (every rank has a share of it).

A step's questions are the same on every rank; each rank samples, scores and trains on its span of them. Sums over
ranks run on the CPU by gloo, gradients by whatever the device has. torch.distributed averages gradients over ranks, so
the loss is divided by D / world_size, D being the normaliser of all ranks together.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastgrpo.trainer.parallel.heartbeat import LATEST, Heartbeat

TIMEOUT = timedelta(hours=2)
"""Of a collective. Ranks wait that long while one evaluates; a rank that is dead is found by its heartbeat instead."""


@dataclass(slots=True)
class Ranks:
    """This process among the others; the default is a process by itself."""

    rank: int = 0
    world_size: int = 1
    kind: str = "none"  # none, ddp or fsdp2
    heartbeat: Heartbeat | None = None
    group: Any = None  # of the collectives on the CPU; None: torch.distributed's default

    def apart(self) -> "Ranks":
        """The same ranks for another thread: what it exchanges never meets what this thread exchanges."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes, shows and evaluates."""
        return self.rank == 0

    def span(self, total: int, parts: int | None = None, part: int | None = None) -> range:
        """Which of `total` things are this rank's (or a `part`'s of `parts`): neighbours, shares as equal as can be."""
        parts = self.world_size if parts is None else parts
        part = self.rank if part is None else part
        return range(part * total // parts, (part + 1) * total // parts)

    def wrap(self, policy: nn.Module) -> nn.Module:
        """The module whose forward and backward keep the ranks together."""
        if self.kind == "ddp":
            return DistributedDataParallel(policy)
        if self.kind == "fsdp2":
            shard(policy)
        return policy

    def quiet(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a pass: DDP exchanges gradients in the last one only."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def maxima(self, values: Sequence[int]) -> list[int]:
        """The largest value over ranks, place by place."""
        return self._reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the CPU."""
        return self._reduce(values.detach().cpu().clone(), dist.ReduceOp.SUM)

    def mean(self, values: Tensor) -> float:  # [N]
        """Mean of the entries of all ranks."""
        mine = torch.tensor([values.double().sum().item(), len(values)], dtype=torch.float64)
        total, count = self.sum(mine).tolist()
        return total / count

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, how, group=self.group)
        return values

    def rows(self, mine: Tensor, counts: Sequence[int]) -> Tensor:  # [b, K] -> [B, K]
        """The rows of all ranks in order; rank r has `counts[r]` of them."""
        if self.world_size == 1:
            return mine
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([rows[:n] for rows, n in zip(everyone, counts, strict=True)])

    def share(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, as JSON, to every rank."""
        text = json.dumps(dict(mine)).encode()
        if self.world_size == 1:
            return [json.loads(text)]
        sizes = self._gather(torch.tensor([len(text)]))
        width = max(int(size) for size in sizes)
        texts = self._gather(torch.tensor(list(text.ljust(width)), dtype=torch.uint8))
        return [json.loads(bytes(t.tolist())) for t in texts]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.group)
        return everyone

    def wait(self) -> None:
        """Until every rank is here."""
        self.maxima([0])

    def broadcast(self, module: nn.Module) -> None:
        """Weights of rank 0 to every rank."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def stop(self) -> None:
        """Ends in order."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if self.world_size > 1:
            dist.destroy_process_group()


def start(kind: str, dead_after: float) -> Ranks:
    """Joins the other ranks if torchrun started this process (it sets WORLD_SIZE); else a process by itself."""
    if world_size() == 1:
        return Ranks()
    if os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens outside of this host
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    rank, count = env_rank(), world_size()
    store = meet(timedelta(seconds=LATEST * dead_after))
    # Before the ranks connect to one another: they would wait for one that dies on the way.
    heartbeat = Heartbeat(PrefixStore("heartbeat", store.clone()), rank, count, dead_after)
    dist.init_process_group(
        backend,
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
    )
    return Ranks(rank, count, kind, heartbeat)


def meet(patience: timedelta) -> Any:
    """The store that torchrun keeps, or without it rank 0. Who does not come is found by its missing heartbeat."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = "torchrun" if by_torchrun else "rank 0"
    try:
        store = TCPStore(
            host,
            port,
            is_master=env_rank() == 0 and not by_torchrun,
            timeout=patience,
            multi_tenant=True,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        why = str(error).splitlines()[0]
        raise RuntimeError(
            f"rank {env_rank()}: {keeper}, which keeps the rendezvous store at {host}:{port}, cannot be reached: {why}"
        ) from None
    store.set_timeout(TIMEOUT)
    return store


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def env_rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def shard(policy: nn.Module) -> None:
    """FSDP2: every block is gathered when it runs; embedding, norm and head once per pass, as the loss is inside.

    If the policy computes in bfloat16, it is gathered in bfloat16; gradients are added up in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # advantages stay float32
    if getattr(policy, "bf16", False):
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    model: Any = policy.get_submodule("model")
    for block in model.get_decoder().layers:
        fully_shard(block, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every rank has to ask); any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
