"""The base of everything that travels as JSON: open models that lose nothing on a round trip."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from gym_sdk.tokens import CallTokens, WeightSpan, check_token_bundle

__all__ = ["TOKEN_FIELDS", "TokenFields", "WireModel", "tokens_to_wire"]

TOKEN_FIELDS = (
    "prompt_token_ids",
    "generation_token_ids",
    "generation_log_probs",
    "weight_versions",
)


class WireModel(BaseModel):
    """A JSON object of the Responses API. Unknown fields are kept; what was not set is not sent."""

    model_config = ConfigDict(
        extra="allow",
        protected_namespaces=(),
        defer_build=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    always_sent: ClassVar[frozenset[str]] = frozenset()

    def model_post_init(self, _context: Any, /) -> None:
        """Mark the fields that identify the object as set, so that they are always sent."""
        self.__pydantic_fields_set__.update(self.always_sent)

    def replaced(self, **fields: Any) -> Self:
        """Return a copy with other values for some fields, which are not checked.

        It shares all other values with the original, and costs a fifth of `model_copy`.
        """
        copy = type(self).__new__(type(self))
        extra = self.__pydantic_extra__
        object.__setattr__(copy, "__dict__", self.__dict__ | fields)
        object.__setattr__(copy, "__pydantic_fields_set__", self.__pydantic_fields_set__ | fields.keys())
        object.__setattr__(copy, "__pydantic_extra__", None if extra is None else dict(extra))
        object.__setattr__(copy, "__pydantic_private__", _copied(self.__pydantic_private__))
        return copy

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object as it travels: set fields and unknown fields, nothing else."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def to_wire_json(self) -> bytes:
        """Return `to_wire()` as JSON bytes."""
        return self.__pydantic_serializer__.to_json(self, by_alias=True, exclude_unset=True)


class TokenFields(WireModel):
    """The token contract's fields, which sit on the last output item of each model call."""

    prompt_token_ids: list[int] | None = None
    """All tokens that the policy was conditioned on."""
    generation_token_ids: list[int] | None = None
    """The tokens that were sampled, the stop token included."""
    generation_log_probs: list[float] | None = None
    """Natural-log probability of each sampled token (see `gym_sdk.tokens.CallTokens`)."""
    weight_versions: list[WeightSpan] | None = None
    """Which weights sampled which of the generated tokens."""

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        if not self.__pydantic_fields_set__.isdisjoint(TOKEN_FIELDS):
            self._check_tokens()
        return self

    def _check_tokens(self) -> None:
        check_token_bundle(
            self.prompt_token_ids,
            self.generation_token_ids,
            self.generation_log_probs,
            self.weight_versions,
        )

    @property
    def tokens(self) -> CallTokens | None:
        """The bundle, or None if this item carries no tokens."""
        if (
            self.prompt_token_ids is None
            or self.generation_token_ids is None
            or self.generation_log_probs is None
        ):
            return None
        return CallTokens(
            self.prompt_token_ids,
            self.generation_token_ids,
            self.generation_log_probs,
            tuple(self.weight_versions or ()),
        )

    def with_tokens(self, tokens: CallTokens) -> Self:
        """Return a copy that carries these tokens."""
        return self.replaced(**_fields_of(tokens))

    def without_tokens(self) -> Self:
        """Return this item if it carries no tokens, else a copy without them."""
        if self.__pydantic_fields_set__.isdisjoint(TOKEN_FIELDS):
            return self
        copy = self.replaced(**dict.fromkeys(TOKEN_FIELDS))
        copy.__pydantic_fields_set__.difference_update(TOKEN_FIELDS)
        return copy


def _copied(private: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if private is None else dict(private)


def tokens_to_wire(tokens: CallTokens) -> dict[str, Any]:
    """Return the token fields as they travel."""
    fields = _fields_of(tokens)
    if tokens.weight_versions:
        fields["weight_versions"] = [asdict(span) for span in tokens.weight_versions]
    return fields


def _fields_of(tokens: CallTokens) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prompt_token_ids": tokens.prompt_token_ids,
        "generation_token_ids": tokens.generation_token_ids,
        "generation_log_probs": tokens.generation_log_probs,
    }
    if tokens.weight_versions:
        fields["weight_versions"] = list(tokens.weight_versions)
    return fields
