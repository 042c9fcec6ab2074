"""Spelling a word backward: no tool, one turn, and a reward for each letter in its place."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, ClassVar

from backends.tiny.families.protocol import Messages, check_shares
from backends.tiny.vocabulary import Vocabulary

__all__ = ["SpellingMix", "SpellingTrace", "ask_spell_backward", "spelling_trace"]

_LENGTHS = (3, 6)
_CAPITALIZED = 0.15  # the share of names among the words of reasoning-gym

_VOCABULARY = Vocabulary(
    # Letters one by one; only the words around them are words, and none of those can be asked about.
    pieces="|".join(
        (
            r"Spell this word backward(?= \()",
            r"example(?=:)",
            r"(?:system|user|assistant)(?=\n)",
            r"\p{L}",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+",
            r"\n",
            r"\s+",
        )
    ),
    texts=("user\nSpell this word backward (example: sun -> nus): a", "assistant\n", "system\n"),
)


class SpellingTrace(StrEnum):
    """What the assistant does in a trace."""

    BACKWARD = "backward"
    """It spells the word backward."""
    HALF = "half"
    """It spells it backward, and stops half-way."""
    FORWARD = "forward"
    """It repeats the word."""


@dataclass(frozen=True, slots=True)
class SpellingMix:
    """Shares of the traces.

    Attributes:
        backward: spell the word backward.
        half: stop half-way.
        forward: repeat the word.

    Raises:
        ConfigurationError: they don't add up to 1, or a share is not in [0, 1].
    """

    family: ClassVar[str] = "spelling"
    vocabulary: ClassVar[Vocabulary] = _VOCABULARY
    tool: ClassVar[dict[str, Any] | None] = None

    backward: float = 0.25
    half: float = 0.15
    forward: float = 0.6

    def __post_init__(self) -> None:
        check_shares(self, "backward", "half", "forward")

    def drill(self, rng: Random) -> list[str]:
        """Write a word, and then backward."""
        word = _word(rng)
        return [word, word[::-1]]

    def traces(self, rng: Random) -> Iterator[Messages]:
        """Yield conversations in the mix's proportions, without end."""
        kinds = list(SpellingTrace)
        weights = [self.backward, self.half, self.forward]
        while True:
            yield spelling_trace(rng.choices(kinds, weights)[0], _word(rng))


def spelling_trace(kind: SpellingTrace, word: str) -> Messages:
    """Write a conversation of one kind about a word."""
    backward = word[::-1]
    answers = {
        SpellingTrace.BACKWARD: backward,
        SpellingTrace.HALF: backward[: (len(word) + 1) // 2],
        SpellingTrace.FORWARD: word,
    }
    return [
        {"role": "user", "content": ask_spell_backward(word)},
        {"role": "assistant", "content": answers[kind]},
    ]


def ask_spell_backward(word: str) -> str:
    """Word a question of reasoning-gym's `spell_backward`."""
    return f"Spell this word backward (example: sun -> nus): {word}"


def _word(rng: Random) -> str:
    """Make up a word: any letters, so that every place has to be read."""
    word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(*_LENGTHS)))
    return word.capitalize() if rng.random() < _CAPITALIZED else word
