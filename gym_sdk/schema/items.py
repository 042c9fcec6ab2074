"""Responses API items and their content parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, TypeAdapter

from gym_sdk.schema.base import TokenFields, WireModel

__all__ = [
    "ContentPart",
    "CustomToolCall",
    "CustomToolCallOutput",
    "FunctionCall",
    "FunctionCallOutput",
    "InputText",
    "Item",
    "ItemReference",
    "Message",
    "OutputText",
    "Reasoning",
    "Refusal",
    "TextPart",
    "UnknownItem",
    "UnknownPart",
    "as_items",
    "output_text",
    "text_of",
]

_TYPE = frozenset({"type"})


class OutputText(WireModel):
    """Text that the policy wrote."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"type", "annotations"})
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] | None = None


class InputText(WireModel):
    """Text given to the policy."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["input_text"] = "input_text"
    text: str


class TextPart(WireModel):
    """Text inside a reasoning item: a step (`reasoning_text`) or a summary (`summary_text`)."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["reasoning_text", "summary_text", "text"] = "reasoning_text"
    text: str


class Refusal(WireModel):
    """The policy declined, in words."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["refusal"] = "refusal"
    refusal: str


class UnknownPart(WireModel):
    """A content part of a type that this version does not model; kept as it came."""

    type: str


_PART_TAGS = {
    "output_text": "output_text",
    "input_text": "input_text",
    "reasoning_text": "text",
    "summary_text": "text",
    "text": "text",
    "refusal": "refusal",
}


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return _PART_TAGS.get(kind, "unknown") if isinstance(kind, str) else "unknown"


ContentPart: TypeAlias = Annotated[
    Annotated[OutputText, Tag("output_text")]
    | Annotated[InputText, Tag("input_text")]
    | Annotated[TextPart, Tag("text")]
    | Annotated[Refusal, Tag("refusal")]
    | Annotated[UnknownPart, Tag("unknown")],
    Discriminator(_part_tag),
]


class Message(TokenFields):
    """A message: what a user, a developer, the system or the policy said."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        """The text of all parts, joined."""
        return text_of(self.content)


class Reasoning(TokenFields):
    """What the policy thought before it answered."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"type", "summary"})
    type: Literal["reasoning"] = "reasoning"
    id: str | None = None
    summary: list[ContentPart] = Field(default_factory=list)
    content: list[ContentPart] | None = None
    encrypted_content: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        """The text of the content, or of the summary if there is no content."""
        return text_of(self.content if self.content else self.summary)


class FunctionCall(TokenFields):
    """The policy calls a function tool.

    Attributes:
        arguments: JSON text exactly as the policy wrote it; it may be malformed.
    """

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutput(TokenFields):
    """What a function tool returned."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["function_call_output"] = "function_call_output"
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        """The text of the output."""
        return text_of(self.output)


class CustomToolCall(TokenFields):
    """The policy calls a custom tool, whose input is free text."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["custom_tool_call"] = "custom_tool_call"
    call_id: str
    name: str
    input: str
    id: str | None = None
    status: str | None = None


class CustomToolCallOutput(TokenFields):
    """What a custom tool returned."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["custom_tool_call_output"] = "custom_tool_call_output"
    call_id: str
    output: str | list[ContentPart]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        """The text of the output."""
        return text_of(self.output)


class ItemReference(TokenFields):
    """Stands for an item that the server remembers."""

    always_sent: ClassVar[frozenset[str]] = _TYPE
    type: Literal["item_reference"] = "item_reference"
    id: str


class UnknownItem(TokenFields):
    """An item of a type that this version does not model; kept as it came."""

    type: str


_ITEM_TAGS = {
    "message": Message,
    "reasoning": Reasoning,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "custom_tool_call": CustomToolCall,
    "custom_tool_call_output": CustomToolCallOutput,
    "item_reference": ItemReference,
}


def _item_tag(value: Any) -> str | None:
    if isinstance(value, Mapping):
        kind = value.get("type")
        if kind is None and "role" in value:
            return "message"
        if kind is None and "id" in value:
            return "item_reference"
    else:
        kind = getattr(value, "type", None)
    if not isinstance(kind, str):
        return None
    return kind if kind in _ITEM_TAGS else "unknown"


Item: TypeAlias = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[CustomToolCall, Tag("custom_tool_call")]
    | Annotated[CustomToolCallOutput, Tag("custom_tool_call_output")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[UnknownItem, Tag("unknown")],
    Discriminator(
        _item_tag,
        custom_error_type="item_type",
        custom_error_message="an item needs a `type` (or a `role`, if it is a message)",
    ),
]

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


def as_items(value: str | Iterable[Any]) -> list[Item]:
    """Turn what a user writes into items: a prompt, item objects, or dicts in the API's shape.

    Raises:
        pydantic.ValidationError: an entry is not an item.
    """
    if isinstance(value, str):
        return [Message(role="user", content=value)]
    return _ITEMS.validate_python(
        [entry if isinstance(entry, WireModel | Mapping) else _to_dict(entry) for entry in value]
    )


def _to_dict(value: Any) -> Any:
    """Accept the openai package's item objects without importing it."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json", exclude_unset=True, by_alias=True) if callable(dump) else value


def text_of(content: str | Iterable[Any]) -> str:
    """Join the text of content parts; parts without text add nothing."""
    if isinstance(content, str):
        return content
    texts = (getattr(part, "text", None) or getattr(part, "refusal", None) for part in content)
    return "".join(text for text in texts if isinstance(text, str))


def output_text(items: Iterable[Any]) -> str:
    """Join the text of the assistant messages among the items."""
    return "".join(item.text for item in items if isinstance(item, Message) and item.role == "assistant")
