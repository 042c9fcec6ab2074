"""A response that is kept, and what keeps it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gym_sdk.errors import PolicyError
from gym_sdk.schema import Item, ItemReference, Response, ResponseError

__all__ = ["ResponseStore", "StoredResponse", "failed", "is_whole", "names_of", "try_keep"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response with what was asked.

    Attributes:
        response: carries its tokens, if it has any.
        input: the input items of its request, without tokens; not those of its predecessors.
        scope: the rollout that it belongs to; empty outside of rollouts. It is not found in another.
        size: about how many bytes the request had as JSON; the length of its HTTP body will do. A store in
            memory estimates by it what the objects take up.
    """

    response: Response
    input: tuple[Item, ...] = ()
    scope: str = ""
    size: int = 0

    @classmethod
    def of(
        cls, response: Response, input: Iterable[Item] = (), *, scope: str = "", size: int = 0
    ) -> StoredResponse:
        """Return what is to be kept; the tokens that clients sent with input items are left out."""
        return cls(response, tuple(item.without_tokens() for item in input), scope, size)

    @property
    def id(self) -> str:
        """The response's id."""
        return self.response.id

    @property
    def is_finished(self) -> bool:
        """Whether the response is as it will stay."""
        return self.response.status not in ("queued", "in_progress")

    @property
    def output(self) -> list[Item]:
        """The response's output; the last item carries the tokens."""
        output = [item.without_tokens() for item in self.response.output]
        tokens = self.response.tokens
        if output and tokens is not None:
            output[-1] = output[-1].with_tokens(tokens)
        return output

    def item(self, item_id: str) -> Item | None:
        """Return the item with this id: of the output with its tokens, or else of the input."""
        return next((item for item in (*self.output, *self.input) if item_id in names_of([item])), None)


def failed(response: Response, message: str, code: str = "server_error") -> Response:
    """Return a response that failed after all."""
    update = {"status": "failed", "error": ResponseError(code=code, message=message)}
    return response.model_copy(update=update)


class ResponseStore(Protocol):
    """Keeps responses for later requests; which go when it is full is told by `StateLimits`."""

    async def keep(self, stored: StoredResponse) -> None:
        """Keep a response, in place of the one with the same id, if there is one.

        Raises:
            PolicyError: there is no room (507).
        """
        ...

    async def get(self, response_id: str, scope: str) -> StoredResponse | None:
        """Return a response; None if it is not kept."""
        ...

    async def chain(self, response_id: str, scope: str) -> list[StoredResponse] | None:
        """Return a response after all that it continues, oldest first; None if it is not kept.

        Where the first one continues another itself, that one was never kept; see `is_whole`.
        """
        ...

    async def delete(self, response_id: str, scope: str) -> bool:
        """Let a response go. Return whether it was kept."""
        ...

    async def item(self, item_id: str, scope: str) -> Item | None:
        """Return the item with this id that was sampled (with its tokens), or else the last that was sent."""
        ...

    async def aclose(self) -> None:
        """Close the store. What is on disk stays there."""
        ...


def names_of(items: Iterable[Item]) -> list[str]:
    """Return the ids of items; a reference has none, it only has another's."""
    return [
        name for item in items if (name := getattr(item, "id", None)) and not isinstance(item, ItemReference)
    ]


def is_whole(chain: Sequence[StoredResponse]) -> bool:
    """Whether a chain begins where its conversation began."""
    return chain[0].response.previous_response_id is None


async def try_keep(store: ResponseStore, stored: StoredResponse) -> bool:
    """Keep a response, or say in the log why not: its answer is worth more than its copy.

    Returns:
        Whether it is kept.
    """
    try:
        await store.keep(stored)
    except PolicyError as error:
        _log.error("response %s is not kept: %s", stored.id, error)
        return False
    return True
