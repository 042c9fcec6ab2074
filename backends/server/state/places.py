"""Ids for items that came without one: they name the item's place in the input of a response."""

from __future__ import annotations

import re

from gym_sdk.schema import Item

__all__ = ["place_id", "place_of"]

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_PLACE = re.compile(r"[a-z]+_(?P<response>resp_\w+)_(?P<position>0|[1-9]\d{0,8})", re.ASCII)


def place_id(item: Item, response_id: str, position: int) -> str:
    """Return an id such as `msg_resp_4f…_0`.

    It is no own id (`backends.ids`), because nobody sampled the item here.

    Args:
        item: has no id.
        response_id: the response in whose input it stands.
        position: where it stands.
    """
    return f"{_PREFIXES.get(item.type, 'item')}_{response_id}_{position}"


def place_of(item_id: str) -> tuple[str, int] | None:
    """Return the response and the position that an id names; None if it is not one of `place_id`."""
    match = _PLACE.fullmatch(item_id)
    return None if match is None else (match["response"], int(match["position"]))
