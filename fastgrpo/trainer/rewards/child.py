"""The process in which a user's reward function runs: it can hang, print, crash or exit without harm to the trainer.

    python -m fastgrpo.trainer.rewards.child SPEC READ_FD WRITE_FD MEMORY_BYTES

Requests and answers are lines of JSON on the two file descriptors. Standard output goes to standard error. Requests
name a method: `score`; and, of objects that learn, `refit`, `save` and `load` (as in checkpoints: nothing is pickled).
"""

import asyncio
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


class Refused(Exception):
    """Something that the user can mend; the text says what."""


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names; `name` may be left out if it is `reward`."""
    place, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "reward")
    if place.endswith(".py"):
        path = Path(place).resolve()
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        if module_spec is None or module_spec.loader is None or not path.is_file():
            raise Refused(f"no Python file {place!r}")
        sys.path.insert(0, str(path.parent))
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[path.stem] = module
        module_spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        own = (
            n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")
        )
        raise Refused(f"{place} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the function returns; functions without `**kwargs` get the arguments that they name."""
    parameters = inspect.signature(function).parameters.values()
    named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        has = ", ".join(sorted(arguments))
        raise Refused(f"it wants {', '.join(missing)}, and what there is is {has}")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    result = function(**arguments)
    if inspect.isawaitable(result):
        result = asyncio.run(_wait(result))
    return result


async def _wait(result: Any) -> Any:
    return await result


def learns(reward: Any) -> bool:
    """Whether the reward is an object that can be trained; then a checkpoint has to be able to hold it."""
    if not callable(getattr(reward, "refit", None)):
        return False
    lacking = [
        n for n in ("state_dict", "load_state_dict") if not callable(getattr(reward, n, None))
    ]
    if lacking:
        raise TypeError(f"it has refit but no {' and no '.join(lacking)}: no run could be resumed")
    return True


def respond(reward: Any, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Does what is asked; the content of the answer."""
    if method == "score":
        values = call(reward, arguments)
        return {"rewards": [None if value is None else float(value) for value in values]}
    if method == "refit":
        call(reward.refit, arguments)
        return {}
    from fastgrpo.trainer.checkpoint import tree  # needs torch, which only learning rewards do

    path = Path(arguments["path"])
    if method == "save":
        path.write_bytes(tree.to_bytes(reward.state_dict()))
    else:
        reward.load_state_dict(tree.from_bytes(path.read_bytes()))
    return {}


def be_expendable() -> None:
    """If memory runs out, Linux takes this process, not the trainer; what this one starts can be found and killed."""
    with contextlib.suppress(OSError, AttributeError):
        Path("/proc/self/oom_score_adj").write_text("1000")
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(spec: str, read_fd: int, write_fd: int, memory_bytes: int) -> None:
    """Serves requests until the trainer closes its end; with at most so much memory, unless that is 0."""
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    os.dup2(2, 1)
    be_expendable()
    with (
        os.fdopen(read_fd, encoding="utf-8") as requests,
        os.fdopen(write_fd, "w", encoding="utf-8") as answers,
    ):

        def answer(**content: Any) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        try:
            reward = load_function(spec)
            answer(learns=learns(reward))
        except BaseException as error:
            answer(error=_describe(error))
            return
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        for line in requests:
            try:
                answer(**respond(reward, **json.loads(line)))
            except Exception as error:
                answer(error=_describe(error))


def _end_with_parent(parent: int) -> None:
    """A function that hangs must not outlive a trainer that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _describe(error: BaseException) -> str:
    """Kind, message and the user's line in which it arose."""
    if isinstance(error, Refused):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
