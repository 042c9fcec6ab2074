"""What may stand before a generation's calls or answer: thinking, which stays free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.constraints.layout import Answers
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.messages import MessagesParser
from backends.rendering.parsing.pieces import Marks
from backends.rendering.parsing.thinking import ThinkingLook, last_turn
from backends.rendering.template import TemplateRenderer

__all__ = ["Thinking"]


class Thinking:
    """Finds out how far a prompt has gone with thinking.

    Args:
        renderer: the template, the tokenizer and the parser.
        alphabet: writes marks.
    """

    def __init__(self, renderer: TemplateRenderer, alphabet: Alphabet) -> None:
        parser = renderer.parser
        tokenizer: Any = renderer.tokenizer
        self._renderer = renderer
        self._alphabet = alphabet
        self._pairs = dict(parser.thinking) if isinstance(parser, MarkupParser) else {}
        self._in_messages = isinstance(parser, MessagesParser)
        self._tokenizer = tokenizer
        self._marks = Marks(tokenizer, [*self._pairs, *self._pairs.values()])
        self._look = ThinkingLook(tokenizer, self._pairs, renderer.stop_token_ids)

    def state(self, prompt: Sequence[int]) -> str:
        """Return the mark of the thinking that the prompt left open; else `closed`, if it closed some."""
        opened = self._look.opened_by(prompt)
        if opened is not None:
            return opened
        stops = self._renderer.stop_token_ids
        turn = last_turn(self._tokenizer, prompt, stops, self._marks.token_ids)
        closers = set(self._pairs.values())
        return "closed" if any(piece.mark in closers for piece in self._marks.split(turn)) else ""

    def before(self, state: str, answers: Answers | None, until: Callable[[str], str]) -> str:
        """Return an expression for the thinking that may or must come first.

        Args:
            state: see `state`.
            answers: how messages are laid out, for formats that think in messages.
            until: makes an expression for free text up to and including a mark.
        """
        if state in self._pairs:
            return until(self._alphabet.mark(self._pairs[state]))
        if state:
            return ""
        if self._in_messages and answers is not None and answers.thinking is not None:
            opening, closing = answers.thinking
            return f"({self._alphabet.expression(opening)} {self._until_all(closing, until)})?"
        ways = [
            f"BLANK? {self._alphabet.expression(self._alphabet.mark(opener))} "
            + until(self._alphabet.mark(closer))
            for opener, closer in self._pairs.items()
            if self._is_known(opener)
        ]
        return f"({' | '.join(ways)})?" if ways else ""

    def _is_known(self, opener: str) -> bool:
        """Whether the model knows the mark: from its vocabulary or its template."""
        return (
            self._alphabet.is_token(self._alphabet.mark(opener)) or opener in self._renderer.template.source
        )

    def _until_all(self, closing: str, until: Callable[[str], str]) -> str:
        """Free text up to what closes it: its first token, or all of it if it has none."""
        if self._alphabet.is_token(closing[:1]):
            return f"{until(closing[0])} {self._alphabet.expression(closing[1:])}"
        return until(closing)
