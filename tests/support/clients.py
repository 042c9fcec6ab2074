"""What the tests of real clients share: what policies say to them, and what they ask for."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias

import aiohttp
from pydantic import BaseModel, Field

from support.agents import call_text, say_text

__all__ = [
    "ANSWER",
    "ANSWERS",
    "QUESTION",
    "SHELL",
    "THINKS",
    "TURNS",
    "Answer",
    "Calculation",
    "Scripted",
    "named_call",
    "policy_stats",
]

Scripted: TypeAlias = Callable[..., Awaitable[str]]
"""Serves a policy that says given things in turn, token by token; returns its base URL."""


class Answer(BaseModel):
    """An answer with parts, which is short whatever a policy says."""

    sign: Literal["positive", "negative", "zero"]
    sure: bool


class Calculation(BaseModel):
    """Evaluate an expression."""

    expression: str = Field(pattern=r"^[0-9]{1,2} \+ [0-9]{1,2}$")


ANSWER = Answer(sign="positive", sure=True)
ANSWERS = say_text(ANSWER.model_dump_json())
"""What a policy says for `ANSWER`."""

SHELL: Any = {"type": "custom", "name": "shell", "description": "Run a command."}

THINKS = "<think>\nwell\n</think>\n\n"
QUESTION = "What is 1 + 2 + 4?"
TURNS = (THINKS + call_text("1 + 2"), THINKS + call_text("3+4"), THINKS + say_text("It is 7."))
"""What a policy says to the question, using the calculator."""


def named_call(name: str, **arguments: Any) -> str:
    """Return what a policy samples to call a tool."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call><|im_end|>"


async def policy_stats(url: str) -> dict[str, int]:
    """Return what the policy behind a base URL has counted."""
    async with aiohttp.ClientSession() as session, session.get(f"{url.removesuffix('/v1')}/health") as answer:
        stats: dict[str, int] = (await answer.json())["stats"]
    return stats
