"""The messages of a chat as items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from backends.ids import new_id
from backends.requests import invalid, refuse
from backends.server.errors import validation_error
from backends.server.surfaces.chat_words import Origin
from backends.server.surfaces.fields import FieldReader
from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    TOKEN_FIELDS,
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
    OutputText,
    Reasoning,
    Refusal,
    TextPart,
)

__all__ = ["ChatMessages"]

_THOUGHTS = ("reasoning_content", "reasoning")
"""What servers call the thinking; vLLM has called it both."""

_FIELDS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"content", "name"}),
    "developer": frozenset({"content", "name"}),
    "user": frozenset({"content", "name"}),
    # a tool's name says again what the call says
    "tool": frozenset({"content", "tool_call_id", "name"}),
    "assistant": frozenset(
        {
            *("content", "name", "refusal", "tool_calls", *_THOUGHTS, *TOKEN_FIELDS),
            # these say again what the content says; openai's helpers send them back
            *("annotations", "parsed"),
        }
    ),
}
_PART_FIELDS = frozenset({"type", "text", "refusal"})
_HINTS = frozenset({"prompt_cache_breakpoint", "cache_control"})
"""Fields of parts that say where a cached prompt may end; prompts are cached here wherever they are alike."""

_OUTPUT = {"output": "content", "call_id": "tool_call_id"}
_CALL = {"call_id": "id", "name": "function.name", "arguments": "function.arguments"}
_CUSTOM_CALL = {"call_id": "id", "name": "custom.name", "input": "custom.input"}


class ChatMessages:
    """Reads the messages of a request.

    Args:
        messages: as they came.

    Attributes:
        items: what they say, oldest first.
        origins: where each item comes from.

    Raises:
        PolicyError: one cannot be honoured; `param` names the field.
    """

    def __init__(self, messages: Any) -> None:
        self.items: list[Item] = []
        self.origins: list[Origin] = []
        self._custom_calls: set[str] = set()
        self._names: dict[str, str | None] = {}
        if not isinstance(messages, list) or not messages:
            raise invalid("messages", "must be a list of at least one message")
        for index, message in enumerate(messages):
            self._read(message, f"messages[{index}]")

    def _read(self, message: Any, param: str) -> None:
        fields = FieldReader(message, param)
        role = fields.text("role")
        if role == "function":
            raise refuse(f"{param}.role", "the role `function` is no more; send a `tool` message")
        if role not in _FIELDS:
            raise invalid(f"{param}.role", f"must be one of {', '.join(sorted(_FIELDS))}, not {role!r}")
        fields.only(_FIELDS[role] | {"role"})
        self._check_name(fields, role)
        if role == "tool":
            self._read_output(fields)
        elif role == "assistant":
            self._read_assistant(fields)
        else:
            item = Message.model_validate({"role": role, "content": _joined(fields)})
            self._add(item, Origin(param, param))

    def _check_name(self, fields: FieldReader, role: str) -> None:
        """Refuse names that tell participants apart, because no prompt shows them."""
        name = fields.optional_text("name")
        if role != "tool" and self._names.setdefault(role, name) != name:
            raise refuse(
                f"{fields.param}.name",
                f"{fields.param}: the model is not told names, so it could not tell the messages of role "
                f"{role!r} apart; write the name into the content",
            )

    def _read_output(self, fields: FieldReader) -> None:
        call_id = fields.text("tool_call_id")
        output = _joined(fields)
        origin = Origin(fields.param, fields.param, _OUTPUT)
        if call_id in self._custom_calls:
            self._add(CustomToolCallOutput(call_id=call_id, output=output), origin)
        else:
            self._add(FunctionCallOutput(call_id=call_id, output=output), origin)

    def _read_assistant(self, fields: FieldReader) -> None:
        param, first = fields.param, len(self.items)
        thoughts = {name: text for name in _THOUGHTS if (text := fields.optional_text(name))}
        if len(set(thoughts.values())) > 1:
            raise invalid(f"{param}.reasoning", "is other than `reasoning_content`; send one of them")
        for name, text in list(thoughts.items())[:1]:
            part = TextPart(type="reasoning_text", text=text)
            self._add(Reasoning(summary=[], content=[part]), Origin(param, param, {"content": name}))
        calls = fields.entries("tool_calls")
        content = _parts(fields)
        said = any(part.text if isinstance(part, OutputText) else part.refusal for part in content)
        if said or not (calls or thoughts):
            self._add(Message(role="assistant", content=_plain(content)), Origin(param, param))
        for number, call in enumerate(calls):
            self._read_call(FieldReader(call, f"{param}.tool_calls[{number}]"), param)
        self._carry(fields, first)

    def _read_call(self, fields: FieldReader, message: str) -> None:
        # the index stands in deltas, and clients that join them send it back
        fields.only({"id", "type", "function", "custom", "index"})
        kind = fields.optional_text("type") or "function"
        call_id = fields.optional_text("id") or new_id("call")
        if kind == "function":
            function = fields.inner("function")
            function.only({"name", "arguments", "parsed_arguments"})
            call = FunctionCall(
                call_id=call_id,
                name=function.text("name"),
                arguments=function.optional_text("arguments") or "",
            )
            self._add(call, Origin(message, fields.param, _CALL))
        elif kind == "custom":
            custom = fields.inner("custom")
            custom.only({"name", "input"})
            self._custom_calls.add(call_id)
            custom_call = CustomToolCall(
                call_id=call_id, name=custom.text("name"), input=custom.optional_text("input") or ""
            )
            self._add(custom_call, Origin(message, fields.param, _CUSTOM_CALL))
        else:
            raise refuse(f"{fields.param}.type", f"only function and custom tools run here, not {kind!r}")

    def _carry(self, fields: FieldReader, first: int) -> None:
        """Put a message's tokens on the last of its items."""
        tokens = {name: value for name in TOKEN_FIELDS if (value := fields.get(name)) is not None}
        if not tokens:
            return
        last = self.items[-1]
        try:
            self.items[-1] = type(last).model_validate({**last.to_wire(), **tokens})
        except ValidationError as error:
            wrong = validation_error(error)
            where = fields.path(wrong.param) if wrong.param else fields.param
            reason = str(wrong).partition(": ")[2]
            raise PolicyError(f"{where}: {reason}", code="invalid_value", param=where) from error

    def _add(self, item: Item, origin: Origin) -> None:
        self.items.append(item)
        self.origins.append(origin)


def _joined(fields: FieldReader) -> str:
    """Return the text of a message that is not the policy's."""
    parts = _parts(fields)
    for index, part in enumerate(parts):
        if isinstance(part, Refusal):
            raise invalid(f"{fields.param}.content[{index}].type", "may be `refusal` for assistants only")
    if fields.get("content") is None:
        raise invalid(f"{fields.param}.content", "is missing")
    return "".join(part.text for part in parts if isinstance(part, OutputText))


def _parts(fields: FieldReader) -> list[OutputText | Refusal]:
    content, refusal = fields.get("content"), fields.optional_text("refusal")
    parts: list[OutputText | Refusal] = []
    if isinstance(content, str):
        parts.append(OutputText(text=content))
    elif isinstance(content, list):
        parts += [
            _part(FieldReader(part, f"{fields.param}.content[{index}]")) for index, part in enumerate(content)
        ]
    elif content is not None:
        raise invalid(f"{fields.param}.content", "must be text or a list of parts")
    if refusal:
        parts.append(Refusal(refusal=refusal))
    return parts


def _part(fields: FieldReader) -> OutputText | Refusal:
    kind = fields.text("type")
    if kind not in ("text", "refusal"):
        raise refuse(
            f"{fields.param}.type",
            f"{fields.param} is of type {kind!r}; this model reads and writes only text",
        )
    fields.only(_PART_FIELDS | _HINTS)
    if kind == "text":
        return OutputText(text=fields.text("text"))
    return Refusal(refusal=fields.text("refusal"))


def _plain(parts: Sequence[OutputText | Refusal]) -> str | list[Any]:
    """Return what the policy said as text, unless it refused."""
    if any(isinstance(part, Refusal) for part in parts):
        return list(parts)
    return "".join(part.text for part in parts if isinstance(part, OutputText))
