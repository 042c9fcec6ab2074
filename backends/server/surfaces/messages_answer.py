"""A response as a message of Anthropic's API."""

from __future__ import annotations

from typing import Any

from backends.server.surfaces.messages_blocks import block_of
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response
from gym_sdk.schema.base import tokens_to_wire

__all__ = ["blank_message", "ending_of", "message_of", "usage_of"]


def message_of(response: Response, *, shows_thinking: bool = True) -> dict[str, Any]:
    """Turn a response into a message; the token fields sit on the message.

    Args:
        response: a whole one.
        shows_thinking: whether thinking is written out.

    Raises:
        PolicyError: the generation was aborted, for which the API has no stop reason.
    """
    blocks = [block_of(item, shows_thinking=shows_thinking) for item in response.output]
    content = [block for block in blocks if block is not None]
    return {
        **blank_message(response),
        "content": content,
        **ending_of(response, calls=any(block["type"] == "tool_use" for block in content)),
        "usage": usage_of(response),
    }


def blank_message(response: Response) -> dict[str, Any]:
    """Return a message as it is before anything of it is known."""
    return {
        "id": response.id.replace("resp_", "msg_", 1),
        "type": "message",
        "role": "assistant",
        "model": response.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_of(response),
    }


def ending_of(response: Response, *, calls: bool) -> dict[str, Any]:
    """Return why a message ended, with what the API does not have: its tokens, and what is odd about it.

    Args:
        response: a whole one.
        calls: whether the message calls tools.

    Raises:
        PolicyError: the generation was aborted.
    """
    fields: dict[str, Any] = {
        "stop_reason": _stop_reason(response, calls=calls),
        "stop_sequence": response.stop_sequence,
    }
    if response.tokens is not None:
        fields |= tokens_to_wire(response.tokens)
    if response.fork is not None:
        fields["fork"] = response.fork
    if response.unparsed_calls:
        fields["unparsed_calls"] = response.unparsed_calls
    return fields


def _stop_reason(response: Response, *, calls: bool) -> str:
    if response.status == "cancelled":
        raise PolicyError("the generation was aborted on the server", status=503, code="generation_aborted")
    if response.status == "incomplete":
        used = response.usage.output_tokens if response.usage is not None else 0
        limit = response.max_output_tokens
        cut = limit is None or used < limit
        return "model_context_window_exceeded" if cut else "max_tokens"
    if response.stop_sequence is not None:
        return "stop_sequence"
    return "tool_use" if calls else "end_turn"


def usage_of(response: Response) -> dict[str, Any]:
    """Return Anthropic's token counts: `input_tokens` are those that no cache had."""
    usage = response.usage
    counts: dict[str, Any] = {
        "input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }
    if usage is None:
        return counts
    cached = usage.input_tokens_details.cached_tokens
    return counts | {
        "input_tokens": usage.input_tokens - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.output_tokens_details.reasoning_tokens},
    }
