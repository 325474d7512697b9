"""JSON over HTTP with time-outs and retries, from the standard library; errors name the address and what to do."""

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastgrpo.trainer.sampling.rollout import SamplerError

ATTEMPTS = 4
FIRST_PAUSE_S = 0.5  # doubles after every failure
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that the next attempt may not meet again."""
LARGEST_ANSWER = 1 << 30  # bytes
BODY_SHOWN = 300  # characters of a refusal


class Refused(SamplerError):
    """The server answered, and will answer the same again; `status` is HTTP's."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class JsonServer:
    """A server at `http(s)://host[:port][/prefix]`."""

    url: str
    timeout: float  # seconds without an answer after which it counts as dead
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the address."""
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            usable = False
        if not usable:
            raise ValueError(
                f"vllm_server_base_url must be http://HOST:PORT (several with commas between), got {self.url!r}"
            )

    def get(self, path: str) -> Any:
        """The answer to GET."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to POST; the request may arrive more than once."""
        return self._ask("POST", path, {} if body is None else body)

    def once(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One attempt.

        Raises:
            Refused: The server said no.
            OSError, http.client.HTTPException, ValueError: No whole answer came.
        """
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        try:
            sent = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **self.headers}
            connection.request(method, parts.path.rstrip("/") + path, sent, headers)
            answer = connection.getresponse()
            content = answer.read(LARGEST_ANSWER + 1)
        finally:
            connection.close()
        if len(content) > LARGEST_ANSWER:
            raise Refused(f"{method} {self.url}{path}: more than {LARGEST_ANSWER >> 20} MB", 0)
        if answer.length:  # what is still to come
            raise http.client.IncompleteRead(content, answer.length)
        text = content.decode("utf-8", "replace")
        if answer.status != http.client.OK:
            what = f"{method} {self.url}{path}: HTTP {answer.status}"
            raise Refused(f"{what}: {text.strip()[:BODY_SHOWN]}", answer.status)
        return json.loads(text) if text.strip() else None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Tries again after what may pass, unless the time-out has gone by."""
        begun, pause = time.monotonic(), FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.once(method, path, body)
            except Refused as error:
                if error.status not in BUSY:
                    raise
                problem, status = str(error), error.status
            except TimeoutError:
                problem, status = f"no answer within {self.timeout:g} s", 0
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, status = f"{type(error).__name__}: {error}", 0
            if attempt == ATTEMPTS or time.monotonic() - begun >= self.timeout:
                break
            time.sleep(pause)
            pause *= 2
        raise Refused(
            f"{method} {self.url}{path} failed {attempt} time{'s' * (attempt > 1)}; last: {problem}. Is the server up? "
            "Look at its log; if it is only slow, raise --vllm-server-timeout.",
            status,
        )
