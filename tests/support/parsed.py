"""Parsed items in a form that tests compare."""

from __future__ import annotations

from collections.abc import Sequence

from gym_sdk.schema import FunctionCall, Item, Message, Reasoning

__all__ = ["shown"]


def shown(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """Show items as ("call", name, arguments), ("think", text) and ("text", text)."""
    rows: list[tuple[str, ...]] = []
    for item in items:
        if isinstance(item, FunctionCall):
            rows.append(("call", item.name, item.arguments))
        elif isinstance(item, Reasoning):
            rows.append(("think", item.text))
        else:
            assert isinstance(item, Message)
            rows.append(("text", item.text))
    return rows
