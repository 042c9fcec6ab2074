"""One model call over HTTP: read, generate, record, answer in one piece or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic_core import from_json

from backends.policy import Policy
from backends.requests import refuse
from backends.server.capture import CallRecord, Capture, ended_error, recording
from backends.server.captures import CaptureStore
from backends.server.chat import chat_completion, request_from_chat
from backends.server.errors import json_response, problem_of
from backends.server.streaming import KEEP_ALIVE, ChatEvents, Events, ResponseEvents
from gym_sdk.errors import PolicyError
from gym_sdk.schema import TOKEN_FORM_HEADER, TOKEN_FORMS, Response, ResponseRequest, TokenForm

__all__ = ["CAPTURES", "DEFAULT_FORM", "KEEP_ALIVE_S", "POLICY", "chat_completions", "read_body", "responses"]

_log = logging.getLogger(__name__)

POLICY = web.AppKey("policy", Policy)
CAPTURES = web.AppKey("captures", CaptureStore)
KEEP_ALIVE_S = web.AppKey("keep_alive_s", float)
DEFAULT_FORM: web.AppKey[TokenForm] = web.AppKey("token_form")

_REFUSAL_S = 0.02
"""How long a stream waits before it opens: requests are refused within it, with an HTTP error."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, and the events that its answer is streamed as, if it is."""

    request: ResponseRequest
    events: Events | None
    form: TokenForm = "item"


@dataclass(frozen=True, slots=True)
class _Route:
    """What differs between the two routes."""

    name: str
    read: Callable[[dict[str, Any], str, TokenForm], _Asked]
    write: Callable[[Response, TokenForm], dict[str, Any]]
    default_form: TokenForm | None
    """The form without the header; None: the server's."""


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


async def responses(request: web.Request) -> web.StreamResponse:
    """Answer `POST …/responses`."""
    return await _answer(request, _RESPONSES)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer `POST …/chat/completions`."""
    return await _answer(request, _CHAT)


def _read_responses(body: dict[str, Any], model: str, form: TokenForm) -> _Asked:
    options = _stream_options(body, "include_obfuscation")
    if options.get("include_obfuscation"):
        raise refuse("stream_options.include_obfuscation", "streams are not obfuscated here")
    request = ResponseRequest.model_validate(body)
    stream, request.stream = request.stream, None
    return _Asked(request, ResponseEvents(request, model, form) if stream else None, form)


def _read_chat(body: dict[str, Any], model: str, form: TokenForm) -> _Asked:
    if form != "item":
        raise refuse(TOKEN_FORM_HEADER, f"Chat Completions carry tokens on the message, not as {form!r}")
    options = _stream_options(body, "include_usage")
    request = request_from_chat(body)
    stream, request.stream = request.stream, None
    usage = bool(options.get("include_usage"))
    return _Asked(request, ChatEvents(model, include_usage=usage) if stream else None)


def _form(http: web.Request, default: TokenForm) -> TokenForm:
    """Read in which form the tokens are asked for."""
    asked = http.headers.get(TOKEN_FORM_HEADER, default)
    for form in TOKEN_FORMS:
        if asked == form:
            return form
    raise PolicyError(
        f"the header {TOKEN_FORM_HEADER} must be one of {', '.join(TOKEN_FORMS)}, not {asked!r}",
        code="invalid_value",
        param=TOKEN_FORM_HEADER,
    )


def _stream_options(body: dict[str, Any], known: str) -> dict[str, Any]:
    """Take the options out of the body of a request that is streamed."""
    if not body.get("stream") or body.get("stream_options") is None:
        return {}
    options = body.pop("stream_options")
    if not isinstance(options, dict):
        raise PolicyError("stream_options must be an object", code="invalid_value", param="stream_options")
    for name, value in options.items():
        if name != known and value is not None:
            raise refuse(f"stream_options.{name}", f"the stream option {name!r} is not supported here")
    return options


_RESPONSES = _Route("responses", _read_responses, Response.in_form, None)
_CHAT = _Route("chat/completions", _read_chat, lambda response, _: chat_completion(response), "item")


async def _answer(http: web.Request, route: _Route) -> web.StreamResponse:
    policy = http.app[POLICY]
    rollout_id = http.match_info.get("rollout_id")
    capture = None if rollout_id is None else http.app[CAPTURES].get(rollout_id)
    with recording(capture, route.name) as record:
        default: TokenForm = http.app[DEFAULT_FORM]
        form = _form(http, route.default_form or default)
        asked = route.read(await read_body(http), policy.name, form)
        record.asked(asked.request)
        if capture is not None and capture.ended:
            raise ended_error()
        record.call = asyncio.ensure_future(
            policy.respond(
                asked.request,
                scope=rollout_id or "",
                inherit=asked.form == "compact",
                response_id=asked.events.response_id if asked.events is not None else None,
            )
        )
        try:
            if asked.events is not None:
                return await _stream(http, asked.events, record.call, record)
            response = await _result(record.call, capture)
        finally:
            await _stop(record.call)
        record.answered(response)
        return json_response(route.write(response, asked.form))


async def _stream(
    http: web.Request, events: Events, call: asyncio.Future[Response], record: CallRecord
) -> web.StreamResponse:
    await asyncio.wait({call}, timeout=_REFUSAL_S)
    if call.done():
        await _result(call, record.capture)  # a refusal is raised, and answered as such
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        await stream.prepare(http)
        await stream.write(events.opening())
        while not call.done():
            await asyncio.wait({call}, timeout=http.app[KEEP_ALIVE_S])
            if not call.done():
                await stream.write(KEEP_ALIVE)
        await stream.write(await _ending(events, call, record))
        await stream.write_eof()
    except ConnectionError:  # the client is gone; without effect if the call was over before
        record.cancelled()
    return stream


async def _ending(events: Events, call: asyncio.Future[Response], record: CallRecord) -> bytes:
    """Return the rest of a stream, whose head is out: a failure is an event now."""
    try:
        response = await _result(call, record.capture)
        rest = events.closing(response)
    except Exception as error:
        problem = problem_of(error)
        if problem.status >= 500:
            _log.exception("a streamed model call failed")
        if record.capture is not None and record.capture.ended:
            record.cancelled()
        else:
            record.went_wrong(problem)
        return events.failure(problem)
    record.answered(response)
    return rest


async def _result(call: asyncio.Future[Response], capture: Capture | None) -> Response:
    """Wait for the response; the end of its capture is an error that the agent reads."""
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if capture is not None and capture.ended and call.cancelled() and not (task and task.cancelling()):
            raise ended_error() from None
        raise


async def _stop(call: asyncio.Future[Response]) -> None:
    """End a call that nobody waits for any more."""
    if not call.done():
        call.cancel()
        await asyncio.wait({call})
