"""One model call over HTTP: read, generate, record, answer in one piece or as a stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from aiohttp import web
from pydantic_core import from_json

from backends.policy import Policy
from backends.server.calls import Calls, PolicyAnswerer
from backends.server.capture import ended_error, recording
from backends.server.captures import CaptureStore
from backends.server.errors import json_response
from backends.server.exchange import KEEP_ALIVE_S, Exchange
from backends.server.idempotency import FINAL
from backends.server.state import RUNS, STORE, Run, StoredHistory, follow
from backends.server.streams import make_in_background, stream
from backends.server.surfaces import Surface
from gym_sdk.errors import PolicyError
from gym_sdk.schema import TOKEN_FORM_HEADER, TOKEN_FORMS, TokenForm

__all__ = ["CAPTURES", "DEFAULT_FORM", "KEEP_ALIVE_S", "POLICY", "answering", "read_body", "token_form"]

POLICY = web.AppKey("policy", Policy)
CAPTURES = web.AppKey("captures", CaptureStore)
DEFAULT_FORM: web.AppKey[TokenForm] = web.AppKey("token_form")

_FINAL = frozenset({"completed", "incomplete"})
"""Statuses of responses that were not ended from outside."""


async def read_body(request: web.Request) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PolicyError: the body is something else.
    """
    try:
        body = from_json(await request.read())
    except ValueError as error:
        raise PolicyError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise PolicyError("the body must be a JSON object", code="invalid_json")
    return body


def token_form(http: web.Request, *, has_forms: bool = True) -> TokenForm:
    """Return in which form the tokens are asked for.

    Args:
        http: whose header says so.
        has_forms: whether there is another than the one on the item.

    Raises:
        PolicyError: there is no such form here.
    """
    default: TokenForm = http.app[DEFAULT_FORM] if has_forms else "item"
    asked = http.headers.get(TOKEN_FORM_HEADER, default)
    forms: tuple[TokenForm, ...] = TOKEN_FORMS if has_forms else ("item",)
    for form in forms:
        if asked == form:
            return form
    raise PolicyError(
        f"the header {TOKEN_FORM_HEADER} must be one of {', '.join(forms)} here, not {asked!r}",
        code="invalid_value",
        param=TOKEN_FORM_HEADER,
    )


def answering(surface: Surface) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler of a surface's route."""

    async def answer(http: web.Request) -> web.StreamResponse:
        return await _answer(http, surface)

    return answer


async def _answer(http: web.Request, surface: Surface) -> web.StreamResponse:
    policy = http.app[POLICY]
    scope = http.match_info.get("rollout_id", "")
    capture = http.app[CAPTURES].get(scope) if scope else None
    with ExitStack() as stack:
        records = [stack.enter_context(recording(capture, surface.name))]
        form = token_form(http, has_forms=surface.has_forms)
        body = await read_body(http)
        asked = surface.read(body, model=policy.name, form=form)
        records += [stack.enter_context(recording(capture, surface.name)) for _ in asked.requests[1:]]
        for record, request in zip(records, asked.requests, strict=True):
            record.asked(request)
        if capture is not None and capture.ended:
            raise ended_error()
        history, size = StoredHistory(http.app[STORE], scope), len(await http.read())
        calls = Calls(
            asked.answerer or PolicyAnswerer(policy, scope, asked.inherit, history),
            asked.requests,
            streams=asked.events is not None or asked.background,
        )
        for record, task in zip(records, calls.tasks, strict=True):
            record.call = task
        exchange = Exchange(http, asked, calls, records, capture, size=size)
        if asked.background:
            return await _in_background(exchange)
        try:
            if asked.events is not None:
                return await stream(exchange, asked.events)
            responses = await exchange.results()
            http[FINAL] = all(response.status in _FINAL for response in responses)
            return json_response(asked.write(responses))
        finally:
            await calls.aclose()


async def _in_background(exchange: Exchange) -> web.StreamResponse:
    """Answer as soon as the request is accepted, or follow what it comes to."""
    http, asked = exchange.http, exchange.asked

    async def work(run: Run) -> None:
        await make_in_background(run, exchange, asked.events)

    try:
        await exchange.accepted()
        queued = exchange.calls.begun[0].model_copy(update={"status": "queued"})
        run = await http.app[RUNS].start(exchange.stored(queued), work, streamed=asked.events is not None)
        run.when_ended(exchange.calls.cancel)  # work that is cancelled before its first step never begins
    except BaseException:
        await exchange.calls.aclose()
        raise
    if run.streamed:
        return await follow(http, run, keep_alive_s=exchange.keep_alive_s)
    http[FINAL] = True  # its id tells what becomes of it
    return json_response(asked.write([queued]))
