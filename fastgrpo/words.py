"""Words for people: what the commands and the package have in common. Nothing here imports torch."""

import argparse
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence, after a space, that names the known word closest to a misspelt one; nothing if none is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Parser(argparse.ArgumentParser):
    """A command line whose complaints are one line that names the option; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Complain and end the process."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            message = f"no option {unknown[1]!r}.{did_you_mean(unknown[1], known)}"
        message = re.sub(
            r"^argument (--\S+): invalid (\w+) value: ", r"\1 must be of type \2, got ", message
        )
        print(f"error: {message.removeprefix('argument ')} ({self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)
