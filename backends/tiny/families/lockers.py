"""Following a trail of lockers: open one after the other, remember the digits, say them all."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, ClassVar

from backends.tiny.families.protocol import Messages, check_shares
from backends.tiny.vocabulary import Vocabulary

__all__ = ["LockersMix", "LockersTrace", "Trail", "ask_lockers", "draw_trail", "lockers_trace"]

Trail = list[tuple[str, str]]
"""The lockers in the order in which each names the next, and the digit in each."""

_LENGTHS = (2, 4)

_VOCABULARY = Vocabulary(
    # A name is one letter and one token, whatever stands before it. The frame of a call is one token, too: a
    # call is then decided where its locker is, and as cheap to sample as it is to read.
    pieces="|".join(
        (
            r'\{"name": "open", "arguments": \{"locker": "',
            r" (?=\p{L}(?!\p{L}))",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+",
            r" ?\p{L}+",
            r"\n",
            r"\s+",
        )
    ),
    texts=(
        "system\ntools: open(locker)",
        "user\nFollow the lockers from a. What is the code?",
        'assistant\n{"name": "open", "arguments": {"locker": "a"}}\n',
        "1, next a\n1, last\nlocked\nempty\n",
        "assistant\nThe code is 1.",
    ),
)


class LockersTrace(StrEnum):
    """What the assistant does in a trace."""

    FOLLOW = "follow"
    """It opens all lockers of the trail, and says all digits."""
    HASTY = "hasty"
    """It opens the first one, and says its digit."""
    STUCK = "stuck"
    """It opens the first one again, which is locked by then, and says its digit."""


@dataclass(frozen=True, slots=True)
class LockersMix:
    """Shares of the traces.

    Attributes:
        follow: follow the trail to its end.
        hasty: stop after the first locker.
        stuck: open the first locker twice.

    Raises:
        ConfigurationError: they don't add up to 1, or a share is not in [0, 1].
    """

    family: ClassVar[str] = "lockers"
    vocabulary: ClassVar[Vocabulary] = _VOCABULARY
    tool: ClassVar[dict[str, Any] | None] = {
        "type": "function",
        "function": {
            "name": "open",
            "description": "Open a locker.",
            "parameters": {
                "type": "object",
                "properties": {"locker": {"type": "string", "description": "Its letter."}},
                "required": ["locker"],
                "additionalProperties": False,
            },
        },
    }

    follow: float = 0.3
    hasty: float = 0.45
    stuck: float = 0.25

    def __post_init__(self) -> None:
        check_shares(self, "follow", "hasty", "stuck")

    def drill(self, rng: Random) -> list[str]:
        """Write lockers with their digits, the digits alone, and the first line again.

        Openings are copies of what tools said, and an answer is what they said with the lockers left out.
        """
        trail = draw_trail(rng)
        line = "".join(name + digit for name, digit in trail)
        return [line, "".join(digit for _, digit in trail), line]

    def traces(self, rng: Random) -> Iterator[Messages]:
        """Yield conversations in the mix's proportions, without end."""
        kinds = list(LockersTrace)
        weights = [self.follow, self.hasty, self.stuck]
        while True:
            yield lockers_trace(rng.choices(kinds, weights)[0], draw_trail(rng))


def draw_trail(rng: Random) -> Trail:
    """Choose lockers and digits."""
    names = rng.sample(string.ascii_lowercase, rng.randint(*_LENGTHS))
    return [(name, rng.choice(string.digits)) for name in names]


def lockers_trace(kind: LockersTrace, trail: Trail) -> Messages:
    """Write a conversation of one kind about a trail."""
    messages: Messages = [{"role": "user", "content": ask_lockers(trail[0][0])}]
    said = [
        f"{digit}, {f'next {trail[index + 1][0]}' if index + 1 < len(trail) else 'last'}"
        for index, (_, digit) in enumerate(trail)
    ]
    opened = len(trail) if kind is LockersTrace.FOLLOW else 1
    for (name, _), output in zip(trail[:opened], said, strict=False):
        messages += _tool_turn(name, output)
    if kind is LockersTrace.STUCK:
        messages += _tool_turn(trail[0][0], "locked")
    code = "".join(digit for _, digit in trail[:opened])
    messages.append({"role": "assistant", "content": f"The code is {code}."})
    return messages


def ask_lockers(first: str) -> str:
    """Word the question about a trail."""
    return f"Follow the lockers from {first}. What is the code?"


def _tool_turn(locker: str, said: str) -> Messages:
    function = {"name": "open", "arguments": json.dumps({"locker": locker})}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "content": said}]
