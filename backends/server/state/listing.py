"""The list of a response's input items, and its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from backends.requests import invalid
from backends.server.state.history import StoredHistory
from backends.server.state.places import place_id
from backends.server.state.stored import StoredResponse
from gym_sdk.schema import InputText, Item, ItemReference, Message, OutputText

__all__ = ["Page", "input_items"]

Order: TypeAlias = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for.

    Attributes:
        limit: how many entries, at most.
        order: `asc` is from the beginning of the conversation.
        after: only entries after the one with this id, in this order.
        before: only entries before this one. The page has the last of them, or the first if there is `after`.
    """

    limit: int = 20
    order: Order = "desc"
    after: str | None = None
    before: str | None = None

    def of(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the page of a list whose items all have ids.

        Args:
            items: all there are, oldest first.

        Raises:
            PolicyError: there is no item that `after` or `before` names.
        """
        ordered = list(items) if self.order == "asc" else list(items)[::-1]
        places = {_id(item): place for place, item in enumerate(ordered)}
        start = 0 if self.after is None else _place(places, self.after, "after") + 1
        end = len(ordered) if self.before is None else _place(places, self.before, "before")
        span = ordered[start:end]
        is_last = self.before is not None and self.after is None
        page = span[-self.limit :] if is_last else span[: self.limit]
        return {
            "object": "list",
            "data": [item.to_wire() for item in page],
            "first_id": _id(page[0]) if page else None,
            "last_id": _id(page[-1]) if page else None,
            "has_more": len(page) < len(span),
        }


async def input_items(chain: Sequence[StoredResponse], history: StoredHistory) -> list[Item]:
    """Return all items that the last response of a chain was made from, oldest first.

    Args:
        chain: the response after all that it continues.
        history: where references are looked up.

    Returns:
        The items, each with an id of its own.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for stored in chain:
        for position, sent in enumerate(stored.input):
            item = (await history.resolved(sent)).without_tokens()
            if not _id(item) or _id(item) in seen:  # pages begin after an id
                item = item.model_copy(update={"id": place_id(item, stored.id, position)})
            items.append(_presented(item))
            seen.add(_id(item))
        if stored is not chain[-1]:
            items += [_presented(item.without_tokens()) for item in stored.response.output]
            seen.update(_id(item) for item in stored.response.output)
    return items


def _presented(item: Item) -> Item:
    """Return an item as the API lists it, with a status, and text as a part."""
    if isinstance(item, ItemReference):
        return item
    update: dict[str, Any] = {}
    if getattr(item, "status", None) is None:
        update["status"] = "completed"
    if isinstance(item, Message) and isinstance(item.content, str):
        part = OutputText if item.role == "assistant" else InputText
        update["content"] = [part(text=item.content)]
    return item.model_copy(update=update) if update else item


def _place(places: dict[str, int], item_id: str, param: str) -> int:
    if item_id not in places:
        raise invalid(param, f"must be the id of an item of this list, not {item_id!r}")
    return places[item_id]


def _id(item: Item) -> str:
    return str(getattr(item, "id", None) or "")
