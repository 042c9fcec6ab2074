"""A server process under attack, and what its answers have to be like."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings

from gym_sdk.launch import launch_server

ARGUMENTS = ("--context-length", "256", "--threads", "1", "--log-level", "warning", "--log-format", "json")
"""The context bounds every generation."""

_LONG = "FUZZ_EXAMPLES"
"""The environment variable that asks for more, and random, examples."""


def fuzz_settings(examples: int) -> settings:
    """Return settings with so many examples, always the same; or as many random ones as `FUZZ_EXAMPLES`."""
    long = os.environ.get(_LONG)
    return settings(
        max_examples=int(long) if long else examples,
        derandomize=not long,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    kind: str
    data: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events."""
        blocks = [block for block in self.data.decode().split("\n\n") if block and not block.startswith(":")]
        lines = [next(line for line in block.split("\n") if line.startswith("data: ")) for block in blocks]
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class Target:
    """A server process.

    Args:
        url: its base URL.
        log: the file it logs to.
    """

    def __init__(self, url: str, log: Path) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port = parts.hostname, parts.port
        self.root = f"http://{parts.netloc}"
        self._log = log

    def ask(self, method: str, path: str, data: bytes | None = None) -> Answer:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers.get_content_type(), answer.read())
        finally:
            connection.close()

    @cached_property
    def process(self) -> psutil.Process:
        """The server's process."""
        return next(
            child
            for child in psutil.Process().children(recursive=True)
            if any(connection.laddr.port == self.port for connection in child.net_connections("tcp"))
        )

    @property
    def connections(self) -> int:
        """How many the server has."""
        return sum(
            connection.status != psutil.CONN_LISTEN for connection in self.process.net_connections("tcp")
        )

    def check_health(self) -> None:
        """Check that nothing is left over, that a plain request is answered, and that nothing broke."""
        end = time.monotonic() + 30
        while (state := self.ask("GET", "/health").body)["running"] + state["waiting"] or self.connections:
            assert time.monotonic() < end, (state, self.connections)
            time.sleep(0.05)
        plain = {"input": "1 + 2 =", "max_output_tokens": 2}
        answer = self.ask("POST", "/v1/responses", json.dumps(plain).encode())
        assert answer.status == 200, answer.data
        self.check_log()

    def check_log(self) -> None:
        """Check that nothing broke in a way that no client is told."""
        broken = [
            line for line in self._log.read_text(errors="replace").splitlines() if _tells_of_a_bug(line)
        ]
        assert not broken, broken[0]


def _tells_of_a_bug(line: str) -> bool:
    """Return whether a line of the log does; aiohttp's own errors are about bytes that are no HTTP."""
    if not line.startswith("{"):  # transformers writes lines of its own
        return "Traceback" in line
    entry = json.loads(line)
    return entry["level"] == "error" and "aiohttp.http_exceptions." not in entry.get("exception", "")


@contextmanager
def target(model: Path, log: Path, *arguments: str) -> Iterator[Target]:
    """Run a server until the context is left."""
    with start_blocking_portal() as portal:
        launched = launch_server(model, arguments=(*ARGUMENTS, *arguments), log=log)
        with portal.wrap_async_context_manager(launched) as url:
            yield Target(url, log)


def check_error(path: str, answer: Answer) -> None:
    """Check that an error has the shape of its API, and names the field at fault."""
    assert 400 <= answer.status < 500, answer
    body = answer.body
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
        assert body["error"]["message"]
        return
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"], error
    whole = {"invalid_json", "context_length_exceeded"}
    assert error["param"] is not None or error["code"] in whole, error


def check_stream(path: str, answer: Answer) -> None:
    """Check that a stream has an end."""
    events = answer.events
    last = events[-1]
    if path.startswith("/v1/messages"):
        assert last["type"] in ("message_stop", "error"), last
    elif path.startswith("/v1/responses"):
        assert last == "[DONE]" or last["type"].startswith("response."), last
    else:
        assert last == "[DONE]" or "error" in last, last


def check(path: str, answer: Answer) -> None:
    """Check that an answer is one, or an error that can be read."""
    if answer.status != 200:
        check_error(path, answer)
    elif answer.kind == "text/event-stream":
        check_stream(path, answer)
    else:
        assert answer.kind == "application/json"
        assert isinstance(answer.body, dict)
