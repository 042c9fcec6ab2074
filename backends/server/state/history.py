"""The history behind responses that the policy does not remember: after a restart, or after a long time."""

from __future__ import annotations

from backends.history import Past, read_history
from backends.memory import CallMemory
from backends.server.state.places import place_of
from backends.server.state.stored import ResponseStore, StoredResponse, is_whole
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Item, ItemReference, Reasoning, ResponseRequest

__all__ = ["StoredHistory"]


class StoredHistory:
    """A `backends.history.History` over a store.

    Args:
        store: what is kept.
        scope: the rollout whose responses count; empty outside of rollouts.
    """

    def __init__(self, store: ResponseStore, scope: str = "") -> None:
        self._store = store
        self._scope = scope

    async def items_of(self, response_id: str) -> list[Item] | None:
        """Return a response's input and output with all that came before; None if not all of it is kept.

        The last item of each output carries the tokens, so that the policy can prove them.

        Raises:
            PolicyError: the response is not finished.
        """
        chain = await self._store.chain(response_id, self._scope)
        if chain is None or not is_whole(chain):
            return None
        if not chain[-1].is_finished:
            raise PolicyError(
                f"the response {response_id!r} is not done yet; continue it once it is",
                code="response_not_finished",
                param="previous_response_id",
            )
        items: list[Item] = []
        for stored in chain:
            asked = await self._asked(stored)
            if asked is None:
                return None
            items += [*asked, *(_opened(item) for item in stored.output)]
        return items

    async def item(self, item_id: str) -> Item | None:
        """Return an item that was sampled, that a client sent with this id, or that was listed with it."""
        found = await self._store.item(item_id, self._scope)
        place = place_of(item_id)
        if found is not None or place is None:
            return found
        response_id, position = place
        stored = await self._store.get(response_id, self._scope)
        if stored is None or position >= len(stored.input):
            return None
        item = await self.resolved(stored.input[position])
        return item.model_copy(update={"id": item_id})

    async def resolved(self, item: Item) -> Item:
        """Return what a reference means, if that is kept; anything else as it is."""
        found = await self._store.item(item.id, self._scope) if isinstance(item, ItemReference) else None
        return item if found is None else found

    async def _asked(self, stored: StoredResponse) -> list[Item] | None:
        """Return input items as prompts are made from them; None if one refers to what has gone."""
        if not stored.input:
            return []
        request = ResponseRequest.model_construct(input=list(stored.input))
        try:
            return await read_history(request, Past(CallMemory(), self))
        except PolicyError:
            return None


def _opened(item: Item) -> Item:
    """Return thinking without its sealed copy, as it was sampled."""
    if isinstance(item, Reasoning) and item.text and item.encrypted_content:
        return item.model_copy(update={"encrypted_content": None})
    return item
