"""Stop strings: where a generation that spells one ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import AnyStr

from backends.rendering.token_text import TokenText
from gym_sdk.errors import PolicyError

__all__ = ["Match", "StopStrings", "trim"]


@dataclass(frozen=True, slots=True)
class Match:
    """A stop string that a generation spells.

    Attributes:
        stop: the string.
        tokens: how many tokens the generation has up to and with the one that completes the string.
        text_bytes: how many bytes the generation has before the string.
    """

    stop: str
    tokens: int
    text_bytes: int


class StopStrings:
    """Looks for stop strings in what a generation spells, special tokens included.

    The one that is completed first counts, and of several that end in the same place the longest.

    Args:
        stops: the strings.
        token_text: tells what tokens spell.

    Raises:
        PolicyError: a string is empty, or it is no text.
    """

    def __init__(self, stops: Sequence[str], token_text: TokenText) -> None:
        self._token_text = token_text
        try:
            # The longest first: of those that end together it is found first.
            self._stops = sorted(((stop.encode(), stop) for stop in stops), key=lambda stop: -len(stop[0]))
        except UnicodeEncodeError as error:
            raise PolicyError("a stop string is no text", code="invalid_value", param="stop") from error
        if not all(stops):
            raise PolicyError("a stop string is empty", code="invalid_value", param="stop")
        self._longest = max((len(stop) for stop, _ in self._stops), default=1)
        self._tail = b""
        self._bytes = self._tokens = 0

    def feed(self, token_ids: Sequence[int]) -> Match | None:
        """Take the next tokens; return the match that they complete, after which there are no more.

        The cost depends on these tokens, not on those before them.
        """
        pieces = [self._token_text.bytes_of(token_id) for token_id in token_ids]
        text = self._tail + b"".join(pieces)
        before = self._bytes - len(self._tail)
        found = [
            (start + len(data), start, stop) for data, stop in self._stops if (start := text.find(data)) >= 0
        ]
        if found:
            end, start, stop = min(found, key=lambda match: match[0])
            return Match(stop, self._tokens + _tokens_until(end - len(self._tail), pieces), before + start)
        self._tokens += len(pieces)
        self._bytes = before + len(text)
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        return None

    @property
    def held_bytes(self) -> int:
        """How many bytes at the end of what was fed may begin a stop string."""
        return max((_overlap(self._tail, data) for data, _ in self._stops), default=0)

    def held(self, text: str) -> int:
        """Return how many characters at a text's end may begin a stop string."""
        return max((_overlap(text, stop) for _, stop in self._stops), default=0)


def trim(text: str, stop: str) -> str:
    """Return a text up to where a stop string begins; all of it if it holds none."""
    return text.partition(stop)[0]


def _tokens_until(size: int, pieces: Sequence[bytes]) -> int:
    """Return how many pieces it takes to have so many bytes."""
    count = 0
    while size > 0:
        size -= len(pieces[count])
        count += 1
    return count


def _overlap(text: AnyStr, stop: AnyStr) -> int:
    """Return the length of the longest end of a text that is a beginning of `stop`, but not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
