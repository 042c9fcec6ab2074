"""Anthropic's Messages API over the same policy: blocks to items, a response to a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from backends.server.errors import validation_error
from backends.server.surfaces.messages_answer import message_of
from backends.server.surfaces.messages_blocks import placed_items
from backends.server.surfaces.messages_body import MessagesRequest, PromptRequest, ToolChoice, read_as
from backends.server.surfaces.messages_events import MessagesEvents
from backends.server.surfaces.messages_words import MessagesWords
from backends.server.surfaces.surface import Asked
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionTool, ResponseRequest, TokenForm

__all__ = ["MessagesSurface", "prompt_request"]


class MessagesSurface:
    """Reads and writes Messages."""

    name = "messages"
    has_forms = False

    def read(self, body: dict[str, Any], *, model: str, form: TokenForm) -> Asked:
        """Read a request's body; see `Surface.read`."""
        asked = read_as(MessagesRequest, body)
        request, words = _responses_request(asked, _sampling(asked))
        shows = asked.thinking is None or asked.thinking.display != "omitted"
        return Asked(
            [request],
            lambda responses: message_of(responses[0], shows_thinking=shows),
            MessagesEvents(shows_thinking=shows) if asked.stream else None,
            worded=words,
        )


def prompt_request(body: Mapping[str, Any]) -> tuple[ResponseRequest, MessagesWords]:
    """Read the body of `POST /v1/messages/count_tokens`, and what puts errors about it in its words.

    Raises:
        PolicyError: it asks for what this server cannot do.
    """
    return _responses_request(read_as(PromptRequest, body), {})


def _responses_request(
    asked: PromptRequest, sampling: Mapping[str, Any]
) -> tuple[ResponseRequest, MessagesWords]:
    if asked.messages[-1].role == "assistant":
        raise PolicyError(
            "messages: the last one must be a user's: what the policy says cannot be begun for it here",
            code="unsupported_value",
            param="messages",
        )
    placed = placed_items(asked.messages)
    words = MessagesWords([entry.place for entry in placed])
    fields = {
        "model": asked.model,
        "input": [entry.item for entry in placed],
        "instructions": "".join(block.text for block in asked.system) if asked.system else None,
        "tools": [_function(tool) for tool in asked.tools] if asked.tools else None,
        "reasoning": _reasoning(asked),
        "text": _text(asked),
        "chat_template_kwargs": _settings(asked),
        **_choice(asked.tool_choice),
        **sampling,
    }
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        return ResponseRequest.model_validate(given), words
    except ValidationError as error:
        raise words(validation_error(error)) from error


def _sampling(asked: MessagesRequest) -> dict[str, Any]:
    return {
        "max_output_tokens": asked.max_tokens,
        "stop": asked.stop_sequences,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "seed": asked.seed,
        "user": asked.metadata.user_id if asked.metadata is not None else None,
    }


def _function(tool: Any) -> FunctionTool:
    return FunctionTool(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    named = {"type": "function", "name": choice.name}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "tool": named, "none": "none"}
    fields = {"tool_choice": kinds[choice.type]}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _reasoning(asked: PromptRequest) -> dict[str, Any] | None:
    """Return the effort that is asked for. A budget is a target in this API, and is not held here."""
    effort = asked.output_config.effort if asked.output_config is not None else None
    thinking = asked.thinking.type if asked.thinking is not None else None
    if thinking == "disabled":
        if effort is not None:
            raise PolicyError(
                "output_config.effort: effort is that of thinking here, and thinking is disabled",
                code="unsupported_parameter",
                param="output_config.effort",
            )
        return {"effort": "none"}
    return None if effort is None else {"effort": effort}


def _settings(asked: PromptRequest) -> dict[str, Any] | None:
    """Return the template's settings. Where thinking is allowed, the usual switches are on, if it has one."""
    allowed = asked.thinking is not None and asked.thinking.type != "disabled"
    switches = {"enable_thinking": True, "thinking": True} if allowed else {}
    return {**switches, **(asked.chat_template_kwargs or {})} or None


def _text(asked: PromptRequest) -> dict[str, Any] | None:
    form = asked.output_config.format if asked.output_config is not None else None
    if form is None:
        return None
    return {"format": {"type": "json_schema", "name": "answer", "schema": form.json_schema, "strict": True}}
