"""The body of `POST /v1/chat/completions` as Responses requests, one for each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from backends.requests import LOG_PROBS, invalid, refuse
from backends.server.errors import validation_error
from backends.server.surfaces.chat_completion import Shown
from backends.server.surfaces.chat_messages import ChatMessages
from backends.server.surfaces.chat_words import ChatWords
from backends.server.surfaces.fields import FieldReader
from backends.server.surfaces.surface import stream_options
from gym_sdk.schema import ResponseRequest

__all__ = ["MAX_CHOICES", "ChatRequest", "read_choices", "read_stream_options"]

MAX_CHOICES = 128
"""The most choices of one request, as OpenAI has it."""

_SAME_FIELDS = (
    *("model", "temperature", "top_p", "top_k", "stop", "metadata", "parallel_tool_calls", "user"),
    *("service_tier", "safety_identifier", "prompt_cache_key", "chat_template_kwargs"),
    # the core knows which of their values say what happens anyway
    *("frequency_penalty", "presence_penalty", "prompt_cache_retention", "prompt_cache_options"),
)
_OWN_FIELDS = (
    *("messages", "tools", "tool_choice", "response_format", "reasoning_effort", "verbosity"),
    *("max_completion_tokens", "max_tokens", "logprobs", "top_logprobs", "n", "seed", "store"),
    *("stream", "stream_options", "return_tokens_as_token_ids", "return_token_ids"),
)
_NEUTRAL: Mapping[str, Any] = {"logit_bias": {}, "modalities": ["text"]}
_WHY = {
    "functions": "`functions` is no more; send `tools`",
    "function_call": "`function_call` is no more; send `tool_choice`",
    "logit_bias": "tokens cannot be made likelier here: the log-probs would not be the policy's",
    "modalities": "this model reads and writes only text",
    "audio": "this model reads and writes only text",
    "prediction": "a predicted output would not make anything faster here",
    "web_search_options": "there is no search here; offer it as a tool",
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that was read.

    Attributes:
        choices: what is asked for each of them; they differ in the seed.
        streams: whether the answer is streamed.
        include_usage: whether a stream ends with the usage.
        shown: what the choices show of their tokens.
        words: puts errors about it in the chat's words.
    """

    choices: Sequence[ResponseRequest]
    streams: bool
    include_usage: bool
    shown: Shown
    words: ChatWords

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ChatRequest:
        """Read a body.

        Raises:
            PolicyError: it asks for what cannot be done; `param` names the field.
        """
        fields = FieldReader(body)
        _check_fields(body)
        streams = bool(fields.flag("stream"))
        options = read_stream_options(body, streams=streams)
        messages = ChatMessages(fields.get("messages"))
        tools = fields.entries("tools")
        choice = fields.get("tool_choice")
        limit, limit_name = _limit(fields)
        words = ChatWords(
            messages.origins,
            [_kind(tool) for tool in tools],
            _kind(choice),
            _allowed_kinds(choice),
            limit_name,
        )
        shown = _shown(fields)
        asked: dict[str, Any] = {name: body[name] for name in _SAME_FIELDS if name in body}
        asked |= {
            "input": messages.items,
            "max_output_tokens": limit,
            "tools": [_flat(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None,
            "tool_choice": _tool_choice(choice),
            "reasoning": {"effort": body["reasoning_effort"]} if fields.get("reasoning_effort") else None,
            "text": _text_options(fields),
            "include": [LOG_PROBS] if shown.log_probs and not shown.as_ids else None,
            "top_logprobs": _top_log_probs(fields, shown),
            "seed": fields.get("seed"),
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            request = ResponseRequest.model_validate(asked)
        except ValidationError as error:
            raise words(validation_error(error)) from error
        choices = read_choices(fields, request)
        return cls(choices, streams, bool(options.get("include_usage")), shown, words)


def read_stream_options(body: Mapping[str, Any], *, streams: bool) -> dict[str, Any]:
    """Return the options of a stream.

    Raises:
        PolicyError: there are others than `include_usage`, or there is no stream.
    """
    if body.get("stream_options") is not None and not streams:
        raise invalid("stream_options", "goes only with `stream: true`")
    options = stream_options(dict(body), "include_usage", "include_obfuscation")
    if options.get("include_obfuscation"):
        raise refuse("stream_options.include_obfuscation", "streams are not obfuscated here")
    return options


def read_choices(fields: FieldReader, request: ResponseRequest) -> list[ResponseRequest]:
    """Return a request for each of the `n` choices, each with a seed of its own if there is one.

    Raises:
        PolicyError: `n` is none that can be made.
    """
    count = fields.whole("n", 1, MAX_CHOICES) or 1
    if request.seed is None:
        return [request] * count
    return [request.model_copy(update={"seed": request.seed + choice}) for choice in range(count)]


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _SAME_FIELDS or name in _OWN_FIELDS or value is None or value == _NEUTRAL.get(name):
            continue
        raise refuse(name, _WHY.get(name, f"the parameter {name!r} is not supported by this server"))
    if body.get("store"):
        raise refuse("store", "completions are not stored here, and nothing would list them")


def _limit(fields: FieldReader) -> tuple[Any, str]:
    """Return the most tokens, and the field that says so."""
    newer, older = fields.get("max_completion_tokens"), fields.get("max_tokens")
    if newer is None:
        return older, "max_tokens"
    if older is not None and older != newer:
        raise invalid("max_tokens", "is other than `max_completion_tokens`; send one of them")
    return newer, "max_completion_tokens"


def _shown(fields: FieldReader) -> Shown:
    shown = Shown(
        log_probs=bool(fields.flag("logprobs")),
        as_ids=bool(fields.flag("return_tokens_as_token_ids")),
        token_ids=bool(fields.flag("return_token_ids")),
    )
    if shown.as_ids and not shown.log_probs:
        raise invalid("return_tokens_as_token_ids", "goes only with `logprobs: true`")
    return shown


def _top_log_probs(fields: FieldReader, shown: Shown) -> Any:
    count = fields.whole("top_logprobs", 0, 20)
    if count and not shown.log_probs:
        raise invalid("top_logprobs", "goes only with `logprobs: true`")
    if count and shown.as_ids:
        raise refuse(
            "top_logprobs", "likelier tokens are not told by id; leave out return_tokens_as_token_ids"
        )
    return count


def _kind(entry: Any) -> str:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    return kind if isinstance(kind, str) else "function"


def _allowed_kinds(choice: Any) -> list[str]:
    allowed = choice.get("allowed_tools") if isinstance(choice, Mapping) else None
    tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
    return [_kind(tool) for tool in tools] if isinstance(tools, list) else []


def _flat(entry: Any, param: str) -> dict[str, Any]:
    """Return a tool, or the naming of one, as the Responses API has it: without the object inside."""
    fields = FieldReader(entry, param)
    kind = fields.text("type")
    if kind not in ("function", "custom"):
        raise refuse(f"{param}.type", f"only function and custom tools run here, not {kind!r}")
    fields.only({"type", kind})
    inner = dict(fields.inner(kind).items())
    form = inner.get("format")
    if isinstance(form, Mapping) and isinstance(form.get("grammar"), Mapping):
        inner["format"] = {"type": form.get("type"), **form["grammar"]}
    return {**inner, "type": kind}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "allowed_tools":
        return _flat(choice, "tool_choice")
    fields = FieldReader(choice, "tool_choice")
    fields.only({"type", "allowed_tools"})
    allowed = fields.inner("allowed_tools")
    allowed.only({"mode", "tools"})
    tools = [
        _flat(tool, f"{allowed.path('tools')}[{index}]")
        for index, tool in enumerate(allowed.entries("tools"))
    ]
    return {"type": "allowed_tools", "mode": allowed.text("mode"), "tools": tools}


def _text_options(fields: FieldReader) -> dict[str, Any] | None:
    options: dict[str, Any] = {}
    if fields.get("verbosity") is not None:
        options["verbosity"] = fields.get("verbosity")
    if fields.get("response_format") is not None:
        options["format"] = _format(fields.inner("response_format"))
    return options or None


def _format(fields: FieldReader) -> dict[str, Any]:
    kind = fields.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(fields.path("type"), f"must be `text`, `json_object` or `json_schema`, not {kind!r}")
    if kind != "json_schema":
        fields.only({"type"})
        return {"type": kind}
    fields.only({"type", "json_schema"})
    schema = fields.inner("json_schema")
    schema.only({"name", "schema", "strict", "description"})
    schema.text("name")
    return {"type": kind, **dict(schema.items())}
