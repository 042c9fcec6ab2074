"""The bodies of Anthropic's Messages API, as its own package types them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gym_sdk.errors import PolicyError

__all__ = [
    "Block",
    "MessageIn",
    "MessagesRequest",
    "PromptRequest",
    "RedactedThinkingBlock",
    "TextBlock",
    "ThinkingBlock",
    "ToolChoice",
    "ToolIn",
    "ToolResultBlock",
    "ToolUseBlock",
    "read_as",
]


def _refused(value: Any) -> Any:
    if value is None or value in ([], {}, False, {"type": "direct"}, ["direct"]):
        return value
    raise PydanticCustomError("unsupported", "this server cannot do that")


_Refused: TypeAlias = Annotated[Any, AfterValidator(_refused)]
"""A field that only values can be honoured of which say what happens anyway."""

_CacheControl: TypeAlias = dict[str, Any] | None
"""Accepted everywhere. It means nothing: prefixes are cached without being asked for."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class TextBlock(_Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: _CacheControl = None
    citations: _Refused = None


class ThinkingBlock(_Body):
    """What the policy thought; the signature says that nobody changed it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class RedactedThinkingBlock(_Body):
    """What the policy thought, sealed."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Body):
    """The policy calls a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: _CacheControl = None
    caller: _Refused = None
    toolset_name: _Refused = None


def _foreign(what: str) -> tuple[BeforeValidator, WithJsonSchema, Tag]:
    """Return what makes of a type one that stands for all others, which are refused."""

    def refuse(value: Mapping[str, Any]) -> NoReturn:
        raise PydanticCustomError(
            "unsupported",
            "{what} of type '{kind}' cannot be used here: the policy reads and writes text, and the agent "
            "runs all tools",
            {"what": what, "kind": value["type"]},
        )

    return BeforeValidator(refuse), WithJsonSchema({"not": {}}), Tag("<other>")


def _tagged(*kinds: str, default: str | None = None) -> Discriminator:
    """Tell objects apart by their type. Tags stand in `<>`, which tells them from fields in error paths."""

    def tag(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return None
        kind = value.get("type")
        kind = default if kind is None else kind
        return (f"<{kind}>" if kind in kinds else "<other>") if isinstance(kind, str) else None

    return Discriminator(
        tag, custom_error_type="block_type", custom_error_message="must be an object with a `type`"
    )


def _as_blocks(value: Any) -> Any:
    """Read text as the one block that it is short for."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_TextOnly: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[TextBlock, *_foreign("content")], _tagged("text")
]
_Texts: TypeAlias = Annotated[
    list[_TextOnly], BeforeValidator(_as_blocks, json_schema_input_type=str | list[_TextOnly])
]


class ToolResultBlock(_Body):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: _Texts = Field(default_factory=list)
    is_error: bool | None = None
    cache_control: _CacheControl = None
    toolset_name: _Refused = None


Block: TypeAlias = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock

_AnyBlock: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[TextBlock, *_foreign("content")],
    _tagged("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
_Blocks: TypeAlias = Annotated[
    list[_AnyBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[_AnyBlock])
]


class MessageIn(_Body):
    """One message of the history. The policy's own may carry their tokens, as they came."""

    role: Literal["user", "assistant", "system"]
    content: _Blocks
    prompt_token_ids: list[int] | None = None
    generation_token_ids: list[int] | None = None
    generation_log_probs: list[float] | None = None
    weight_versions: list[dict[str, Any]] | None = None


class ToolIn(_Body):
    """A tool that the agent runs."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=128)
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    cache_control: _CacheControl = None
    eager_input_streaming: bool | None = None
    """Means nothing: a call's input is sent when it is whole."""
    allowed_callers: _Refused = None
    defer_loading: _Refused = None
    input_examples: _Refused = None


_Tool: TypeAlias = Annotated[
    Annotated[ToolIn, Tag("<custom>")] | Annotated[ToolIn, *_foreign("a tool")],
    _tagged("custom", default="custom"),
]


class ToolChoice(_Body):
    """Whether and which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("tool_choice", "`name` goes with the type `tool`, and with no other")
        return self


class Thinking(_Body):
    """Whether the policy thinks before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _budgeted(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise PydanticCustomError(
                "thinking", "`budget_tokens` goes with the type `enabled`, and with no other"
            )
        return self


class JsonFormat(_Body):
    """What the answer's text must be."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Body):
    """How the answer shall be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class PromptRequest(_Body):
    """The body of `POST /v1/messages/count_tokens`: what a prompt is made from."""

    model: str
    messages: list[MessageIn] = Field(min_length=1)
    system: _Texts | None = None
    tools: list[_Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: _CacheControl = None
    speed: Literal["standard"] | None = None
    context_management: _Refused = None
    chat_template_kwargs: dict[str, Any] | None = None
    """An extension: settings of the chat template."""


class Metadata(_Body):
    """Who asks."""

    user_id: str | None = None


class MessagesRequest(PromptRequest):
    """The body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=1.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    stream: bool | None = None
    container: _Refused = None
    diagnostics: _Refused = None
    inference_geo: _Refused = None
    seed: int | None = None
    """An extension: makes the sampling repeatable."""

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise PydanticCustomError(
                "budget",
                "`max_tokens` must be greater than `thinking.budget_tokens`, which is a part of it",
            )
        return self


_Request = TypeVar("_Request", bound=PromptRequest)


def read_as(kind: type[_Request], body: Mapping[str, Any]) -> _Request:
    """Read a body.

    Raises:
        PolicyError: it is none; the message begins with the field's path in Anthropic's way of writing it.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("<"))
        unsupported = detail["type"] in ("unsupported", "extra_forbidden")
        raise PolicyError(
            f"{path}: {detail['msg']}" if path else detail["msg"],
            code="unsupported_parameter" if unsupported else "invalid_value",
            param=path or None,
        ) from error
