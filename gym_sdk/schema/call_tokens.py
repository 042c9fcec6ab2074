"""`CallTokens` as data: whole in a lone model call, linked in a rollout so that each id is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from gym_sdk.errors import TokenContractError
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["Link", "TokensField", "links_of", "mark_links", "resolve_links"]


@dataclass(slots=True)
class Link:
    """Tokens that extend an earlier call of the same rollout, on their way to or from data.

    Attributes:
        extends: index of that call in the rollout's `model_calls`.
        value: an `Extension`; on the way from data, before it was checked, the object as it was read.
    """

    extends: int
    value: Any


@dataclass
class Whole:
    """The fields of tokens that stand by themselves."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    prompt_token_ids: list[int]
    generation_token_ids: list[int]
    generation_log_probs: list[float]
    weight_versions: tuple[WeightSpan, ...] = ()


@dataclass
class Extension:
    """The fields of tokens that extend those of an earlier call."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    extends: int
    new_prompt_token_ids: list[int]
    generation_token_ids: list[int]
    generation_log_probs: list[float]
    weight_versions: tuple[WeightSpan, ...] = ()


class _TokensSchema:
    """Tells pydantic how `CallTokens` are read and written."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        extension = core_schema.no_info_wrap_validator_function(
            _load_extension, handler.generate_schema(Extension)
        )
        whole = core_schema.no_info_wrap_validator_function(_load_whole, handler.generate_schema(Whole))
        return core_schema.tagged_union_schema(
            {"extension": extension, "whole": whole},
            discriminator=lambda value: "extension" if isinstance(value, Link) else "whole",
            serialization=core_schema.plain_serializer_function_ser_schema(_dump),
        )


TokensField = Annotated[CallTokens, _TokensSchema]
"""`CallTokens` as the field of a model: reads and writes an object with the four fields of the contract."""


def links_of(calls: Sequence[CallTokens | None]) -> list[CallTokens | Link | None]:
    """Replace what can be said as the extension of an earlier call; the rest stays as it is.

    Where a call's parent is not among the calls, its closest ancestor that is stands in.
    """
    indices: dict[int, int] = {}
    found: list[CallTokens | Link | None] = []
    for index, call in enumerate(calls):
        found.append(None if call is None else _link(call, indices))
        indices.setdefault(id(call), index)
    return found


def _link(call: CallTokens, indices: Mapping[int, int]) -> CallTokens | Link:
    ancestor, new_prompt_ids = call.prompt_after(indices)
    if ancestor is None:
        return call
    extends = indices[id(ancestor)]
    own = call.generation_token_ids, call.generation_log_probs, call.weight_versions
    return Link(extends, Extension(extends, new_prompt_ids, *own))


def mark_links(calls: Any) -> Any:
    """Mark the tokens that say what they extend, so that they may: outside of a rollout they may not."""
    if not isinstance(calls, list | tuple):
        return calls
    return [_marked(call) for call in calls]


def _marked(call: Any) -> Any:
    tokens = call.get("tokens") if isinstance(call, dict) else None
    if not isinstance(tokens, dict) or "extends" not in tokens:
        return call
    return {**call, "tokens": Link(-1, tokens)}


def resolve_links(tokens: Sequence[CallTokens | Link | None]) -> list[CallTokens | None]:
    """Turn links into calls that extend the calls they name.

    Raises:
        TokenContractError: a link names no earlier call, or one without tokens.
    """
    resolved: list[CallTokens | None] = []
    for index, entry in enumerate(tokens):
        resolved.append(_resolve(entry, index, resolved) if isinstance(entry, Link) else entry)
    return resolved


def _resolve(link: Link, index: int, earlier: Sequence[CallTokens | None]) -> CallTokens:
    where = f"model_calls[{index}].tokens extends {link.extends}"
    if not 0 <= link.extends < index:
        raise TokenContractError(f"{where}, which is not the index of an earlier model call of this rollout")
    parent = earlier[link.extends]
    if parent is None:
        raise TokenContractError(f"{where}, but that model call has no tokens")
    own: Extension = link.value
    return CallTokens.extending(
        parent,
        own.new_prompt_token_ids,
        own.generation_token_ids,
        own.generation_log_probs,
        own.weight_versions,
    )


def _load_whole(value: Any, handler: Callable[[Any], Whole]) -> CallTokens:
    if isinstance(value, CallTokens):
        return value
    if isinstance(value, Mapping) and "extends" in value:
        raise TokenContractError(
            f"tokens extend model call {value['extends']!r} of a rollout; a model call by itself needs "
            "prompt_token_ids"
        )
    whole = handler(value)
    return CallTokens(
        whole.prompt_token_ids,
        whole.generation_token_ids,
        whole.generation_log_probs,
        whole.weight_versions,
    )


def _load_extension(value: Link, handler: Callable[[Any], Extension]) -> Link:
    own = handler(value.value)
    return Link(own.extends, own)


def _dump(value: CallTokens | Link) -> dict[str, Any]:
    if isinstance(value, Link):
        own: CallTokens | Extension = value.value
        head = {"extends": value.extends, "new_prompt_token_ids": value.value.new_prompt_token_ids}
    else:
        own = value
        head = {"prompt_token_ids": value.prompt_token_ids}
    return {
        **head,
        "generation_token_ids": own.generation_token_ids,
        "generation_log_probs": own.generation_log_probs,
        "weight_versions": [asdict(span) for span in own.weight_versions],
    }
