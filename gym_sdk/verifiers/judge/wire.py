"""A judge's requests and answers in the two APIs that servers offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic_core import from_json

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.schema.items import Item, Message

__all__ = ["Answer", "Api", "JudgeUsage", "body_of", "path_of", "read_answer"]

Api: TypeAlias = Literal["responses", "chat"]


@dataclass(slots=True)
class JudgeUsage:
    """What a judge was used for so far, over all its verifiers."""

    judgements: int = 0
    """Answers that were read."""
    unreadable: int = 0
    """Answers that could not be read."""
    retries: int = 0
    """Requests that failed and were sent again."""
    input_tokens: int = 0
    """Of all answers, as far as the server reports them."""
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said."""

    text: str
    cut: bool
    """Whether it is not whole: it reached a limit, or a filter took it."""
    input_tokens: int
    output_tokens: int


def path_of(api: Api) -> str:
    """Return the route under the API's root."""
    return "/responses" if api == "responses" else "/chat/completions"


def body_of(
    api: Api, model: str, items: Sequence[Item], max_output_tokens: int | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a request's body; `fields` win over what stands there.

    Raises:
        ConfigurationError: Chat Completions cannot express an item.
    """
    body: dict[str, Any]
    if api == "responses":
        body = {"model": model, "input": [item.to_wire() for item in items], "store": False}
        limit = "max_output_tokens"
    else:
        body = {"model": model, "messages": [_chat_message(item) for item in items]}
        limit = "max_completion_tokens"
    if max_output_tokens is not None:
        body[limit] = max_output_tokens
    return body | dict(fields)


def _chat_message(item: Item) -> dict[str, str]:
    if not isinstance(item, Message):
        raise ConfigurationError(
            f"a judge over Chat Completions is asked by messages; an item of type {item.type!r} needs "
            'api="responses"'
        )
    # "developer" is younger than many servers
    return {"role": "system" if item.role == "developer" else item.role, "content": item.text}


def read_answer(api: Api, url: str, data: bytes) -> Answer:
    """Read the body of an answer.

    Raises:
        TransportError: it is not what the API defines; a proxy may have sent it, so it may be asked again.
    """
    try:
        body = from_json(data)
        return _read_response(body) if api == "responses" else _read_completion(body)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        text = data[:200].decode(errors="replace")
        raise TransportError(
            f"{url} answered with something else than a judgement: {text!r}", retryable=True
        ) from error


def _read_response(body: dict[str, Any]) -> Answer:
    if body.get("status") in ("failed", "cancelled"):
        raise ValueError("the response failed")
    texts = [_text(item["content"]) for item in body["output"] if item.get("type") == "message"]
    usage = body.get("usage") or {}
    return Answer(
        text="".join(texts),
        cut=body.get("status") == "incomplete",
        input_tokens=usage.get("input_tokens") or 0,
        output_tokens=usage.get("output_tokens") or 0,
    )


def _read_completion(body: dict[str, Any]) -> Answer:
    answer = body["choices"][0]
    usage = body.get("usage") or {}
    return Answer(
        text=_text(answer["message"].get("content") or ""),
        cut=answer.get("finish_reason") in ("length", "content_filter"),
        input_tokens=usage.get("prompt_tokens") or 0,
        output_tokens=usage.get("completion_tokens") or 0,
    )


def _text(content: str | list[dict[str, Any]]) -> str:
    """Join the text of a message's parts; what a judge thought or refused is no part of its answer."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") in ("output_text", "text"))
