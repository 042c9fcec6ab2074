"""The request of `POST /v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from gym_sdk.schema.base import WireModel
from gym_sdk.schema.items import Item

__all__ = [
    "CustomTool",
    "FunctionTool",
    "ReasoningOptions",
    "ResponseRequest",
    "TextFormat",
    "TextOptions",
    "Tool",
]

_Name: TypeAlias = Annotated[StrictStr, Field(min_length=1, max_length=128)]


class FunctionTool(WireModel):
    """A function that the policy may call.

    Attributes:
        parameters: JSON schema of the arguments.
        strict: whether the arguments must match the schema exactly.
    """

    always_sent: ClassVar[frozenset[str]] = frozenset({"type", "parameters", "strict", "description"})
    type: Literal["function"] = "function"
    name: _Name
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None
    description: StrictStr | None = None


class CustomTool(WireModel):
    """A tool whose input is free text.

    Attributes:
        format: what the text must be; `{"type": "text"}` is anything.
    """

    always_sent: ClassVar[frozenset[str]] = frozenset({"type"})
    type: Literal["custom"] = "custom"
    name: _Name
    description: StrictStr | None = None
    format: dict[str, Any] | None = None


Tool: TypeAlias = FunctionTool | CustomTool | dict[str, Any]
"""A tool in a request; a dict is checked by the server."""


class TextFormat(WireModel):
    """What the answer's text must be.

    Attributes:
        type: `text` is anything, `json_object` any JSON object, `json_schema` what `schema` says.
        schema_: the JSON schema; `schema` on the wire.
    """

    always_sent: ClassVar[frozenset[str]] = frozenset({"type"})
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(WireModel):
    """How the answer's text shall be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(WireModel):
    """How much the policy shall think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(WireModel):
    """The body of `POST /v1/responses`. Fields that are not listed are kept in `model_extra`."""

    model: StrictStr | None = None
    input: StrictStr | list[Item] = Field(default_factory=list)
    instructions: StrictStr | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    max_tool_calls: StrictInt | None = Field(default=None, ge=1)
    temperature: StrictFloat | None = Field(default=None, ge=0.0, le=100.0)
    top_p: StrictFloat | None = Field(default=None, gt=0.0, le=1.0)
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    max_output_tokens: StrictInt | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[StrictStr] | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    stream: StrictBool | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    service_tier: StrictStr | None = None
    user: StrictStr | None = None
    # extensions beyond OpenAI's fields
    top_k: StrictInt | None = Field(default=None, ge=0, le=2**31 - 1)
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
