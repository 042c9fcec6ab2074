"""Responses as a chat completion, one choice for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backends.server.surfaces.completion_object import ending_of, fingerprint, text_parts, usage_of
from gym_sdk.schema import (
    CustomToolCall,
    FunctionCall,
    Message,
    Reasoning,
    Response,
    tokens_to_wire,
)

__all__ = [
    "Shown",
    "call_to_wire",
    "chat_completion",
    "completion_head",
    "shown_log_probs",
    "shown_token_ids",
]


@dataclass(frozen=True, slots=True)
class Shown:
    """What choices show of their tokens, beside the fields of the token contract.

    Attributes:
        log_probs: whether they carry log-probs.
        as_ids: vLLM's `return_tokens_as_token_ids`: the log-probs are those of all sampled tokens, thinking,
            calls and stop token included, each named `token_id:N`.
        token_ids: vLLM's `return_token_ids`: the ids under vLLM's names, too.
    """

    log_probs: bool = False
    as_ids: bool = False
    token_ids: bool = False


def chat_completion(responses: Sequence[Response], shown: Shown | None = None) -> dict[str, Any]:
    """Return the completion; each choice's token fields sit on its message.

    Args:
        responses: to the requests of the choices, in order.
        shown: what else the choices show of their tokens.
    """
    shown = shown or Shown()
    tokens = responses[0].tokens
    prompt = {"prompt_token_ids": tokens.prompt_token_ids} if shown.token_ids and tokens is not None else {}
    return {
        **completion_head(responses[0], "chat.completion"),
        **prompt,
        "system_fingerprint": fingerprint(responses[-1]),
        "choices": [
            {
                "index": index,
                "message": _message(response),
                "logprobs": shown_log_probs(response, shown),
                **ending_of(response),
                **shown_token_ids(response, shown),
            }
            for index, response in enumerate(responses)
        ],
        "usage": usage_of(responses, choices=len(responses)),
    }


def completion_head(response: Response, kind: str) -> dict[str, Any]:
    """Return what a completion and each chunk of its stream begin with."""
    return {
        "id": response.id.replace("resp_", "chatcmpl-", 1),
        "object": kind,
        "created": int(response.created_at),
        "model": response.model,
        "service_tier": response.service_tier,
    }


def call_to_wire(item: FunctionCall | CustomToolCall) -> dict[str, Any]:
    """Return a tool call as chat completions have it."""
    if isinstance(item, CustomToolCall):
        inner = {"name": item.name, "input": item.input}
        return {"id": item.call_id, "type": "custom", "custom": inner}
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _message(response: Response) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    text = "".join(item.text for item in response.output if isinstance(item, Message))
    thought = "".join(item.text for item in response.output if isinstance(item, Reasoning))
    calls = [
        call_to_wire(item) for item in response.output if isinstance(item, FunctionCall | CustomToolCall)
    ]
    if text or not calls:
        message["content"] = text
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if response.tokens is not None:
        message |= tokens_to_wire(response.tokens)
    return message


def shown_log_probs(response: Response, shown: Shown) -> dict[str, Any] | None:
    """Return the log-probs of a choice, as they are to be shown; None if they are not."""
    if not shown.log_probs:
        return None
    if not shown.as_ids or response.tokens is None:
        entries = [entry for part in text_parts(response) for entry in part.logprobs or ()]
        return {"content": entries, "refusal": None}
    tokens = response.tokens
    scored = zip(tokens.generation_token_ids, tokens.generation_log_probs, strict=True)
    content: list[dict[str, Any]] = [
        {"token": f"token_id:{token_id}", "bytes": None, "logprob": log_prob, "top_logprobs": []}
        for token_id, log_prob in scored
    ]
    return {"content": content, "refusal": None}


def shown_token_ids(response: Response, shown: Shown) -> dict[str, Any]:
    """Return a choice's sampled ids under vLLM's name, if they are to be shown so."""
    if not shown.token_ids or response.tokens is None:
        return {}
    return {"token_ids": response.tokens.generation_token_ids}
