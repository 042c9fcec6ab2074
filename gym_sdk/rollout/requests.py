"""The requests of one rollout: as short as what the server remembers allows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import PrivateAttr, TypeAdapter
from pydantic_core import to_json

from gym_sdk.schema import Item, ResponseRequest, Rollout, Turn
from gym_sdk.tools import Tool

if TYPE_CHECKING:
    from gym_sdk.rollout.spec import RolloutSpec

__all__ = ["PreparedRequest", "Prototypes", "RequestWriter"]

_TAKEN_OVER = ("instructions", "tools", "chat_template_kwargs")
"""What a request that continues another one takes over from it."""


class RequestWriter:
    """Writes the request for each turn of one rollout.

    As long as the server remembers the last response, a request names it and sends what is new; otherwise it
    sends all items, with their tokens where the server wants them back.

    Args:
        rollout: whose turns they are; its items and model calls are read at each turn.
        spec: model, sampling and environment.
        tools: the tools on offer.

    Raises:
        pydantic.ValidationError: a setting of the task, or an extra of the sampling, does not fit a request.
    """

    def __init__(self, rollout: Rollout, spec: RolloutSpec, tools: Mapping[str, Tool[..., Any]]) -> None:
        self._rollout = rollout
        self._sampling = spec.sampling
        self._prototypes = _prototypes(rollout, spec, tools)
        self._previous: str | None = None  # the response that the next request may continue
        self._seen = 0  # how many items the server knows with it
        self._echo = True  # whether the items that are sent carry their tokens

    @property
    def continues(self) -> str | None:
        """The id of the response that the next request continues; None if it sends everything."""
        return self._previous

    def write(self, turn: int) -> ResponseRequest:
        """Return the request of a turn, from 0."""
        rollout = self._rollout
        if self._previous is None:
            prototype = self._prototypes.whole
            items = self._items_with_tokens() if self._echo else list(rollout.items)
            changes: dict[str, Any] = {"input": items}
        else:
            prototype = self._prototypes.continuing
            changes = {"input": rollout.items[self._seen :], "previous_response_id": self._previous}
        seed = self._sampling.seed_of(rollout.key, turn)
        if seed is not None and "seed" not in rollout.task.settings:
            changes["seed"] = seed
        return prototype.replaced(**changes)

    def note(self, response: Turn) -> None:
        """Take into account what the server remembers, after the rollout took the response's items."""
        self._echo = any(item.tokens is not None for item in response.output)
        if response.remembered:
            self._previous, self._seen = response.id, len(self._rollout.items)
        else:
            self._previous, self._seen = None, 0

    def forget(self) -> None:
        """Tell the server everything in the next request."""
        self._previous, self._seen, self._echo = None, 0, True

    def _items_with_tokens(self) -> list[Item]:
        """Return the items with each model call's tokens on its last output item."""
        items = list(self._rollout.items)
        for call in self._rollout.model_calls:
            if call.tokens is not None:
                items[call.end_item - 1] = items[call.end_item - 1].with_tokens(call.tokens)
        return items


class PreparedRequest(ResponseRequest):
    """A request of which all that does not change from rollout to rollout is JSON already."""

    _head: bytes = PrivateAttr(default=b"")

    @classmethod
    def prepare(cls, fields: Mapping[str, Any]) -> PreparedRequest:
        """Return a request with these fields, and without input.

        Raises:
            pydantic.ValidationError: they are no request's.
        """
        request = cls.model_validate({**fields, "input": []})
        wire = request.to_wire()
        for name in _VARYING:
            wire.pop(name, None)
        request._head = to_json(wire)[:-1] + (b"," if wire else b"")
        return request

    def to_wire_json(self) -> bytes:
        """Return `to_wire()` as JSON bytes."""
        values = self.__dict__
        parts = [
            self._head,
            b'"input":',
            _items().dump_json(values["input"], by_alias=True, exclude_unset=True),
        ]
        if values["previous_response_id"] is not None:
            parts += (b',"previous_response_id":', to_json(values["previous_response_id"]))
        if values["seed"] is not None:
            parts.append(b',"seed":%d' % values["seed"])
        parts.append(b"}")
        return b"".join(parts)


_VARYING = ("input", "previous_response_id", "seed")
"""What `RequestWriter.write` sets."""


@functools.cache
def _items() -> TypeAdapter[list[Item]]:
    return TypeAdapter(list[Item])


class Prototypes(NamedTuple):
    """Requests without their input."""

    whole: PreparedRequest
    """One that sends everything."""
    continuing: PreparedRequest
    """One that continues another response."""


def _prototypes(rollout: Rollout, spec: RolloutSpec, tools: Mapping[str, Tool[..., Any]]) -> Prototypes:
    """Return a rollout's requests without their input; rollouts with nothing of their own share them."""
    task = rollout.task
    own = bool(task.settings) or task.instructions is not None or not spec.environment.tools_are_fixed
    if not own and spec.prototypes is not None:
        return spec.prototypes
    instructions = task.instructions or spec.environment.instructions
    # the rollout itself is the record: nobody asks the server for its responses again
    fields: dict[str, Any] = {"store": False}
    fields |= spec.sampling.fields()
    if spec.model is not None:
        fields["model"] = spec.model
    if instructions is not None:
        fields["instructions"] = instructions
    if tools:
        fields["tools"] = [tool.schema for tool in tools.values()]
    fields.update(task.settings)
    continuing = {name: value for name, value in fields.items() if name not in _TAKEN_OVER}
    prototypes = Prototypes(PreparedRequest.prepare(fields), PreparedRequest.prepare(continuing))
    if not own:
        spec.prototypes = prototypes
    return prototypes
