"""The response of `POST /v1/responses`, and the forms in which it carries tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, PrivateAttr

from gym_sdk.errors import TokenContractError
from gym_sdk.schema.base import TokenFields, WireModel, tokens_to_wire
from gym_sdk.schema.items import Item, output_text
from gym_sdk.schema.requests import ReasoningOptions, TextOptions, Tool
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = [
    "TOKEN_FORMS",
    "TOKEN_FORM_HEADER",
    "IncompleteDetails",
    "Response",
    "ResponseError",
    "TokenDelta",
    "TokenForm",
    "Usage",
]

TokenForm: TypeAlias = Literal["item", "response", "compact"]
"""Where the tokens of a model call stand in a response.

`item`: whole, on the last output item (NeMo Gym's form). `response`: whole, on the response. `compact`: on
the response, as a `TokenDelta`; the response does not repeat what was asked, and a request that
continues another by `previous_response_id` takes over its instructions, tools and template settings unless it
sends its own.
"""

TOKEN_FORMS: tuple[TokenForm, ...] = ("item", "response", "compact")

TOKEN_FORM_HEADER = "Gym-Token-Form"
"""The HTTP header by which a request chooses the form."""


_ASKED = (
    *("instructions", "tools", "tool_choice", "parallel_tool_calls", "max_tool_calls", "metadata", "text"),
    *("reasoning", "temperature", "top_p", "top_logprobs", "presence_penalty", "frequency_penalty"),
    *("max_output_tokens", "truncation", "store", "background", "service_tier", "prompt_cache_key"),
    *("safety_identifier", "user"),
)
"""Fields that say what was asked, which whoever asks for the compact form knows."""


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


class TokenDelta(WireModel):
    """The tokens of a model call without those that the other side has seen: the `compact` form."""

    always_sent: ClassVar[frozenset[str]] = frozenset({"extends"})
    extends: str | None = None
    """The response with whose tokens the prompt begins; None if `new_prompt_token_ids` is all of it."""
    new_prompt_token_ids: list[int]
    generation_token_ids: list[int]
    generation_log_probs: list[float]
    weight_versions: list[WeightSpan] | None = None

    @classmethod
    def of(cls, tokens: CallTokens, extends: str | None) -> TokenDelta:
        """Return the tokens in this form; `extends` names the response of `tokens.parent`."""
        fields: dict[str, Any] = {
            "extends": extends,
            "new_prompt_token_ids": tokens.prompt_token_ids if extends is None else tokens.new_prompt_ids,
            "generation_token_ids": tokens.generation_token_ids,
            "generation_log_probs": tokens.generation_log_probs,
        }
        if tokens.weight_versions:
            fields["weight_versions"] = list(tokens.weight_versions)
        return cls.model_construct(**fields)

    @property
    def own_tokens(self) -> tuple[list[int], list[int], list[float], tuple[WeightSpan, ...]]:
        """What it holds itself: new prompt tokens, generation, log-probs, weights."""
        return (
            self.new_prompt_token_ids,
            self.generation_token_ids,
            self.generation_log_probs,
            tuple(self.weight_versions or ()),
        )

    def resolve(self, known: Mapping[str, CallTokens]) -> CallTokens:
        """Return the whole tokens.

        Args:
            known: the tokens of earlier responses, by response id.

        Raises:
            TokenContractError: the response that this one extends is not among them, or the fields
                contradict each other.
        """
        own = self.own_tokens
        if self.extends is None:
            return CallTokens(*own)
        parent = known.get(self.extends)
        if parent is None:
            raise TokenContractError(
                f"token_delta.extends names response {self.extends!r}, whose tokens are not known here; "
                f"ask for whole tokens with the header `{TOKEN_FORM_HEADER}: item`"
            )
        return CallTokens.extending(parent, *own)


class Response(TokenFields):
    """The result of one model call. In the `response` form the token fields sit on it."""

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
    completed_at: float | None = None
    model: str
    status: Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"] = "completed"
    output: list[Item]
    usage: Usage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | list[Item] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    temperature: float | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[Tool] = Field(default_factory=list)
    top_p: float | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    store: bool | None = None
    background: bool | None = None
    service_tier: str | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    # extensions beyond OpenAI's fields
    fork: str | None = None
    """Why the prompt did not extend the newest model call of its history, if it did not."""
    unparsed_calls: int = 0
    """Pieces of tool-call markup that did not parse and stayed text."""
    stop_sequence: str | None = None
    """The stop string that ended the generation, if one did. It is sampled, and no part of the output."""
    token_delta: TokenDelta | None = None
    """The tokens in the `compact` form."""

    _carried: CallTokens | None = PrivateAttr(default=None)
    _extends: str | None = PrivateAttr(default=None)

    @property
    def output_text(self) -> str:
        """The text of the assistant messages in the output."""
        return output_text(self.output)

    @property
    def tokens(self) -> CallTokens | None:
        """The tokens of this model call, wherever the server put them; None if it sent none.

        Raises:
            TokenContractError: they come as a delta to another response: see `tokens_after`.
        """
        return self.tokens_after({})

    def tokens_after(self, known: Mapping[str, CallTokens]) -> CallTokens | None:
        """Return the tokens of this model call, given those of earlier responses by response id.

        Raises:
            TokenContractError: the response that a delta extends is not among them.
        """
        if self._carried is not None:
            return self._carried
        if self.token_delta is not None:
            return self.token_delta.resolve(known)
        own = super().tokens
        if own is not None:
            return own
        return next((item.tokens for item in reversed(self.output) if item.tokens is not None), None)

    @property
    def remembered(self) -> bool:
        """Whether the next request may continue this one, as in the `compact` form."""
        return self.token_delta is not None or self._carried is not None

    def carrying(self, tokens: CallTokens, *, extends: str | None = None) -> Self:
        """Attach tokens to this object, off the wire, and return it.

        Args:
            tokens: the tokens of this model call.
            extends: the response of `tokens.parent`, if whoever asked has its tokens.
        """
        self._carried = tokens
        self._extends = extends
        return self

    def in_form(self, form: TokenForm) -> dict[str, Any]:
        """Return the JSON object, with the tokens in one of the forms."""
        tokens = self.tokens
        output = [item.without_tokens() for item in self.output]
        wire = self.without_tokens().model_copy(update={"output": output}).to_wire()
        if form == "compact":
            for name in _ASKED:
                wire.pop(name, None)
        if tokens is None:
            return wire
        if form == "compact":
            wire["token_delta"] = TokenDelta.of(tokens, self._extends).to_wire()
        elif form == "response":
            wire |= tokens_to_wire(tokens)
        else:
            wire["output"][-1] |= tokens_to_wire(tokens)
        return wire
