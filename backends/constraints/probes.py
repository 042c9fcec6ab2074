"""Short turns in the template's own words, from which the layout of calls and answers is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.renderer import Conversation
from backends.rendering.template import TemplateRenderer
from backends.speech import Speech, Turn
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionTool

__all__ = ["ANSWER", "CALL_ID", "KEYS", "NAMES", "THOUGHT", "VALUES", "WORD", "Probes", "probe_tools"]

NAMES = ("qzvone", "qzvtwo")
KEYS = ("qzvka", "qzvkb")
VALUES = (918273, 918274)
WORD, ANSWER, THOUGHT = "qzvva", "qzvanswer", "qzvthought"
"""Words that no template writes by itself."""

CALL_ID = re.compile(r"call\d{5}")
"""The ids that `Speech` gives to calls."""


def probe_tools() -> list[FunctionTool]:
    """Return the functions that the probes call."""
    properties = {KEYS[0]: {"type": "integer"}, KEYS[1]: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    return [FunctionTool(name=name, parameters=parameters) for name in NAMES]


class Probes:
    """Says turns, each as text that begins after any thinking and goes up to the token that ends the turn.

    Args:
        renderer: the template, the tokenizer and the parser.
        alphabet: writes ids as text.
        settings: the template's settings.
    """

    def __init__(self, renderer: TemplateRenderer, alphabet: Alphabet, settings: Mapping[str, Any]) -> None:
        self._alphabet = alphabet
        self._speech = Speech(renderer)
        tools = probe_tools() if renderer.template.abilities.tools else ()
        self._conversation = Conversation([], tools, template_kwargs=settings)
        parser = renderer.parser
        closers = parser.thinking.values() if isinstance(parser, MarkupParser) else ()
        self._closers = [alphabet.mark(closer) for closer in closers]
        self._ids = renderer.special.ids

    def calls(self, *calls: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return a turn with a call for each of these, and the token that ends it; None: it is refused."""
        return self._say(Turn("", calls=[(NAMES[n], arguments) for n, arguments in enumerate(calls)]))

    def answer(self, thinking: str = "") -> tuple[str, str] | None:
        """Return a turn that answers, and the token that ends it; None: the template refuses it."""
        return self._say(Turn(ANSWER, thinking=thinking))

    def _say(self, turn: Turn) -> tuple[str, str] | None:
        try:
            ids: Sequence[int] = self._speech.say(self._conversation, (), turn)
        except PolicyError:
            return None
        text = self._alphabet.write(ids[:-1])
        for closer in self._closers:
            text = text[text.rfind(closer) + len(closer) :] if closer in text else text
        return (text.lstrip() if self._closers else text), self._alphabet.write(ids[-1:])
