"""What the scripted server says: a call of `add(2, 3)`, then the message with the sum."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_NUMBER = "0123456789abcdef"
"""Stands in an answer where its number goes, which has as many digits."""
_EXTENDED = "fedcba9876543210"
"""Stands where the number of the response goes that is extended."""

ARGUMENTS = '{"a": 2, "b": 3}'
TEXT = "It is 5."
PROMPT, NEW, GENERATED = 120, 20, 16
"""Tokens: of the first prompt, that the second prompt adds, of each generation."""


@dataclass(frozen=True)
class Answer:
    """The two answers of one route.

    Attributes:
        call: to a request without a tool's output, up to the places for numbers.
        text: to one with it.
        marker: stands in requests with a tool's output.
    """

    call: bytes
    text: bytes
    marker: bytes

    @classmethod
    def of(cls, call: dict[str, Any], text: dict[str, Any], marker: bytes) -> Answer:
        """Return the answers as HTTP."""
        return cls(*(cls.http(json.dumps(body).encode()) for body in (call, text)), marker)

    def data(self, number: int, body: bytes) -> bytes:
        """Return what to send."""
        digits = b"%016x" % number
        if self.marker not in body:
            return self.call.replace(_NUMBER.encode(), digits)
        data = self.text.replace(_NUMBER.encode(), digits)
        start = body.find(b'"previous_response_id":"resp_')
        return data.replace(_EXTENDED.encode(), body[start + 29 : start + 45]) if start >= 0 else data

    @staticmethod
    def http(body: bytes) -> bytes:
        """Return the body with its head."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        return head % len(body) + body


def _usage(prompt: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "output_tokens": GENERATED,
        "total_tokens": prompt + GENERATED,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _response(item: dict[str, Any], prompt: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"resp_{_NUMBER}",
        "object": "response",
        "created_at": 1763000000.0,
        "completed_at": 1763000001.0,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "policy",
        "output": [{**item, "status": "completed"}],
        "usage": _usage(prompt),
        **more,
    }


def _delta(extends: str | None, new: int) -> dict[str, Any]:
    """Return tokens in the `compact` form."""
    return {
        "extends": extends,
        "new_prompt_token_ids": list(range(1000, 1000 + new)),
        "generation_token_ids": list(range(2000, 2000 + GENERATED)),
        "generation_log_probs": [-0.1234567890123 * position for position in range(1, GENERATED + 1)],
        "weight_versions": [{"version": "step-000001", "start": 0, "end": GENERATED}],
    }


def _chat(message: dict[str, Any], reason: str, prompt: int) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{_NUMBER}",
        "object": "chat.completion",
        "created": 1763000000,
        "model": "policy",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": GENERATED,
            "total_tokens": prompt + GENERATED,
        },
    }


def _answers() -> dict[tuple[bytes, bool], Answer]:
    function = {"name": "add", "arguments": ARGUMENTS}
    call = {"type": "function_call", "id": f"fc_{_NUMBER}", "call_id": f"call_{_NUMBER}", **function}
    content = [{"type": "output_text", "text": TEXT, "annotations": []}]
    text = {"type": "message", "role": "assistant", "id": f"msg_{_NUMBER}", "content": content}
    second = PROMPT + GENERATED + NEW
    plain = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
    chat_call = {"id": f"call_{_NUMBER}", "type": "function", "function": function}
    chat = Answer.of(
        _chat({"content": None, "tool_calls": [chat_call]}, "tool_calls", PROMPT),
        _chat({"content": TEXT}, "stop", second),
        b'"tool_call_id"',
    )
    marker = b'"function_call_output"'
    compact = Answer.of(
        _response(call, PROMPT, token_delta=_delta(None, PROMPT)),
        _response(text, second, token_delta=_delta(f"resp_{_EXTENDED}", NEW)),
        marker,
    )
    return {
        (b"/v1/responses", True): compact,
        (b"/v1/responses", False): Answer.of(
            _response(call, PROMPT, **plain), _response(text, second, **plain), marker
        ),
        (b"/v1/chat/completions", False): chat,
        (b"/v1/chat/completions", True): chat,
    }


ANSWERS = _answers()
"""The answers, by route and whether the compact form of tokens is asked for."""
