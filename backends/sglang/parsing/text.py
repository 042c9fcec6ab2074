"""One generation through SGLang's parse routes: what they lose is kept as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from backends.ids import new_id
from backends.rendering import ParsedOutput, Renderer
from backends.rendering.chat import chat_tools
from backends.rendering.parsing.parts import Call, Collector, Part, Unparsed, is_sound
from backends.sglang.parsing.marks import Section
from backends.sglang.parsing.routes import ParseRoutes, Tools, as_tools
from backends.sglang.parsing.stretches import placed
from gym_sdk.schema import FunctionTool

__all__ = ["TextReading"]

_WORD = re.compile(r"[\w.-]+")
_CLOSED_BY_STOP = frozenset({"gpt-oss", "muse"})
"""Tool parsers that look for the token that ended the turn."""


class TextReading:
    """One generation in reading.

    Args:
        routes: the parsers.
        renderer: decodes ids, and knows what ends a turn.
        generation: the sampled ids.
        opened: whether the prompt ended in an opened thought.
        tools: the functions on offer.
    """

    def __init__(
        self,
        routes: ParseRoutes,
        renderer: Renderer,
        generation: Sequence[int],
        opened: bool,
        tools: Sequence[FunctionTool],
    ) -> None:
        self._routes = routes
        self._renderer = renderer
        self._finished = bool(generation) and generation[-1] in renderer.stop_token_ids
        whole = not self._finished or routes.parsers.tool in _CLOSED_BY_STOP
        self._ids = generation if whole else generation[:-1]
        self._stop = renderer.decode(generation[-1:]) if whole and self._finished else ""
        self._text = renderer.decode(self._ids)
        self._opened = opened
        self._tools: Tools = chat_tools(tools) or []
        self._names = {tool.name for tool in tools}
        self._output = Collector(lambda text: [text], lambda: new_id("call"))

    async def read(self) -> ParsedOutput:
        """Return the items; call it once."""
        if self._routes.parsers.reasoning is None:
            await self._add_text(self._text)
        else:
            await self._add_thoughts()
        return self._output.finish()

    async def _add_thoughts(self) -> None:
        """Add thoughts one after the other: most parsers separate only the first."""
        opener, opened, rest = self._routes.opener, self._opened, self._text
        while rest:
            start = 0 if opened or opener is None else self._start_of_thought(rest, opener)
            if start is None:
                break
            await self._add_text(rest[:start])
            rest = rest[start:]
            head = opener if opened and opener is not None else ""
            stretches = placed(await self._routes.ask_reasoning(head + rest), head + rest, opener)
            if not any(stretch.thought for stretch in stretches):
                break
            offset = len(self._text) - len(rest) - len(head)
            while any(stretch.thought for stretch in stretches):
                first = stretches.pop(0)
                if first.thought:
                    count = self._ids_until(offset + first.end) - self._ids_until(offset + first.start)
                    self._output.add_thought(first.text, count)
                else:
                    await self._add_text(first.text)
            rest, opened = "".join(stretch.text for stretch in stretches), False
            if opener is None:
                break
        await self._add_text(rest)

    def _start_of_thought(self, text: str, opener: str) -> int | None:
        """Return where thinking begins; what stands in or after calls is left to the tool parser."""
        section = self._routes.section
        end = text.find(section.opener) if section is not None else -1
        start = text.find(opener, 0, end if end >= 0 else None)
        return start if start >= 0 else None

    def _ids_until(self, position: int) -> int:
        """Return how many ids it takes to write so many characters."""
        low, high = 0, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._renderer.decode(self._ids[:middle])) < position:
                low = middle + 1
            else:
                high = middle
        return low

    async def _add_text(self, text: str) -> None:
        """Add what stands outside thinking."""
        section = self._routes.section
        if self._routes.parsers.tool is None or not text.strip():
            self._output.add(text)
        elif section is None or section.opener not in text:
            await self._add_whole(text)
        else:
            await self._add_sections(text, section)

    async def _add_sections(self, text: str, section: Section) -> None:
        """Add the calls between marks, each section read alone, and the text around them."""
        end = 0
        while (start := text.find(section.opener, end)) >= 0:
            self._output.add(text[end:start])
            closer = text.find(section.closer, start + len(section.opener))
            end = len(text) if closer < 0 else closer + len(section.closer)
            if closer < 0 and not self._finished:
                self._output.add(Unparsed(text[start:]))  # cut: some parsers would call with what is there
            else:
                for part in await self._read_section(text[start:end], section):
                    self._output.add(part)
        self._output.add(text[end:])

    async def _read_section(self, text: str, section: Section) -> list[Part]:
        inner = _Inner.of(text, section)
        normal, calls = await self._ask(text, self._tools if inner.pieces else self._tools_and_words(text))
        if calls is not None and inner.holds(len(calls)):
            return [*calls, normal] if normal.strip() and normal.strip() in text else list(calls)
        return await self._read_inner(inner) if inner.pieces else [Unparsed(text)]

    async def _read_inner(self, inner: _Inner) -> list[Part]:
        """Read the calls of a section one by one, as some or the text between got lost in one reading."""
        parts: list[Part] = [inner.lost]
        for piece, closed, after in inner.pieces:
            calls: list[Call] | None = None
            if closed or self._finished:
                framed = inner.head.removesuffix(inner.lost) + piece + inner.tail
                _, calls = await self._ask(framed, self._tools_and_words(piece))
            parts += [calls[0], after] if calls is not None and len(calls) == 1 else [Unparsed(piece + after)]
        return parts

    async def _ask(self, text: str, tools: Tools) -> tuple[str, list[Call] | None]:
        """Return what SGLang leaves of a text and its calls; None if there are none, or one cannot travel."""
        normal, calls = await self._routes.ask_calls(text, tools)
        sound = [call for call in map(_sound, calls) if call is not None]
        return normal, sound if sound and len(sound) == len(calls) else None

    async def _add_whole(self, text: str) -> None:
        """Add a text whose calls cannot be told by marks; its parser says what remains of it."""
        normal, first = await self._routes.ask_calls(text, self._tools)
        if not first and normal.strip() == text.strip():
            self._output.add(text.removesuffix(self._stop))
            return
        # a second time with all words as names, else calls of functions that are not on offer get lost
        normal, calls = await self._ask(text, self._tools_and_words(text))
        if calls is None or len(calls) < len(first):
            self._output.add(Unparsed(text.removesuffix(self._stop)))
            return
        before, after = _around(normal, text)
        parts: list[Part] = [before, *calls, after]
        for part in parts:
            self._output.add(part)

    def _tools_and_words(self, text: str) -> Tools:
        """Return the tools, and each word of the text as one: parsers drop calls of names that they lack."""
        words = {word for match in _WORD.findall(text) for word in (match, *match.split("."))}
        return self._tools + as_tools(sorted(words - self._names - {""}))


@dataclass(frozen=True, slots=True)
class _Inner:
    """The calls within a section.

    Attributes:
        head: what stands before the first, the section's opening mark first.
        lost: the text in it that belongs to no call.
        pieces: each call, whether it is closed, and the text after it; none if single calls have no marks.
        tail: the section's closing mark, if it is there.
    """

    head: str
    lost: str
    pieces: list[tuple[str, bool, str]]
    tail: str

    @classmethod
    def of(cls, text: str, section: Section) -> _Inner:
        if not section.each_opener:
            return cls("", "", [], "")
        closed = text.endswith(section.closer)
        end = len(text) - (len(section.closer) if closed else 0)
        starts = [match.start() for match in re.finditer(re.escape(section.each_opener), text[:end])]
        pieces: list[tuple[str, bool, str]] = []
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            piece, closer, after = text[start:stop].partition(section.each_closer)
            pieces.append((piece + closer, bool(closer), after))
        head = text[: starts[0]] if starts else ""
        return cls(head, head.removeprefix(section.opener), pieces, text[end:])

    def holds(self, calls: int) -> bool:
        """Whether so many calls are all there are, with nothing but blanks between them."""
        return not self.pieces or (
            calls == len(self.pieces) and not any(one[2].strip() for one in self.pieces)
        )


def _around(normal: str, text: str) -> tuple[str, str]:
    """Return what stands before and after the calls of a text, by what its parser left of it.

    The parsers join both ends, some without the blanks between.
    """
    normal, bare = normal.strip(), text.strip()
    for cut in range(len(normal), -1, -1):
        before, after = normal[:cut].rstrip(), normal[cut:].lstrip()
        if bare.startswith(before) and bare.endswith(after):
            head = len(text) - len(text.lstrip()) + len(before)
            tail = len(text.rstrip()) - len(after)
            inner = text[head:tail]
            start = head + len(inner) - len(inner.lstrip())
            return (text[:start] if before else ""), (text[head + len(inner.rstrip()) :] if after else "")
    return normal, ""


def _sound(call: Call) -> Call | None:
    """Return a call that can travel: with a name, and arguments that are a JSON object; else None."""
    arguments = call.arguments
    try:
        value = json.loads(arguments, parse_constant=_refuse)
        if isinstance(value, str):  # some models write the arguments as a JSON text within JSON
            arguments, value = value, json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not call.name or not isinstance(value, dict) or not is_sound(json.dumps(value, ensure_ascii=False)):
        return None
    return Call(call.name, arguments)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
