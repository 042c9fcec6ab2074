"""The markup between a family's thinking, text and calls, learned from what its renderer writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Marks", "learn_marks", "words"]

_WORD = re.compile(r"\w+|[^\x00-\x7f\s]")
_NAME, _THOUGHT, _TEXT = "qzvname", "qzvthought", "qzvtext"
_ARGUMENTS = {"qzvkey": "qzvvalue", "qzvcount": 7}  # families may mark which values are strings
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"qzvkey": {"type": "string"}, "qzvcount": {"type": "integer"}},
        },
    },
}
_USER = {"role": "user", "content": "."}


def words(text: str) -> set[str]:
    """Return what a text says: its words, and its symbols beyond ASCII."""
    return set(_WORD.findall(text))


@dataclass(frozen=True, slots=True)
class Marks:
    """Markup around the parts of a turn; what a family does not have is empty.

    Attributes:
        opens_thought: stands before the thinking.
        closes_thought: stands after it, before text.
        opens_text: stands before the text of a turn without thinking, e.g. empty thinking.
        closes_text: stands after the text of a turn without calls.
        opens_calls: stands between text and calls.
        joins_calls: stands between two calls.
        closes_calls: stands after the last call.
        call_words: the words that the markup of a call itself has.
    """

    opens_thought: str = ""
    closes_thought: str = ""
    opens_text: str = ""
    closes_text: str = ""
    opens_calls: str = ""
    joins_calls: str = ""
    closes_calls: str = ""
    call_words: frozenset[str] = frozenset()

    def trimmed(self, text: str, *, first: bool, last: bool, after_call: bool, before_call: bool) -> str:
        """Take the family's markup off the edges of text that stands between thinking and calls.

        Args:
            text: what was sampled outside thinking and calls.
            first: it begins the answer.
            last: it ends the turn.
            after_call: a call stands right before it.
            before_call: a call stands right after it.
        """
        left = [self.opens_text] if first else []
        right = [self.closes_text] if last else []
        if after_call:
            left += [self.closes_calls, self.joins_calls, self.opens_text]
        if before_call:
            right += [self.opens_calls, self.joins_calls, self.closes_text]
        for mark in filter(None, left):
            match = re.match(rf"\s*{pattern(mark)}\s*", text)
            text = text[match.end() :] if match else text
        for mark in filter(None, right):
            match = re.search(rf"\s*{pattern(mark)}\s*\Z", text)
            text = text[: match.start()] if match else text
        text = text.lstrip() if after_call else text
        return text.rstrip() if before_call else text


def pattern(mark: str) -> str:
    """Return a pattern for a mark in which white space may differ."""
    return r"\s*".join(re.escape(piece) for piece in mark.split())


def learn_marks(renderer: Any, decode: Callable[[Sequence[int]], str]) -> Marks:
    """Read off a family's markup by rendering two short turns and parsing them again.

    Args:
        renderer: one of the package's renderers.
        decode: turns ids into text.
    """
    found: dict[str, Any] = {}
    plain = _sampled(renderer, {"role": "assistant", "content": _TEXT})
    before, text, after = decode(plain).partition(_TEXT)
    if text:
        found.update(opens_text=before.strip(), closes_text=after.strip())
    turn = {"role": "assistant", "content": _TEXT, "reasoning_content": _THOUGHT, "tool_calls": _calls()}
    ids = _sampled(renderer, turn)
    found["closes_thought"] = _closing(renderer, decode, turn)
    spans = [call.token_span for call in renderer.parse_response(ids, tools=[_TOOL]).tool_calls]
    if len(spans) != 2 or None in spans:
        return Marks(**found)
    (first, first_end), (second, end) = spans
    head, joint, tail = decode(ids[:first]), decode(ids[first_end:second]), decode(ids[end:])
    before, thought, after = head.partition(_THOUGHT)
    if thought:
        found["opens_thought"] = before.strip()
        head = after
    before, text, after = head.partition(_TEXT)
    if thought:
        found["closes_thought"] = before.strip()
    found["opens_calls"] = after.strip() if text else ""
    found["closes_calls"] = "" if _TEXT in tail else tail.strip()
    found["joins_calls"] = joint.strip()
    said = words(f"{_NAME} {_ARGUMENTS} 0 1")  # 0 and 1: some call ids count the calls
    found["call_words"] = frozenset(words(decode(ids[first:end])) - said)
    return Marks(**found)


def _closing(renderer: Any, decode: Callable[[Sequence[int]], str], turn: dict[str, Any]) -> str:
    """Return what closes thinking where the settings have the prompt write it, not the policy."""
    text = decode(renderer.render([_USER, turn], tools=[_TOOL]).token_ids).partition(_THOUGHT)[2]
    return text.partition(_TEXT)[0].strip() if _TEXT in text else ""


def _calls() -> list[dict[str, Any]]:
    function = {"name": _NAME, "arguments": dict(_ARGUMENTS)}
    return [{"id": f"functions.{_NAME}:{n}", "type": "function", "function": function} for n in range(2)]


def _sampled(renderer: Any, turn: dict[str, Any]) -> list[int]:
    """Return the ids of a turn that the policy would have sampled, without the stop token."""
    rendered = renderer.render([_USER, turn], tools=[_TOOL])
    owned = zip(rendered.token_ids, rendered.message_indices, rendered.sampled_mask, strict=True)
    ids = [token for token, message, sampled in owned if message == 1 and sampled]
    return ids[:-1] if ids and ids[-1] in renderer.get_stop_token_ids() else ids
