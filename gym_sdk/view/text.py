"""A rollout as plain text."""

from __future__ import annotations

from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Message, Reasoning, Rollout

__all__ = ["describe_rollout"]


def describe_rollout(rollout: Rollout, *, indent: str = "  ") -> str:
    """Return the items of a rollout, a line for each, with outcome and reward."""
    lines = [f"{indent}{_label(item):>9} | {_text(item)}" for item in rollout.items]
    reward = "none" if rollout.reward is None else f"{rollout.reward:g}"
    end = f"{rollout.outcome}, reward {reward}"
    if rollout.failure is not None:
        end += f" ({rollout.failure.error} in {rollout.failure.where}: {rollout.failure.message})"
    return "\n".join([*lines, f"{indent}{'':>9} = {end}"])


def _label(item: Item) -> str:
    if isinstance(item, Message):
        return item.role
    if isinstance(item, Reasoning):
        return "thinking"
    if isinstance(item, FunctionCall):
        return "call"
    if isinstance(item, FunctionCallOutput):
        return "output"
    return item.type


def _text(item: Item) -> str:
    if isinstance(item, FunctionCall):
        return f"{item.name}({item.arguments})"
    text = getattr(item, "text", "")
    return " ".join(str(text).split())
