"""The calculator against Python's own arithmetic on generated expressions, and everything it must refuse."""

import contextlib
import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from fastgrpo.trainer.evaluation.calculator import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    Calculator,
    decimal,
    evaluate,
)
from fastgrpo.trainer.evaluation.tools import ToolError

run = Calculator().run
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"), (" 48 / 2 ", "24"), ("1,200*2", "2400"), ("$1,000+$.50", "1000.5"), ("20%*50", "10"),
        ("2+3*4", "14"), ("(2+3)*4", "20"), ("10-4-3", "3"), ("8/4/2", "1"), ("-2^2", "-4"), ("2^-1", "0.5"),
        ("2**3**2", "512"), ("7//2", "3"), ("-7//2", "-4"),
        ("2*-3", "-6"), ("--3", "3"), ("5.", "5"), ("3x4", "12"), ("3\u00d74÷6", "2"), ("0.1+0.2", "0.3"),
        ("1/3", "0.3333333333"), ("2/3*100", "66.66666667"), ("1/3*3", "1"), ("10^12", "1000000000000"), ("0*-1", "0"),
        ("1-1.0000000001", "-0.0000000001"), ("10^30/3", "3.333333333e+29"),
    ],
)  # fmt: skip
def test_values(expression, result):
    assert run(expression) == result


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "a number is missing"), ("2+", "a number is missing"), ("2 3", "unexpected '3'"), ("(2", "not closed"),
        ("2)", r"unexpected '\)'"), ("x", "a number expected, got 'x'"), ("1/0", "division by zero"),
        ("0^-1", "division by zero"), ("1//(2-2)", "division by zero"), ("abc", "unexpected 'a'"),
        ("1,00", "unexpected"),
        ("__import__('os')", "unexpected '_'"), ("(lambda: 1)()", "unexpected 'l'"), ("1e9", "unexpected 'e'"),
        ("9^65", "exponent"), ("2^0.5", "exponent"), ("9^9^9", "exponent"), ("9999999999^64", "too large"),
        ("(9^60)^60", "too large"), ("*".join(["(9^60)"] * 20), "too large"),
        ("1" * (MAX_CHARACTERS + 1), f"more than {MAX_CHARACTERS} characters"),
        ("(" * 50 + "1" + ")" * 50, f"more than {MAX_DEPTH} deep"), ("-" * 100 + "1", "deep"),
        ("2^" * 60 + "1", "deep"),
        ("1\x002", "unexpected"), ("\uff11", "unexpected"),
    ],
)  # fmt: skip
def test_what_has_no_value(expression, says):
    with pytest.raises(ToolError, match=says):
        run(expression)


def grow(rng: random.Random, depth: int) -> str:
    """A random expression that Python reads the same way over Fractions."""
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randint(0, 99))
    kind = rng.randrange(6)
    left, right = grow(rng, depth - 1), grow(rng, depth - 1)
    if kind == 4:
        return f"({left})"
    if kind == 5:
        return f"-{left}"
    return f"{left}{'+-*/'[kind]}{right}"


def test_random_expressions_have_pythons_values():
    rng, compared = random.Random(0), 0
    for _ in range(2000):
        text = grow(rng, 4)
        if len(text) > MAX_CHARACTERS:
            continue
        exact = re.sub(r"\d+", lambda m: f"Fraction({m[0]})", text)
        try:
            expected = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ToolError, match="division by zero"):
                evaluate(text)
            continue
        assert evaluate(text) == expected, text
        compared += 1
    assert compared > 1000


def test_decimals_are_exact_where_they_end():
    for value in (Fraction(1, 2**10), Fraction(-7, 5), Fraction(123456789, 10**10), Fraction(0)):
        assert Fraction(decimal(value)) == value
    for value in (Fraction(22, 7), Fraction(-1, 3), Fraction(10**40, 7)):
        assert abs(Fraction(decimal(value)) / value - 1) < Fraction(1, 10**9)


def test_hostile_text_comes_to_an_end():
    """Random texts over the calculator's alphabet, and those whose numbers would explode: without bounds, for ever."""
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("9()+-*/^%.,") for _ in range(MAX_CHARACTERS))
        with contextlib.suppress(ToolError):
            evaluate(text)
    for text in ("9^64*" * 39 + "9", "(" * 25 + "9^64" + ")^1" * 25, "9^-64+" * 33 + "1"):
        with contextlib.suppress(ToolError):
            evaluate(text)


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K files are not here")
def test_annotations_of_gsm8k():
    """All 27,998 annotations of people have their values, to within what they rounded."""
    found = 0
    for name in ("train", "test"):
        for line in (GSM8K / f"{name}.jsonl").read_text().splitlines():
            for expression, result in re.findall(
                r"<<([^<>=]+)=([^<>=]+)>>", json.loads(line)["answer"]
            ):
                found += 1
                value = evaluate(expression)
                gap = abs(value - evaluate(result))
                assert gap <= Fraction(1, 100) * max(1, abs(value)), (expression, result)
    assert found == 27_998
