"""Where an assistant turn ends in a rendered text, and what the template puts after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backends.rendering.special import SpecialTokens

__all__ = ["Tail", "TurnEnds"]


@dataclass(frozen=True, slots=True)
class Tail:
    """The text from the end of an assistant turn to the end of a rendering.

    Attributes:
        closing: what ends the turn, cut into special tokens and text: from the first piece that a turn cut
            short lacks to the closing token. Empty if the template ends turns by opening the next one.
        rest: what follows.
    """

    closing: tuple[str, ...]
    rest: str

    def after(self, stop: str | None) -> tuple[str | None, str]:
        """Return what extends a generation.

        Args:
            stop: the stop token that the generation ended with; None if it was cut.

        Returns:
            The special token after which the cut was made, which is not to be repeated (None if everything is
            to be appended), and the text that follows it.
        """
        if stop is None:
            return None, "".join(self.closing) + self.rest
        if stop in self.closing:
            at = self.closing.index(stop)
            return stop, "".join(self.closing[at + 1 :]) + self.rest
        if self.closing:
            return self.closing[-1], self.rest
        if self.rest.startswith(stop):
            return stop, self.rest[len(stop) :]
        return None, self.rest


@dataclass(frozen=True, slots=True)
class _End:
    """How turns of one kind end: the pieces after their last word, and which of them close the turn."""

    markup: tuple[str, ...]
    closing: tuple[str, ...]


class TurnEnds:
    """Finds the ends of assistant turns, and remembers how each kind of turn ends.

    Args:
        special: the tokenizer's special tokens.
        opens_next: whether the template ends turns by opening the next one, without a closing token.
    """

    def __init__(self, special: SpecialTokens, *, opens_next: bool) -> None:
        self._special = special
        self._opens_next = opens_next
        self._ends: dict[tuple[bool, str], _End] = {}

    def find(
        self, full: str, word: str, *, calls: bool, next_role: str, alone: Callable[[], str]
    ) -> Tail | str:
        """Find what follows an assistant turn, or say why it can't be told.

        Args:
            full: a rendering in which a turn is followed by something.
            word: the last text of the turn; it occurs nowhere after it.
            calls: whether the turn calls functions.
            next_role: role of the message after the turn; empty if there is none.
            alone: renders the same without what follows the turn.

        Returns:
            The tail, or the reason why there is none.
        """
        at = full.rfind(word)
        if at < 0:
            return "the template does not render assistant turns as they are given"
        follows = self._special.split(full[at + len(word) :])
        end = self._ends.get((calls, next_role))
        if end is None or not _starts_with(follows, end):
            found = self._learn(follows, alone(), word, calls=calls)
            if isinstance(found, str):
                return found
            end = self._ends[calls, next_role] = found
        return self._tail(follows, end)

    def closing_tokens(self, full: str, alone: str, word: str, *, calls: bool) -> set[str]:
        """Return what closes a turn, inside a conversation and at its end; empty if nothing does."""
        follows = self._special.split(full[full.rfind(word) + len(word) :])
        end = self._learn(follows, alone, word, calls=calls)
        if isinstance(end, str) or not end.closing:
            return set()
        ends = self._special.split(alone[alone.rfind(word) + len(word) :])
        return {ends[len(end.markup) + len(end.closing) - 1]}

    def opening_tokens(self, full: str, alone: str) -> set[str]:
        """Return what opens the turn after an assistant turn, where that ends the assistant turn."""
        if not self._opens_next or not full.startswith(alone.rstrip()):
            return set()
        pieces = self._special.split(full[len(alone.rstrip()) :].lstrip())
        return {piece for piece in pieces[:1] if piece in self._special}

    def _tail(self, follows: list[str], end: _End) -> Tail | str:
        size = len(end.markup) + len(end.closing)
        rest = "".join(follows[size:])
        if end.closing:
            return Tail(end.closing, rest)
        rest = rest.lstrip()
        if rest and self._special.split(rest)[0] not in self._special:
            return "the template does not separate turns by special tokens"
        return Tail((), rest)

    def _learn(self, follows: list[str], alone: str, word: str, *, calls: bool) -> _End | str:
        at = alone.rfind(word)
        if at < 0:
            return "the template does not render assistant turns as they are given"
        ends = self._special.split(alone[at + len(word) :])
        if self._opens_next:
            if ends and ends[-1] not in self._special:
                ends[-1] = ends[-1].rstrip()
            ends = [piece for piece in ends if piece]
            end = _End(tuple(ends), ())
            if _starts_with(follows, end):
                return end
            return "the template renders a turn differently when something follows it"
        common = 0
        while common < min(len(follows), len(ends)) and follows[common] == ends[common]:
            common += 1
        closings = [index for index in range(common) if follows[index] in self._special]
        if closings:
            last = closings[-1]
        elif self._special_at(follows, common) and self._special_at(ends, common):
            last = common  # closed by one token at the end of a conversation, by another inside it
        else:
            return "the template does not close a turn with a special token"
        # after a call, the special tokens before the closing one are the call's own markup
        first = last if calls else next(i for i in range(last + 1) if follows[i] in self._special)
        return _End(tuple(follows[:first]), tuple(follows[first : last + 1]))

    def _special_at(self, pieces: list[str], index: int) -> bool:
        return index < len(pieces) and pieces[index] in self._special


def _starts_with(follows: list[str], end: _End) -> bool:
    expected = [*end.markup, *end.closing]
    return follows[: len(expected)] == expected
