"""csrc/spec.h says the same as fastgrpo/spec.py: every code, every parameter, every metric, in order."""

import enum
import re
from pathlib import Path

import pytest

from fastgrpo import spec

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "spec.h"


def c_name(python_name: str) -> str:
    """SEQ_MEAN, seq_mean -> kSeqMean."""
    return "k" + "".join(word.capitalize() for word in python_name.lower().split("_"))


def enumerators(opening: str) -> list[str]:
    """Names between the braces after `opening`, comments dropped."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = text.split(opening, 1)[1].split("{", 1)[1].split("}", 1)[0]
    names = [name.strip() for name in body.split(",") if name.strip()]
    assert all(re.fullmatch(r"\w+", name) for name in names), (
        "an explicit value would break the count"
    )
    return names


CODES = [
    value
    for value in vars(spec).values()
    if isinstance(value, type) and issubclass(value, enum.IntEnum) and value is not enum.IntEnum
]


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_codes(code):
    assert [int(member) for member in code] == list(range(len(code)))
    assert enumerators(f"enum class {code.__name__} :") == [c_name(member.name) for member in code]


def test_all_codes_are_found():
    assert len(CODES) == len(re.findall(r"enum class \w+", HEADER.read_text())) == 12


def test_parameters():
    names = enumerators("namespace param {\nenum : int")
    assert names == [c_name(name) for name in spec.PARAMS] + ["kGates"]


def test_metrics():
    assert enumerators("namespace metric {\nenum : int") == [
        c_name(name) for name in spec.METRICS
    ] + ["kCount"]


def test_sizes():
    text = HEADER.read_text()
    for name, value in (
        ("kSpecHead", spec.SPEC_HEAD),
        ("kSpecGate", spec.SPEC_GATE),
        ("kMaxGates", spec.MAX_GATES),
    ):
        assert re.search(rf"int {name} = (\d+);", text)[1] == str(value)
    assert "kNumParams = param::kGates + 2 * kMaxGates" in text
    assert len(spec.PARAMS) + 2 * spec.MAX_GATES == spec.NUM_PARAMS
