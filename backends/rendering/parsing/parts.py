"""Parts of a generation, collected into items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from backends.ids import new_id
from backends.rendering.parsing.base import ParsedOutput
from gym_sdk.schema import FunctionCall, Message, OutputText, Reasoning, TextPart

__all__ = ["Call", "Collector", "Part", "Unparsed", "is_sound"]


@dataclass(frozen=True, slots=True)
class Call:
    """A function call.

    Attributes:
        name: the function's name.
        arguments: JSON text.
        call_id: the id that was sampled, where the format has one.
    """

    name: str
    arguments: str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Unparsed:
    """Markup of a call that does not parse."""

    text: str
    attempts: int = 1


Part = str | Call | Unparsed
"""A stretch of a generation outside thinking; a plain string is text."""


class Collector:
    """Collects thoughts and parts into output items, in the order in which they come.

    Texts next to each other become one message. Blank text next to calls and thoughts is dropped.

    Args:
        read_text: finds the calls in a stretch of text, for formats whose calls have no markup.
        new_call_id: makes an id for a call that has none.
    """

    def __init__(self, read_text: Callable[[str], Iterable[Part]], new_call_id: Callable[[], str]) -> None:
        self._read_text = read_text
        self._new_call_id = new_call_id
        self._output = ParsedOutput()
        self._unread = ""
        self._text = ""
        self._call_ids: set[str] = set()

    def add(self, part: Part) -> None:
        """Add text, a call or what did not parse as one."""
        if isinstance(part, str):
            self._unread += part
        else:
            self._read()
            self._add_read(part)

    def add_thought(self, text: str, tokens: int, *, goes_on: bool = False) -> None:
        """Add thinking, which took so many tokens; nothing can follow thinking that goes on."""
        self.end_message()
        self._output.reasoning_tokens += tokens
        self._output.open = goes_on
        part = TextPart(type="reasoning_text", text=text)
        status = "in_progress" if goes_on else "completed"
        self._output.items.append(Reasoning(id=new_id("rs"), summary=[], content=[part], status=status))

    def end_message(self) -> None:
        """Let the text that follows be a message of its own."""
        self._read()
        if self._text.strip():
            self._add_message()
        self._text = ""

    def finish(self) -> ParsedOutput:
        """Return the items; an empty generation is an empty message."""
        self._read()
        if self._text.strip() or not self._output.items:
            self._add_message()
        return self._output

    def settle(self, settled: Callable[[str], Iterable[Part]]) -> ParsedOutput:
        """Return the items of a generation that goes on: those that nothing sampled later changes.

        Args:
            settled: finds what is certain in a text that goes on.
        """
        text, self._unread = self._unread, ""
        for part in settled(text) if text else ():
            self._add_read(part)
        # Blank text is dropped if a call or a thought follows.
        if self._text.strip():
            self._add_message("in_progress")
            self._output.open = True
        return self._output

    def _read(self) -> None:
        text, self._unread = self._unread, ""
        for part in self._read_text(text) if text else ():
            self._add_read(part)

    def _add_read(self, part: Part) -> None:
        if isinstance(part, str):
            self._text += part
        elif isinstance(part, Unparsed):
            self._output.unparsed_calls += part.attempts
            self._text += part.text
        else:
            self.end_message()
            self._add_call(part)

    def _add_call(self, call: Call) -> None:
        call_id = call.call_id
        if not call_id or call_id in self._call_ids:
            call_id = self._new_call_id()
        self._call_ids.add(call_id)
        self._output.items.append(
            FunctionCall(
                id=new_id("fc"),
                call_id=call_id,
                name=call.name,
                arguments=call.arguments,
                status="completed",
            )
        )

    def _add_message(self, status: str = "completed") -> None:
        part = OutputText(text=self._text, annotations=[])
        self._output.items.append(Message(id=new_id("msg"), role="assistant", content=[part], status=status))
        self._text = ""


def is_sound(text: str) -> bool:
    r"""Return whether text can travel as UTF-8; JSON's `\ud800` makes text that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
