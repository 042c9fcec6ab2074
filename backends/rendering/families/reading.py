"""What the package read in a generation, turned into items without losing what it skipped."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from backends.ids import new_id
from backends.rendering.chat import chat_tools
from backends.rendering.families.marks import Marks, learn_marks, pattern, words
from backends.rendering.parsing import ParsedOutput
from backends.rendering.parsing.json_text import is_json, json_text
from backends.rendering.parsing.parts import Call, Collector, Part, Unparsed, is_sound
from gym_sdk.schema import FunctionTool

__all__ = ["FamilyParser"]

_log = logging.getLogger(__name__)

_BROKEN = frozenset({"unclosed_block", "malformed_structure", "missing_name"})
_DECODER = json.JSONDecoder()


class FamilyParser:
    """Reads generations with one of the package's renderers, a `Parser`.

    The package says where calls stand; what stands outside them is decoded here, because the package drops
    text between and after calls. A call counts if all that was sampled in its place shows in its name and
    arguments, or is the family's markup; else it stays text. So does everything if the package fails.

    Args:
        family: the family's name.
        renderer: one of the package's renderers.
        decode: turns ids into text.
    """

    def __init__(self, family: str, renderer: Any, decode: Callable[[Sequence[int]], str]) -> None:
        self.name = family
        self._renderer = renderer
        self._decode = decode
        self._stops = {token for token in renderer.get_stop_token_ids() if token is not None}
        self._marks = _try_learning(renderer, decode)

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse one generation; see the class. What the package will read in the end is not known before."""
        if partial:
            return ParsedOutput()
        ids = list(generation)
        try:
            return self._parse(ids, list(prompt), tools)
        except Exception:  # another's parser, on ids that a policy may choose freely
            _log.debug("the parser of %s failed", self.name, exc_info=True)
            collector = _collector()
            collector.add(Unparsed(self._decode(ids[: self._end(ids)])))
            self._add_rest(collector, ids, self._end(ids))
            return collector.finish()

    def _parse(self, ids: list[int], prompt: list[int], tools: Sequence[FunctionTool]) -> ParsedOutput:
        read = self._renderer.parse_response(list(ids), tools=chat_tools(tools), prompt_ids=prompt or None)
        end = max([self._end(ids), *(call.token_span[1] for call in read.tool_calls)])
        blocks = list(self._blocks(ids, end, read.tool_calls))
        collector = _collector()
        start, called = 0, False
        for number, (begin, after, parts) in enumerate([*blocks, (end, end, [])]):
            last = number == len(blocks)
            text = self._decode(ids[start:begin])
            first = start == 0
            if first:
                text = self._add_thought(collector, text, ids[:begin], read)
            calls = any(isinstance(part, Call) for part in parts)
            text = self._marks.trimmed(text, first=first, last=last, after_call=called, before_call=calls)
            collector.add(text)
            for part in parts:
                collector.add(part)
            start, called = after, calls
        self._add_rest(collector, ids, end)
        return collector.finish()

    def _end(self, ids: Sequence[int]) -> int:
        return next((index for index, token in enumerate(ids) if token in self._stops), len(ids))

    def _add_rest(self, collector: Collector, ids: Sequence[int], end: int) -> None:
        """Add what was sampled after the turn's end, which then stands in the text too."""
        rest = ids[end:]
        if any(token not in self._stops for token in rest):
            collector.add(self._decode(rest))

    def _add_thought(self, collector: Collector, text: str, ids: Sequence[int], read: Any) -> str:
        """Add the thinking that begins a turn, if its text stands there as it was read; return the rest."""
        thought = (read.reasoning_content or "").strip()
        marks = self._marks
        opening = rf"\s*(?:{pattern(marks.opens_thought)})?\s*" if marks.opens_thought else r"\s*"
        closing = rf"\s*{pattern(marks.closes_thought)}" if marks.closes_thought else ""
        if not thought:
            match = re.match(opening + closing, text) if closing else None
            dropped = match is not None and not read.content.lstrip().startswith(match.group().strip())
            return text[match.end() :].lstrip("\n") if match and dropped else text
        match = re.match(rf"{opening}{re.escape(thought)}", text)
        if match is None:
            return text
        collector.add_thought(thought, self._tokens_until(match.end(), ids))
        rest = text[match.end() :]
        closed = re.match(closing, rest) if closing else None
        return rest[closed.end() :].lstrip("\n") if closed else rest.lstrip()

    def _tokens_until(self, length: int, ids: Sequence[int]) -> int:
        """Return how many ids make the first `length` characters."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode(ids[:middle])) < length:
                low = middle + 1
            else:
                high = middle
        return low

    def _blocks(
        self, ids: list[int], end: int, calls: Iterable[Any]
    ) -> Iterable[tuple[int, int, Sequence[Part]]]:
        """Yield start, end and parts of each stretch of ids in which calls were found.

        Raises:
            ValueError: the stretches overlap.
        """
        position = 0
        for (start, after), group in groupby(calls, key=lambda call: call.token_span):
            if not position <= start < after <= end:
                raise ValueError("the calls overlap")
            found = list(group)
            yield start, after, self._parts(self._decode(ids[start:after]), found)
            position = after

    def _parts(self, text: str, found: Sequence[Any]) -> Sequence[Part]:
        calls = [call for entry in found if (call := _call(entry, text)) is not None]
        if len(calls) == len(found):
            said: set[str] = set(self._marks.call_words)
            for call in calls:
                said |= words(call.name) | words(call.call_id or "") | _said(call.arguments)
            if words(text) <= said:
                return calls
        return [Unparsed(text, max(1, len(found) - len(calls)))]


def _try_learning(renderer: Any, decode: Callable[[Sequence[int]], str]) -> Marks:
    try:
        return learn_marks(renderer, decode)
    except Exception:  # a family that cannot render the probe: its markup stays in the text
        return Marks()


def _collector() -> Collector:
    return Collector(lambda text: [text], lambda: new_id("call"))


def _call(entry: Any, text: str) -> Call | None:
    """Return a call that the package read, or None if it has no name or no object of arguments.

    Its `invalid_json` also stands for a value that does not fit the parameter's type, and `unknown_tool` for
    a call that reads well: both are the tool's to answer.
    """
    name = entry.name
    if str(entry.status) in _BROKEN or not isinstance(name, str) or not name or not is_sound(name):
        return None
    arguments = entry.arguments
    if isinstance(arguments, str):
        if not arguments.lstrip().startswith("{") or not is_json(arguments):
            return None
    elif isinstance(arguments, dict):
        arguments = _as_written(arguments, text) or json_text(arguments)
    else:
        return None
    call_id = entry.id if isinstance(entry.id, str) and is_sound(entry.id) else None
    return Call(name, arguments, call_id)


def _as_written(arguments: dict[str, Any], text: str) -> str | None:
    """Return the text of the arguments, if they stand in `text` as JSON."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except ValueError:
            value, end = None, start
        if value == arguments:
            return text[start:end]
        start = text.find("{", start + 1)
    return None


def _said(arguments: str) -> set[str]:
    """Return the words of arguments, as JSON writes them and as they are meant."""
    found = words(arguments)
    values = [json.loads(arguments)]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            found.update(*map(words, value))
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str):
            found |= words(value)
    return found
