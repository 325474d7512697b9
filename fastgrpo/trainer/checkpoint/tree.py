"""Nested state as JSON plus named tensors, so that nothing is ever pickled.

Tensors become `{"$": "tensor", "name": ...}`; tuples, byte strings, floats that JSON lacks and dictionaries whose keys
are not text are marked the same way. Everything else is JSON already. A tensor that occurs twice is stored once.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

MARK = "$"
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
"""Names of the safetensors format."""


class StateError(ValueError):
    """State that cannot be stored, or stored state that cannot be understood; the text says where."""


def pack(value: Any, tensors: dict[str, Tensor], at: str) -> Any:
    """The JSON form of `value`; its tensors go into `tensors` under names that tell where they belong."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {MARK: "float", "value": repr(value)}
    if isinstance(value, Tensor):
        tensors[at] = value.detach()
        return {MARK: "tensor", "name": at}
    if isinstance(value, bytes):
        return {MARK: "bytes", "value": value.hex()}
    if isinstance(value, list):
        return [pack(item, tensors, f"{at}.{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {MARK: "tuple", "items": pack(list(value), tensors, at)}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return {key: pack(item, tensors, f"{at}.{key}") for key, item in value.items()}
        pairs = [[key, pack(item, tensors, f"{at}.{key}")] for key, item in value.items()]
        return {MARK: "dict", "items": pairs}
    raise StateError(f"{at} cannot be stored: {type(value).__name__}")


def distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors with memory of their own, alias -> name): what shares all of its memory is kept once."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        local: Tensor = getattr(tensor, "_local_tensor", tensor)
        place = (local.data_ptr(), tensor.shape, local.stride(), tensor.dtype, tensor.device)
        owner = seen.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            kept[name] = tensor
        else:
            aliases[name] = owner
    return kept, aliases


def unpack(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {key: unpack(item, tensors) for key, item in value.items()}
    try:
        match value[MARK]:
            case "tensor":
                return tensors[value["name"]]
            case "float":
                return float(value["value"])
            case "bytes":
                return bytes.fromhex(value["value"])
            case "tuple":
                return tuple(unpack(value["items"], tensors))
            case "dict":
                return {key: unpack(item, tensors) for key, item in value["items"]}
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"stored state is malformed: {error!r}") from None
    raise StateError(f"stored state has an unknown mark {value[MARK]!r}")


class Pieces:
    """A safetensors file, piece by piece, as often as asked: weights in memory are not copied, others come over one by
    one.

    Raises:
        StateError: A tensor of a kind that the format does not have.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = list(tensors.values())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, tensor in tensors.items():
            kind = DTYPES.get(tensor.dtype)
            if kind is None:
                raise StateError(f"{name} cannot be stored: {tensor.dtype}")
            header[name] = {
                "dtype": kind,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-len(text) % 8 + len(text))
        self._header = struct.pack("<Q", len(text)) + text

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._header
        for tensor in self._tensors:
            if tensor.nbytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data


def describe(form: Any, aliases: Mapping[str, str]) -> bytes:
    """The JSON file beside the tensors of a packed state."""
    content = {"state": form, "aliases": aliases}
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def encode(
    value: Any, root: str, keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> tuple[Pieces, bytes]:
    """(safetensors in pieces, JSON) of a nested state; `root` begins the names of its tensors, `keep` may copy them."""
    tensors: dict[str, Tensor] = {}
    form = pack(value, tensors, root)
    kept, aliases = distinct(tensors)
    kept = {name: keep(name, tensor) for name, tensor in kept.items()}
    return Pieces(kept), describe(form, aliases)


def decode(tensors: bytes, text: bytes) -> Any:
    """The inverse of `encode`."""
    try:
        loaded = load(tensors)
    except (SafetensorError, ValueError) as error:
        raise StateError(f"stored state cannot be read: {error!r}") from None
    return _decode(text, loaded)


def to_bytes(value: Any) -> bytes:
    """A nested state as one string of bytes: the length of its JSON, the JSON, a safetensors file."""
    tensors, text = encode(value, "state")
    return b"".join([struct.pack("<Q", len(text)), text, *tensors])


def from_bytes(content: bytes) -> Any:
    """The inverse of `to_bytes`."""
    if len(content) < 8:
        raise StateError("stored state is cut off")
    end = 8 + struct.unpack_from("<Q", content)[0]
    return decode(content[end:], content[8:end])


class Names(dict[str, str]):
    """Stands for tensors by their names."""

    def __missing__(self, name: str) -> str:
        return name


def decode_form(text: bytes) -> Any:
    """A nested state with the names of its tensors in their places."""
    return _decode(text, Names())


def _decode(text: bytes, tensors: dict[str, Any]) -> Any:
    try:
        content = json.loads(text)
        tensors |= {alias: tensors[name] for alias, name in content["aliases"].items()}
        return unpack(content["state"], tensors)
    except (UnicodeDecodeError, ValueError, RecursionError, KeyError) as error:
        raise StateError(f"stored state cannot be read: {error!r}") from None


def same(a: Any, b: Any, at: str = "state") -> str | None:
    """None if two states are equal to the bit, else where they first differ."""
    if type(a) is not type(b):
        return f"{at}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape
        equal = equal and torch.equal(_bits(a), _bits(b))
        return None if equal else at
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{at}: keys {list(a)} and {list(b)}"
        pairs = [(a[key], b[key], f"{at}.{key}") for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{at}: {len(a)} and {len(b)} items"
        pairs = [(x, y, f"{at}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b or (a != a and b != b) else f"{at}: {a!r} and {b!r}"
    return next((found for x, y, place in pairs if (found := same(x, y, place))), None)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaNs of the same bits are equal, and +0 is not -0."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
