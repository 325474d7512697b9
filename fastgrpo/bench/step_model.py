"""A model of one GRPO step on 1 to 1,024 GPUs: bytes, FLOPs and collectives, with every assumption printed.

    fastgrpo plan --step [--model all] [--gpus 1,8,64,1024] [--machine h200] [--active 0.6] [--head fused]

It is arithmetic, not a measurement: use it to see what binds and what a change could save at most. Weak scaling: the
number of completions per GPU is fixed, so that the ideal time of a step does not depend on the number of GPUs.

Stages of a step with P parameters, of which V*H in the head, on n GPUs, for N tokens per GPU:

generate    prefill 2P FLOP per prompt token; then one decoding step per completion token, which reads the weights
            (split over as many GPUs as it takes to hold them) and the KV cache, or multiplies 2P per sequence
reference   2P FLOP per token, if the KL coefficient is not 0
train       backbone 6(P - VH) FLOP per token, 8 with recomputed activations, and causal attention, 6 L H T (8 L H T);
            an embedding that is not tied to the head is counted like a layer (up to 7 % too much)
head        fused: 2VH per scored token and 4VH per active one, one read and write of the logits (float32 tile);
            recompute: 8VH for every token, two passes; materialised: 6VH, and about 10 passes over float32 logits
optimizer   AdamW with float32 masters: 28 bytes per parameter of this GPU's shard
collectives FSDP: all-gather of 2P bytes in forward and in backward (the head once if its gradient is made in forward),
            reduce-scatter of 4P bytes (float32); shards span one node of 8 GPUs if the states fit there, then gradients
            of a shard are summed across nodes; what does not hide behind the backbone is counted
sync        new weights to the sampler: 2P bytes over the slowest link
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from fastgrpo.words import Parser

GIB = 2**30
NODE = 8  # GPUs that see each other over NVLink


@dataclass(frozen=True)
class Policy:
    """A decoder: parameters, hidden size, layers, vocabulary, and bytes of KV cache per token of all layers (bf16)."""

    name: str
    parameters: float
    hidden: int
    layers: int
    vocabulary: int
    kv_width: int  # key-value heads times their size

    @property
    def head(self) -> float:
        """Parameters of the LM head."""
        return float(self.vocabulary * self.hidden)

    @property
    def kv_bytes(self) -> float:
        """Of one token."""
        return 4.0 * self.layers * self.kv_width


@dataclass(frozen=True)
class Machine:
    """Rates that were measured on such a machine, or typical shares of what a link can do; per GPU."""

    name: str
    flops: float  # bf16 matrix products
    bandwidth: float  # memory, bytes/s
    memory: float  # bytes
    nvlink: float  # bytes/s in one direction
    network: float  # bytes/s in one direction


@dataclass(frozen=True)
class Work:
    """What a step does, per GPU."""

    completions: int = 64
    prompt_tokens: int = 256
    completion_tokens: int = 1024
    active: float = 0.6  # share of the scored tokens with a gradient
    beta: float = 0.04
    head: str = "fused"  # fused, recompute, materialised
    recompute: bool = True  # activations of the backbone
    micro_tokens: int = 16_384  # tokens per micro-batch
    mfu: float = 0.5  # share of `flops` that the backbone reaches
    decode_share: float = 0.6  # share of `bandwidth` that decoding reaches
    overlap: float = 0.8  # share of the backbone's time behind which collectives hide

    @property
    def scored(self) -> float:
        """Completion tokens."""
        return float(self.completions * self.completion_tokens)

    @property
    def tokens(self) -> float:
        """Prompt and completion tokens."""
        return float(self.completions * (self.prompt_tokens + self.completion_tokens))


POLICIES = (
    Policy("qwen2.5-1.5b", 1.54e9, 1536, 28, 151_936, 256),
    Policy("qwen2.5-7b", 7.62e9, 3584, 28, 152_064, 512),
    Policy("qwen2.5-32b", 32.8e9, 5120, 64, 152_064, 1024),
    Policy("llama-3-70b", 70.6e9, 8192, 80, 128_256, 1024),
)
MACHINES = (
    Machine("h200", 790e12, 4.3e12, 139 * GIB, 360e9, 40e9),
    Machine("h100", 790e12, 3.0e12, 78 * GIB, 360e9, 40e9),
)
HEADS = ("fused", "recompute", "materialised")
RANGES = {
    "completions": (1, math.inf),
    "prompt_tokens": (0, math.inf),
    "completion_tokens": (1, math.inf),
    "micro_tokens": (1, math.inf),
    "active": (0, 1),
    "beta": (0, math.inf),
    "mfu": (0.01, 1),
    "overlap": (0, 1),
}
"""What the options of the command may be."""


@dataclass(frozen=True)
class Estimate:
    """Seconds per stage of one step, and memory of one GPU while it trains."""

    policy: str
    gpus: int
    shard: int  # GPUs that share one copy of the training state
    seconds: dict[str, float]
    memory_gib: dict[str, float]
    fits: bool

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def total_gib(self) -> float:
        """Memory of one GPU."""
        return sum(self.memory_gib.values())


def generate(policy: Policy, machine: Machine, work: Work, gpus: int) -> float:
    """Prefill and decode. Each copy of the weights may take half the memory of the GPUs that it is split over."""
    split = 1
    while 2 * policy.parameters / split > 0.5 * machine.memory and split < min(gpus, NODE):
        split *= 2
    sequences = work.completions * split  # of one copy
    prefill = (
        2 * policy.parameters * work.prompt_tokens * sequences / split / (machine.flops * work.mfu)
    )
    context = work.prompt_tokens + work.completion_tokens / 2
    read = (2 * policy.parameters + sequences * context * policy.kv_bytes) / split
    step = max(
        read / (machine.bandwidth * work.decode_share),
        2 * policy.parameters * sequences / split / (machine.flops * work.mfu),
    )
    return prefill + work.completion_tokens * step


def head_seconds(policy: Policy, machine: Machine, work: Work) -> float:
    """Loss and gradients from the last hidden states; matrix products of this shape run near the peak (0.9)."""
    product = 2 * policy.head * work.scored / (0.9 * machine.flops)
    unit = (
        2 * policy.vocabulary * work.scored / machine.bandwidth
    )  # one read or write of bf16 logits
    if work.head == "fused":
        return (
            product * (1 + 2 * work.active) + 3 * unit * work.active + 2 * unit * (1 - work.active)
        )
    return 4 * product + 3 * unit if work.head == "recompute" else 3 * product + 20 * unit


def backbone_seconds(policy: Policy, machine: Machine, work: Work, passes: float) -> float:
    """`passes` times a forward: 2 FLOP per parameter and token, and causal attention."""
    length = work.prompt_tokens + work.completion_tokens
    per_token = 2 * (policy.parameters - policy.head) + 2 * policy.layers * policy.hidden * length
    return passes * per_token * work.tokens / (machine.flops * work.mfu)


def shard_size(policy: Policy, machine: Machine, gpus: int) -> int:
    """GPUs that share one training state: a node if it fits there in 60 % of the memory, else all."""
    within = min(gpus, NODE)
    return within if 16 * policy.parameters / within <= 0.6 * machine.memory else gpus


def collective_seconds(
    policy: Policy, machine: Machine, work: Work, gpus: int, shard: int
) -> float:
    """Ring collectives of one optimizer step, before overlap; weights are gathered per micro-batch."""
    link = machine.nvlink if shard <= NODE else machine.network
    micro_batches = math.ceil(work.tokens / work.micro_tokens)
    gathered = 2 * (2 * policy.parameters) - (2 * policy.head if work.head == "fused" else 0)
    moved = micro_batches * (gathered + 4 * policy.parameters) * (shard - 1) / shard
    replicas = gpus // shard
    across = 2 * 4 * policy.parameters / shard * (replicas - 1) / replicas
    return moved / link + across / machine.network


def memory(policy: Policy, work: Work, shard: int) -> dict[str, float]:
    """GiB of one GPU while it trains."""
    logits = {"fused": 2**31, "recompute": 4096 * 32_768 * 2 + 4 * policy.head}
    tokens = min(work.micro_tokens, work.tokens)
    layers = policy.layers * policy.hidden * 2 * tokens
    return {
        "state": 16 * policy.parameters / shard / GIB,
        "gathered layers": 2 * 2 * policy.parameters / policy.layers / GIB,
        "activations": (layers if work.recompute else 17 * layers) / GIB
        + 34 * policy.hidden * tokens / GIB,
        "head": (logits.get(work.head, 14 * policy.vocabulary * tokens) + 2 * policy.head) / GIB,
    }


def estimate(policy: Policy, machine: Machine, work: Work, gpus: int) -> Estimate:
    """One step of one policy on `gpus` GPUs."""
    shard = shard_size(policy, machine, gpus)
    train = backbone_seconds(policy, machine, work, 4 if work.recompute else 3)
    head = head_seconds(policy, machine, work)
    collectives = collective_seconds(policy, machine, work, gpus, shard)
    reference = backbone_seconds(policy, machine, work, 1) + 2 * policy.head * work.scored / (
        0.9 * machine.flops
    )
    slowest = (
        machine.bandwidth if gpus == 1 else machine.nvlink if gpus <= NODE else machine.network
    )
    used = memory(policy, work, shard)
    return Estimate(
        policy.name, gpus, shard,
        {
            "generate": generate(policy, machine, work, gpus),
            "reference": reference if work.beta else 0.0,
            "train": train,
            "head": head,
            "optimizer": 28 * policy.parameters / shard / machine.bandwidth,
            "collectives": max(0.0, collectives - work.overlap * (train + head)) if gpus > 1 else 0.0,
            "sync": 2 * policy.parameters / slowest,
        },
        used, sum(used.values()) * GIB <= machine.memory,
    )  # fmt: skip


def lines(estimates: list[Estimate], machine: Machine, work: Work) -> Iterator[str]:
    """The table and its assumptions."""
    stages = list(estimates[0].seconds)
    yield (
        f"{'policy':14}{'GPUs':>6}{'shard':>7}"
        + "".join(f"{s:>12}" for s in stages)
        + (f"{'step s':>9}{'tok/s/GPU':>11}{'GiB/GPU':>9}")
    )
    for e in estimates:
        row = f"{e.policy:14}{e.gpus:>6}{e.shard:>7}"
        if not e.fits:
            yield (
                row
                + f"  does not fit: {e.total_gib:.0f} GiB per GPU, {machine.memory / GIB:.0f} there"
            )
            continue
        row += "".join(f"{seconds:>12.2f}" for seconds in e.seconds.values())
        yield row + f"{e.total:>9.1f}{work.scored / e.total:>11.0f}{e.total_gib:>9.0f}"
    yield ""
    yield "Arithmetic, not a measurement. Assumptions (per GPU):"
    m = asdict(machine) | {"memory": f"{machine.memory / GIB:.0f} GiB"}
    yield "  " + ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in m.items()
    )
    yield "  " + ", ".join(f"{name} {value}" for name, value in asdict(work).items())
    yield "  what each stage counts: fastgrpo plan --step --help"


def main(argv: list[str]) -> int:
    """Print the model."""
    p = Parser(
        prog="fastgrpo plan --step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    p.add_argument("--model", default="all", choices=["all", *(x.name for x in POLICIES)])
    p.add_argument("--machine", default="h200", choices=[x.name for x in MACHINES])
    p.add_argument("--gpus", default="1,8,64,1024", help="comma-separated")
    p.add_argument("--head", default="fused", choices=HEADS)
    for name in RANGES:
        option, default = "--" + name.replace("_", "-"), getattr(Work, name)
        p.add_argument(option, type=type(default), default=default, help="(default %(default)s)")
    p.add_argument("--json", action="store_true", help="one JSON object per row")
    args = p.parse_args(argv)
    machine = next(x for x in MACHINES if x.name == args.machine)
    given = {name: value for name, value in vars(args).items() if name in Work.__dataclass_fields__}
    work = Work(**given)
    chosen = [x for x in POLICIES if args.model in ("all", x.name)]
    counts = [int(count) if count.isdecimal() else 0 for count in args.gpus.split(",")]
    if min(counts) < 1:
        p.error(f"--gpus must be whole numbers with commas between, got {args.gpus!r}")
    for name, (low, high) in RANGES.items():
        if not low <= given[name] <= high:
            rule = f"must be within {low:g} and {high:g}, got {given[name]:g}"
            p.error(f"--{name.replace('_', '-')} {rule}")
    estimates = [estimate(policy, machine, work, count) for policy in chosen for count in counts]
    if args.json:
        for e in estimates:
            print(
                json.dumps(
                    asdict(e) | {"total_s": e.total, "work": asdict(work), "machine": machine.name}
                )
            )
    else:
        print("\n".join(lines(estimates, machine, work)))
    return 0
