"""Arithmetic that a model may ask for: a parser of its own, exact fractions, and bounds on everything that can grow.

    sum     = product (("+" | "-") product)*
    product = signed ((times | "/" | "÷" | "//") signed)*     times: "*", "x" or the cross; "//" rounds down
    signed  = ("+" | "-") signed | power
    power   = atom (("^" | "**") signed)?              exponents are whole numbers of at most MAX_EXPONENT
    atom    = (number | "(" sum ")") "%"*              a number may have commas between thousands, and "$" before it

Nothing is evaluated as Python. Work is bounded by the length of the text times the size of a number: microseconds.
"""

import math
import re
from fractions import Fraction

from fastgrpo.trainer.evaluation.tools import CallFormat, ToolError

MAX_CHARACTERS = 200
MAX_DEPTH = 30
MAX_EXPONENT = 64
MAX_BITS = 1024  # of a numerator and of a denominator
SHOWN_DIGITS = 10  # significant ones, of a result that is no finite decimal of so many
TIMES = ("*", "x", "\u00d7")
DIVIDED = ("/", "÷", "//")
TOKEN = re.compile(
    r"\s*(\*\*|//|[-+*/^()%x\u00d7÷]|\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\$?\.\d+)",
    re.ASCII,
)


class Calculator:
    """The tool "calculator", in GSM8K's convention: after `<<48/2=` it writes `24>>`."""

    call = CallFormat(opening="<<", closing="=", before="", after=">>")

    def run(self, code: str) -> str:
        """The value of an expression, as a decimal number.

        Raises:
            ToolError: It is none, divides by zero, or is too long, too deep or too large.
        """
        return decimal(evaluate(code))


def evaluate(expression: str) -> Fraction:
    """The exact value.

    Raises:
        ToolError: See `Calculator.run`.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"more than {MAX_CHARACTERS} characters")
    parser = _Parser(_tokens(expression))
    value = parser.sum(0)
    if parser.next:
        raise ToolError(f"unexpected {parser.next!r}")
    return value


def decimal(value: Fraction) -> str:
    """The value in digits: exact where SHOWN_DIGITS decimals hold it, else rounded to so many significant digits."""
    scaled = value * 10**SHOWN_DIGITS
    if scaled.denominator == 1:
        whole, rest = divmod(abs(scaled.numerator), 10**SHOWN_DIGITS)
        sign = "-" if value < 0 else ""
        return f"{sign}{whole}.{rest:0{SHOWN_DIGITS}d}".rstrip("0").rstrip(".")
    try:
        return f"{float(value):.{SHOWN_DIGITS}g}"
    except OverflowError:
        raise ToolError("too large") from None


def _tokens(text: str) -> list[str]:
    found, at = list[str](), 0
    text = text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise ToolError(f"unexpected {text[at:].lstrip()[:1]!r}")
        found.append(match[1])
        at = match.end()
    return found


class _Parser:
    """Recursive descent; every level of the grammar is handed the depth of nesting."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]

    @property
    def next(self) -> str:
        """The token to come; empty at the end."""
        return self.tokens[-1] if self.tokens else ""

    def sum(self, depth: int) -> Fraction:
        """See the module."""
        value = self.product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self.tokens.pop() == "+" else -1
            value = _bounded(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        """See the module."""
        value = self.signed(depth)
        while self.next in (*TIMES, *DIVIDED):
            operator = self.tokens.pop()
            factor = self.signed(depth)
            if operator in DIVIDED and not factor:
                raise ToolError("division by zero")
            value = _bounded(value / factor if operator in DIVIDED else value * factor)
            value = Fraction(math.floor(value)) if operator == "//" else value
        return value

    def signed(self, depth: int) -> Fraction:
        """See the module."""
        if depth > MAX_DEPTH:
            raise ToolError(f"nested more than {MAX_DEPTH} deep")
        if self.next in ("+", "-"):
            sign = 1 if self.tokens.pop() == "+" else -1
            return sign * self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Fraction:
        """See the module."""
        value = self.atom(depth)
        if self.next not in ("^", "**"):
            return value
        self.tokens.pop()
        exponent = self.signed(depth + 1)
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise ToolError(f"an exponent must be a whole number of at most {MAX_EXPONENT}")
        if not value and exponent < 0:
            raise ToolError("division by zero")
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if size * abs(exponent) > 2 * MAX_BITS:  # before there is such a number
            raise ToolError("too large")
        return _bounded(value ** int(exponent))

    def atom(self, depth: int) -> Fraction:
        """See the module."""
        token = self.tokens.pop() if self.tokens else ""
        if token == "(":
            value = self.sum(depth + 1)
            if self.next != ")":
                raise ToolError("a parenthesis is not closed")
            self.tokens.pop()
        elif token and (token[-1].isdigit() or token[-1] == "."):
            value = _bounded(Fraction(token.lstrip("$").replace(",", "")))
        else:
            raise ToolError(f"a number expected, got {token!r}" if token else "a number is missing")
        while self.next == "%":
            self.tokens.pop()
            value = value / 100
        return _bounded(value)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("too large")
    return value
