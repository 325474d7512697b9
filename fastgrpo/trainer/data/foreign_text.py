"""Text of others (models, data, reward functions) on its way to a terminal, a log or a report.

`printable` takes the power over a terminal from it, `redact` the secrets. Nothing here imports torch.
"""

import os
import re
from collections.abc import Iterator

STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 (but tab and line feed), C1
    "\u00ad\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # directions, separators, invisible
    "\ud800-\udfff\U000e0000-\U000e0fff]"  # no characters at all; tags
)
"""What moves a cursor, sets a colour or a title, writes to the clipboard, or shows letters in another order."""
HIDDEN = "[secret]"
SECRET_NAME = re.compile(
    r"(^|_)(API)?(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)($|_)", re.IGNORECASE
)
SHORTEST = 8
SECRET = re.compile(
    r"(?P<keep>://)[^/\s@]+(?=@)"  # user and password of a URL
    r"|(?P<auth>\b(?:Bearer|Authorization:\s*\w+)\s+)[A-Za-z0-9._~+/=-]{12,}"
    r"|\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abpr]-|AKIA|wandb_v1_)[A-Za-z0-9_-]{12,}"
)


def printable(text: str) -> str:
    r"""The text with what could steer a terminal written out: "\x1b[2J" becomes the six characters `\x1b[2J`."""
    return STEERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def redact(text: str) -> str:
    """The text without tokens, passwords in URLs, and values of environment variables that are named like secrets."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    return SECRET.sub(lambda match: (match["keep"] or match["auth"] or "") + HIDDEN, text)


def secrets() -> Iterator[str]:
    """Values of the environment that are secrets, by the names of their variables; the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }
    return iter(sorted(found, key=len, reverse=True))


def presentable(text: str) -> str:
    """`printable` and `redact`: for whatever is shown to people."""
    return redact(printable(text))
