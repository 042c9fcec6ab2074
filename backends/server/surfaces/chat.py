"""Chat Completions over the same policy: messages to items, a response to a completion."""

from __future__ import annotations

from typing import Any

from backends.ids import new_id
from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    TOKEN_FIELDS,
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
    Reasoning,
    Response,
    ResponseRequest,
    TextPart,
)
from gym_sdk.schema.base import tokens_to_wire

__all__ = ["chat_completion", "request_from_chat"]

_HARMLESS = frozenset({"safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

_SAME_FIELDS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "metadata",
    "parallel_tool_calls",
    "store",
    "stream",
    "user",
    "chat_template_kwargs",
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "stream_options": ({},),
}


def request_from_chat(body: dict[str, Any]) -> ResponseRequest:
    """Turn the body of `POST /v1/chat/completions` into a Responses request.

    Raises:
        PolicyError: a message or field cannot be honoured; `param` names it.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PolicyError("messages must be a list of at least one message", param="messages")
    items: list[Item] = []
    for index, message in enumerate(messages):
        items += _items_of(message, f"messages[{index}]")
    fields: dict[str, Any] = {name: body[name] for name in _SAME_FIELDS if body.get(name) is not None}
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is not None:
        fields["max_output_tokens"] = limit
    if body.get("tools"):
        fields["tools"] = [_tool(tool, f"tools[{n}]") for n, tool in enumerate(body["tools"])]
    if body.get("tool_choice") is not None:
        fields["tool_choice"] = body["tool_choice"]
    known = {*_SAME_FIELDS, "messages", "max_tokens", "max_completion_tokens", "tools", "tool_choice"}
    for name, value in body.items():
        if name in known or name in _HARMLESS or value is None or value in _NEUTRAL.get(name, ()):
            continue
        raise PolicyError(
            f"the parameter {name!r} is not supported by this server",
            code="unsupported_parameter",
            param=name,
        )
    return ResponseRequest.model_validate({"input": items, **fields})


def _items_of(message: Any, param: str) -> list[Item]:
    if not isinstance(message, dict):
        raise PolicyError(f"{param} must be an object", param=param)
    role = message.get("role")
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            raise PolicyError(f"{param}.tool_call_id is missing", param=f"{param}.tool_call_id")
        return [FunctionCallOutput(call_id=call_id, output=_text(message.get("content"), param))]
    if role in ("system", "developer", "user"):
        return [Message(role=role, content=_text(message.get("content"), param))]
    if role != "assistant":
        raise PolicyError(f"{param}.role {role!r} is not known", param=f"{param}.role")
    return _assistant_items(message, param)


def _assistant_items(message: dict[str, Any], param: str) -> list[Item]:
    items: list[Item] = []
    if message.get("reasoning_content"):
        part = TextPart(type="reasoning_text", text=message["reasoning_content"])
        items.append(Reasoning(summary=[], content=[part]))
    content = message.get("content")
    calls = message.get("tool_calls") or []
    if content or not calls:
        items.append(Message(role="assistant", content=_text(content, param)))
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            where = f"{param}.tool_calls[{number}]"
            raise PolicyError(f"{where} is not a function call", param=where)
        items.append(
            FunctionCall(
                call_id=call.get("id") or new_id("call"),
                name=function.get("name") or "",
                arguments=function.get("arguments") or "",
            )
        )
    tokens = {name: message[name] for name in TOKEN_FIELDS if message.get(name) is not None}
    if tokens:
        last = items[-1]
        items[-1] = type(last).model_validate({**last.to_wire(), **tokens})
    return items


def _text(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise PolicyError(f"{param}.content must be text; this server reads text only", param=f"{param}.content")


def _tool(tool: Any, param: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise PolicyError(f"{param} is not a function tool", param=param)
    return {"type": "function", **function}


def chat_completion(response: Response) -> dict[str, Any]:
    """Turn a response into a chat completion; the token fields sit on the message."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    text, thought, calls = "", "", []
    for item in response.output:
        if isinstance(item, Message):
            text += item.text
        elif isinstance(item, Reasoning):
            thought += item.text
        elif isinstance(item, FunctionCall):
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
    if text or not calls:
        message["content"] = text
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    if response.tokens is not None:
        message.update(tokens_to_wire(response.tokens))
    finish = {"incomplete": "length", "cancelled": "abort"}.get(
        response.status, "tool_calls" if calls else "stop"
    )
    usage = response.usage
    return {
        "id": response.id.replace("resp_", "chatcmpl-", 1),
        "object": "chat.completion",
        "created": int(response.created_at),
        "model": response.model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": None
        if usage is None
        else {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
        },
    }
