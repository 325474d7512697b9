"""A promise, and where the tests are."""

from dataclasses import dataclass

OPS, FAULTS, SECURITY = "tests/ops/test_", "tests/trainer_faults/test_", "tests/security/test_"


@dataclass(frozen=True)
class Promise:
    """One line of the page."""

    number: int
    text: str
    figure: str  # what has to be reached
    tests: tuple[str, ...]  # file::test
    reached: str = ""  # besides the number of cases; {name} is a committed result
    short: str = ""  # what of it is not shown here, and why
