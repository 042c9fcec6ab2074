"""Requests and responses of `POST /v1/responses`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from gym_sdk.schema.base import TokenFields, WireModel
from gym_sdk.schema.items import Item, output_text
from gym_sdk.tokens import CallTokens

__all__ = [
    "FunctionTool",
    "IncompleteDetails",
    "Response",
    "ResponseError",
    "ResponseRequest",
    "Usage",
]


class FunctionTool(WireModel):
    """A function that the policy may call.

    Attributes:
        parameters: JSON schema of the arguments.
        strict: whether the arguments must match the schema exactly.
    """

    always_sent: ClassVar[frozenset[str]] = frozenset({"type", "parameters", "strict"})
    type: Literal["function"] = "function"
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseRequest(WireModel):
    """The body of `POST /v1/responses`. Fields that are not listed are kept in `model_extra`."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    tools: list[FunctionTool | dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    max_output_tokens: int | None = Field(default=None, ge=1)
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    # extensions beyond OpenAI's fields
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class InputTokensDetails(WireModel):
    """How the prompt's tokens were served."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"cached_tokens", "cache_write_tokens"})
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(WireModel):
    """What the generated tokens were spent on."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"reasoning_tokens"})
    reasoning_tokens: int = 0


class Usage(WireModel):
    """Token counts of one response."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"input_tokens_details", "output_tokens_details"})
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails = Field(default_factory=InputTokensDetails)
    output_tokens_details: OutputTokensDetails = Field(default_factory=OutputTokensDetails)


class ResponseError(WireModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(WireModel):
    """Why a response stopped early: `max_output_tokens` or `content_filter`."""

    reason: str | None = None


class Response(WireModel):
    """The result of one model call."""

    always_sent: ClassVar[frozenset[str]] = frozenset(
        {
            "object",
            "status",
            "error",
            "incomplete_details",
            "instructions",
            "metadata",
            "parallel_tool_calls",
            "temperature",
            "tool_choice",
            "tools",
            "top_p",
        }
    )
    id: str
    object: Literal["response"] = "response"
    created_at: float
    model: str
    status: Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"] = "completed"
    output: list[Item]
    usage: Usage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | list[Item] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    temperature: float | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[FunctionTool | dict[str, Any]] = Field(default_factory=list)
    top_p: float | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    # extensions beyond OpenAI's fields
    fork: str | None = None
    """Why the prompt did not extend the newest model call of its history, if it did not."""
    unparsed_calls: int = 0
    """Pieces of tool-call markup that did not parse and stayed text."""

    @property
    def output_text(self) -> str:
        """The text of the assistant messages in the output."""
        return output_text(self.output)

    @property
    def tokens(self) -> CallTokens | None:
        """The tokens of this model call, from the last output item that carries them."""
        for item in reversed(self.output):
            if isinstance(item, TokenFields) and item.tokens is not None:
                return item.tokens
        return None
