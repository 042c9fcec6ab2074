"""What a request's input and its predecessors say, as the items that a prompt is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import ValidationError

from backends.memory import CallMemory, KnownCall
from backends.sealed import unseal
from backends.tool_use import as_functions
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Item, ItemReference, Reasoning, ResponseRequest, TextPart, as_items

__all__ = ["History", "Past", "lost_response", "read_history"]


class History(Protocol):
    """Responses that are kept somewhere, longer than the policy remembers their tokens."""

    async def items_of(self, response_id: str) -> list[Item] | None:
        """Return a response's input and output with all that came before; None if it is not kept.

        Sampled items carry their tokens, if those are kept, too.
        """
        ...

    async def item(self, item_id: str) -> Item | None:
        """Return an item that was sampled, or sent with this id; None if it is not kept."""
        ...


class Past:
    """What is known of earlier responses: the policy's memory, and a history behind it.

    Args:
        memory: earlier model calls.
        history: where to look for what the memory has lost.
        scope: whose responses count; those of other scopes are not known here.
    """

    def __init__(self, memory: CallMemory, history: History | None = None, *, scope: str = "") -> None:
        self._memory = memory
        self._history = history
        self.scope = scope
        self._calls: dict[str, KnownCall | None] = {}

    def call(self, response_id: str | None) -> KnownCall | None:
        """Return the remembered call behind a response; the same one each time, even if it is forgotten."""
        if response_id is None:
            return None
        if response_id not in self._calls:
            call = self._memory.named(response_id)
            known = call is not None and call.response_id == response_id and call.scope == self.scope
            self._calls[response_id] = call if known else None
        return self._calls[response_id]

    async def items_of(self, response_id: str) -> list[Item]:
        """Return all items up to a response's output.

        Raises:
            PolicyError: the response is not known (any more).
        """
        call = self.call(response_id)
        if call is not None:
            return call.history()
        items = None if self._history is None else await self._history.items_of(response_id)
        if items is None:
            raise lost_response(response_id)
        return items

    async def item(self, item_id: str, param: str) -> Item:
        """Return the item that a reference means.

        Raises:
            PolicyError: there is no such item.
        """
        call = self._memory.named(item_id)
        found: Item | None = None
        if call is not None and call.scope == self.scope:
            found = next((item for item in call.output if _id(item) == item_id), None)
        if found is None and self._history is not None:
            found = await self._history.item(item_id)
        if found is None:
            raise PolicyError(
                f"{param}: there is no item {item_id!r} here (any more); send the item itself",
                status=404,
                code="item_not_found",
                param=f"{param}.id",
            )
        return found


def lost_response(response_id: str) -> PolicyError:
    """Return the error for a response that a request continues, and that is not known."""
    return PolicyError(
        f"the response {response_id!r} is not remembered here (any more); send the whole history in `input`",
        code="previous_response_not_found",
        param="previous_response_id",
    )


async def read_history(request: ResponseRequest, past: Past) -> list[Item]:
    """Return the items that a request's prompt is made from, oldest first.

    References are resolved, calls of custom tools are function calls, sealed thinking is opened.

    Raises:
        PolicyError: there is no item, one is none, or one refers to what is not known.
    """
    try:
        new: Sequence[Item] = as_items(request.input)
    except ValidationError as error:
        raise PolicyError(f"input: {error}", param="input") from error
    items = [await _resolved(item, f"input[{index}]", past) for index, item in enumerate(new)]
    if request.previous_response_id is not None:
        items = [*await past.items_of(request.previous_response_id), *items]
    if not items:
        raise PolicyError("input is required: send at least one item", code="invalid_value", param="input")
    return as_functions(items)


async def _resolved(item: Item, param: str, past: Past) -> Item:
    if isinstance(item, ItemReference):
        return await past.item(item.id, param)
    if isinstance(item, Reasoning) and item.encrypted_content:
        return _opened(item, param)
    return item


def _opened(item: Reasoning, param: str) -> Reasoning:
    """Return thinking as it was sampled, where it was sealed here; what the item itself says goes first."""
    sealed = item.encrypted_content or ""
    try:
        text = unseal(sealed)
    except ValueError as error:
        if item.text:
            return item
        raise PolicyError(
            f"{param}.encrypted_content holds thinking that cannot be read here: {error}; leave the item out",
            code="invalid_encrypted_content",
            param=f"{param}.encrypted_content",
        ) from error
    part = TextPart(type="reasoning_text", text=text)
    content = item.content if item.content else [part]
    return item.model_copy(update={"content": content, "encrypted_content": None})


def _id(item: Item) -> str | None:
    return getattr(item, "id", None)
