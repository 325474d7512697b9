"""Command line of `fastgrpo verify`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch

from fastgrpo.functional.devices import pick_device
from fastgrpo.verify.compare import Comparison, compare
from fastgrpo.verify.head import ModelHead, load_head
from fastgrpo.words import Parser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> Parser:
    """Options of the command."""
    p = Parser(
        prog="fastgrpo verify",
        description="Compare the fused head with float64 and with eager code on a model's own head: its vocabulary, "
        "softcap, scale, bias and tied weights. Exit code 0: within bounds; 1: not; 2: nothing to verify.",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="checkpoint folder, or a config.json (random head)",
    )
    p.add_argument("--tokens", type=int, default=64, help="tokens to score (default 64)")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of head and hidden states (default: the checkpoint's)",
    )
    p.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    p.add_argument("--temperature", type=float, default=1.0, help="(default 1)")
    p.add_argument("--seed", type=int, default=0, help="of hidden states and tokens (default 0)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def render(head: ModelHead, rows: Sequence[Comparison], device: str) -> str:
    """The result as text for a terminal."""
    vocabulary, size = head.weight.shape
    quirks = [
        f"scale {head.logit_scale:g}" if head.logit_scale != 1.0 else "",
        f"softcap {head.logit_softcap:g}" if head.logit_softcap is not None else "",
        "bias" if head.bias is not None else "",
        "tied to the embeddings" if head.tied else "",
    ]
    dtype = str(head.weight.dtype).removeprefix("torch.")
    lines = [
        f"head: {vocabulary} x {size} {dtype} on {device}, weights: {head.source}"
        + "".join(f", {quirk}" for quirk in quirks if quirk),
        f"{'largest error':<16}{'fused':>12}{'eager':>12}{'bound':>12}",
    ]
    for row in rows:
        mark = "ok" if row.passed else "TOO LARGE"
        lines.append(
            f"{row.quantity:<16}{row.fused:>12.3g}{row.eager:>12.3g}{row.bound:>12.3g}  {mark}"
        )
    passed = all(row.passed for row in rows)
    lines.append(
        "green: the fused head is as exact as eager code on this model"
        if passed
        else "RED: the fused head is less exact than eager code on this model; please report this output"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Verify a model's head; returns the exit code."""
    p = parser()
    options = p.parse_args(argv)
    if options.tokens < 1:
        p.error(f"--tokens must be at least 1, got {options.tokens}")
    if not 0 < options.temperature < float("inf"):
        p.error(f"--temperature must be above 0, got {options.temperature}")
    try:
        device = pick_device(options.device)
        head = load_head(options.model, DTYPES.get(options.dtype))
    except (ValueError, OSError) as error:
        p.error(str(error).splitlines()[0])
    rows = compare(head, options.tokens, options.temperature, device, options.seed)
    passed = all(row.passed for row in rows)
    if options.json:
        shape = {"vocabulary": head.weight.shape[0], "hidden": head.weight.shape[1]}
        settings = {"softcap": head.logit_softcap, "scale": head.logit_scale, "source": head.source}
        results = [{**asdict(row), "passed": row.passed} for row in rows]
        print(json.dumps({**shape, **settings, "passed": passed, "results": results}))
    else:
        print(render(head, rows, str(device)))
    return 0 if passed else 1
