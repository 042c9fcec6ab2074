"""A transport that answers from a script: for faults and orders of events that no real server can repeat."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gym_sdk.schema import FunctionCall, Message, OutputText, Response, ResponseRequest, TokenForm, Usage
from gym_sdk.tokens import CallTokens

Answer = Response | Exception
Script = Callable[[ResponseRequest], Awaitable[Answer] | Answer]

_numbers = itertools.count()


def say(text: str, *, status: str = "completed", tokens: bool = True) -> Response:
    """Return a response with one message."""
    item = Message(
        role="assistant", id=f"msg_{next(_numbers)}", status=status, content=[OutputText(text=text)]
    )
    return respond([item], status=status, tokens=tokens)


def call(*calls: tuple[str, str]) -> Response:
    """Return a response with function calls, given as (name, arguments)."""
    items = [
        FunctionCall(call_id=f"call_{next(_numbers)}", name=name, arguments=arguments)
        for name, arguments in calls
    ]
    return respond(items)


def respond(items: Sequence[Any], *, status: str = "completed", tokens: bool = True) -> Response:
    """Return a response with these items; the last carries tokens."""
    output = list(items)
    if tokens:
        output[-1] = output[-1].with_tokens(CallTokens([1, 2], [3], [-0.5]))
    return Response.model_validate(
        {
            "id": f"resp_{next(_numbers)}",
            "created_at": 0.0,
            "model": "policy",
            "status": status,
            "output": output,
            "usage": Usage(input_tokens=2, output_tokens=1, total_tokens=3),
        }
    )


class ScriptedTransport:
    """Calls the script for each request; an exception it returns is raised."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[ResponseRequest] = []
        self.token_forms: list[TokenForm] = []
        self.pushed: list[tuple[Any, str]] = []
        self.running = 0
        self.most_running = 0
        self.closed = False

    async def open(self) -> None:
        return None

    async def respond(self, request: ResponseRequest, *, token_form: TokenForm = "item") -> Response:
        self.requests.append(request)
        self.token_forms.append(token_form)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = self.script(request)
            if isinstance(answer, Awaitable):
                answer = await answer
        finally:
            self.running -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def update_weights(self, source: str | Path | Mapping[str, Any], *, version: str) -> None:
        self.pushed.append((source, version))

    async def aclose(self) -> None:
        self.closed = True


def in_turn(*answers: Answer) -> Script:
    """Return a script that gives these answers one after the other."""
    queue = iter(answers)
    return lambda request: next(queue)
