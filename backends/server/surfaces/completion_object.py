"""What chat completions and completions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from gym_sdk.schema import CustomToolCall, FunctionCall, Message, OutputText, Response

__all__ = ["DONE", "data_event", "ending_of", "fingerprint", "text_parts", "usage_of"]

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""

_FINISH = {"incomplete": "length", "cancelled": "abort"}


def data_event(value: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def fingerprint(response: Response) -> str | None:
    """Return the version of the weights that sampled a response's end."""
    tokens = response.tokens
    return tokens.weight_versions[-1].version if tokens is not None and tokens.weight_versions else None


def ending_of(response: Response) -> dict[str, Any]:
    """Return why a choice ended: `finish_reason`, and as `stop_reason` the stop string, as vLLM has it."""
    calls = any(isinstance(item, FunctionCall | CustomToolCall) for item in response.output)
    finish = _FINISH.get(response.status, "tool_calls" if calls else "stop")
    return {"finish_reason": finish, "stop_reason": response.stop_sequence}


def text_parts(response: Response) -> list[OutputText]:
    """Return the texts that the policy wrote."""
    return [
        part
        for item in response.output
        if isinstance(item, Message) and not isinstance(item.content, str)
        for part in item.content
        if isinstance(part, OutputText)
    ]


def usage_of(responses: Sequence[Response], *, choices: int) -> dict[str, Any]:
    """Return the usage: a prompt that choices share counts once.

    Args:
        responses: of all choices; those of one prompt stand together.
        choices: how many there are of each prompt.
    """
    usages = [response.usage for response in responses if response.usage is not None]
    prompt = sum(usage.input_tokens for usage in usages[::choices])
    generated = sum(usage.output_tokens for usage in usages)
    cached = sum(usage.input_tokens_details.cached_tokens for usage in usages[::choices])
    reasoning = sum(usage.output_tokens_details.reasoning_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
