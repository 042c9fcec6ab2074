"""Generated token ids into items: thinking, text and tool calls in Hermes/Qwen markup.

Where the tokenizer has the markup as single tokens, only those tokens count: the same characters spelled
out of ordinary tokens are text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from gym_sdk.schema import FunctionCall, Item, Message, OutputText, Reasoning, TextPart

__all__ = ["HermesParser", "ParsedOutput", "new_id"]


class Decoder(Protocol):
    """The part of a tokenizer that parsing needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Return a token's id, or the unknown token's."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return an id's token."""
        ...


@dataclass(slots=True)
class ParsedOutput:
    """What a generation says.

    Attributes:
        items: at least one output item, in the order of sampling.
        reasoning_tokens: how many sampled tokens were thinking.
        unparsed_calls: pieces of tool-call markup that did not parse and stayed text.
    """

    items: list[Item] = field(default_factory=list)
    reasoning_tokens: int = 0
    unparsed_calls: int = 0


class _Mark(StrEnum):
    THINK_OPEN = "<think>"
    THINK_CLOSE = "</think>"
    CALL_OPEN = "<tool_call>"
    CALL_CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Either markup (`mark`) or the text between two pieces of markup."""

    text: str
    tokens: int
    mark: _Mark | None = None


def new_id(prefix: str) -> str:
    """Return a fresh id such as `msg_4f…`, in the style of OpenAI's."""
    return f"{prefix}_{secrets.token_hex(12)}"


class HermesParser:
    """Parses `<think>…</think>` and `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    Args:
        tokenizer: decodes ids.
        stop_token_ids: tokens that end a turn; they are not part of its text.
    """

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._marks: dict[int, _Mark] = {}
        spelled: list[_Mark] = []
        for mark in _Mark:
            token_id = tokenizer.convert_tokens_to_ids(mark.value)
            if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == mark.value:
                self._marks[token_id] = mark
            else:
                spelled.append(mark)
        self._spelled = re.compile("|".join(f"({re.escape(mark)})" for mark in spelled)) if spelled else None

    def parse(self, token_ids: Sequence[int]) -> ParsedOutput:
        """Parse the ids of one generation, the stop token included or not."""
        end = len(token_ids)
        if end and token_ids[end - 1] in self._stop_token_ids:
            end -= 1
        output = _Builder()
        for piece in self._pieces(token_ids[:end]):
            output.add(piece)
        return output.finish()

    def _pieces(self, token_ids: Sequence[int]) -> Iterator[_Piece]:
        start = 0
        for index, token_id in enumerate(token_ids):
            mark = self._marks.get(token_id)
            if mark is not None:
                yield from self._text_pieces(token_ids[start:index])
                yield _Piece(mark.value, 1, mark)
                start = index + 1
        yield from self._text_pieces(token_ids[start:])

    def _text_pieces(self, token_ids: Sequence[int]) -> Iterator[_Piece]:
        if not token_ids:
            return
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        count = len(token_ids)
        if self._spelled is None:
            yield _Piece(text, count)
            return
        start = 0
        for match in self._spelled.finditer(text):
            if match.start() > start:
                share = round(count * (match.start() - start) / len(text))
                yield _Piece(text[start : match.start()], share)
            yield _Piece(match.group(), 1, _Mark(match.group()))
            start = match.end()
        if start < len(text):
            yield _Piece(text[start:], round(count * (len(text) - start) / len(text)))


class _Builder:
    """Collects pieces into items; the markup that is open decides where text goes."""

    def __init__(self) -> None:
        self._output = ParsedOutput()
        self._text = ""
        self._thought: list[str] = []
        self._inside: _Mark | None = None
        self._call = ""

    def add(self, piece: _Piece) -> None:
        if self._inside is _Mark.THINK_OPEN:
            self._add_thought(piece)
        elif self._inside is _Mark.CALL_OPEN:
            self._add_call(piece)
        elif piece.mark in (_Mark.THINK_OPEN, _Mark.CALL_OPEN):
            self._inside = piece.mark
            self._output.reasoning_tokens += piece.mark is _Mark.THINK_OPEN
            self._call = ""
        elif piece.mark is _Mark.THINK_CLOSE and not self._output.items and not self._thought:
            # The generation prompt had opened the thinking: all text so far was thought.
            self._thought.append(self._text)
            self._text = ""
            self._flush_thought()
        else:
            self._text += piece.text

    def finish(self) -> ParsedOutput:
        if self._inside is _Mark.CALL_OPEN:
            self._keep_as_text(_Mark.CALL_OPEN.value + self._call)
        self._flush_thought()
        self._flush_text()
        if not self._output.items:
            self._add_message("")
        return self._output

    def _add_thought(self, piece: _Piece) -> None:
        self._output.reasoning_tokens += piece.tokens
        if piece.mark is _Mark.THINK_CLOSE:
            self._inside = None
            self._flush_thought()
        else:
            self._thought.append(piece.text)

    def _add_call(self, piece: _Piece) -> None:
        if piece.mark is not _Mark.CALL_CLOSE:
            self._call += piece.text
            return
        self._inside = None
        call = _parse_call(self._call)
        if call is None:
            self._keep_as_text(f"{_Mark.CALL_OPEN}{self._call}{_Mark.CALL_CLOSE}")
            return
        self._flush_text()
        name, arguments = call
        self._output.items.append(
            FunctionCall(
                id=new_id("fc"), call_id=new_id("call"), name=name, arguments=arguments, status="completed"
            )
        )

    def _keep_as_text(self, text: str) -> None:
        self._output.unparsed_calls += 1
        self._text += text

    def _flush_thought(self) -> None:
        if not self._thought:
            return
        self._flush_text()
        text = "".join(self._thought)
        self._thought = []
        part = TextPart(type="reasoning_text", text=text)
        self._output.items.append(Reasoning(id=new_id("rs"), summary=[], content=[part], status="completed"))

    def _flush_text(self) -> None:
        if self._text.strip():
            self._add_message(self._text)
        self._text = ""

    def _add_message(self, text: str) -> None:
        part = OutputText(text=text, annotations=[])
        self._output.items.append(
            Message(id=new_id("msg"), role="assistant", content=[part], status="completed")
        )


_ARGUMENTS = re.compile(r'"arguments"\s*:\s*')
_JSON = json.JSONDecoder()


def _parse_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments (the text as it was written), or None if this is not a call."""
    try:
        call: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    if "arguments" not in call:
        return call["name"], "{}"
    arguments = call["arguments"]
    if isinstance(arguments, str):
        return call["name"], arguments
    return call["name"], _written(text, arguments)


def _written(text: str, value: Any) -> str:
    """Find the piece of `text` that says `value`, so that arguments stay as the policy wrote them."""
    for match in _ARGUMENTS.finditer(text):
        try:
            found, end = _JSON.raw_decode(text, match.end())
        except ValueError:
            continue
        if found == value:
            return text[match.end() : end]
    return json.dumps(value, ensure_ascii=False)
