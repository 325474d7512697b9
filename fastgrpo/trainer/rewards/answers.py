r"""Final answers in free text: where a solution states its answer, and when two answers are the same number."""

import re
from decimal import Decimal, InvalidOperation

STATED = (
    re.compile(r"####[ \t]*([^\n]*)"),  # GSM8K
    re.compile(r"\\boxed\{([^{}]*)\}"),  # MATH and most chat models
    re.compile(r"answer is:?[ \t]*([^\n]*)", re.IGNORECASE),
)
"""How solutions state an answer, the most explicit first; of several statements of one kind the last counts."""
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
AROUND = re.compile(r"^[\s$€£*:=(\[]+|[\s$€£*.:;)\]]+$")
LONGEST = 200
"""Characters of an answer that can be a number; matching stays short whatever a model writes."""
UNIT = re.compile(r"(?<=\d)\s*(?:%|[A-Za-z][A-Za-z ]*)$")


def stated_answer(text: str) -> str | None:
    """The answer a solution states, as it is written; None if it states none."""
    for pattern in STATED:
        found = pattern.findall(text)
        if found:
            answer: str = found[-1].strip()
            return answer or None
    return None


def normal_number(text: str) -> str | None:
    """One way to write a number: "1,200.0" -> "1200", "$5." -> "5", "18 apples" -> "18"; None if it is no number."""
    if len(text) > LONGEST:
        return None
    bare = AROUND.sub("", text)
    bare = AROUND.sub("", UNIT.sub("", bare))
    if not any(c.isdigit() for c in bare) or not NUMBER.fullmatch(bare):
        return None
    try:
        value = Decimal(bare.replace(",", ""))
    except InvalidOperation:
        return None
    plain = f"{value:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "+0", "") else plain.lstrip("+")


def final_number(text: str) -> str | None:
    """The number that a solution states as its answer, in the one way to write it."""
    answer = stated_answer(text)
    return None if answer is None else normal_number(answer)
