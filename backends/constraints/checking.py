"""Proves grammars: with llguidance's own matcher, and with the parser that will read what they allow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.constraints.lark import json_rule
from backends.constraints.layout import Answers, Calls
from backends.constraints.probes import ANSWER, NAMES
from backends.rendering.template import TemplateRenderer
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, FunctionTool, Message

__all__ = ["Checker"]

_SCHEMA_ERROR = re.compile(r"failed to compile JSON schema: (.*?)(?:\n +\d+ \||\Z)", re.DOTALL)


class Checker:
    """Checks schemas and grammars for one tokenizer.

    Args:
        renderer: the tokenizer and the parser.
        alphabet: turns text into ids.
    """

    def __init__(self, renderer: TemplateRenderer, alphabet: Alphabet) -> None:
        self._renderer = renderer
        self._alphabet = alphabet

    def error(self, grammar: str) -> str:
        """Return what is wrong with a grammar; nothing if it can be used."""
        message: str = self._matcher(grammar).get_error()
        found = _SCHEMA_ERROR.search(message)
        return (found[1] if found else message).strip()

    def check_schema(self, schema: Mapping[str, Any], param: str) -> None:
        """Check that answers can be held to a schema.

        Raises:
            PolicyError: it is not valid, or uses what llguidance does not know.
        """
        error = self.error(f"start: {json_rule(schema)}")
        if error:
            raise PolicyError(
                f"the JSON schema cannot be used: {error}", code="invalid_json_schema", param=param
            )

    def is_special(self, mark: str) -> bool:
        """Whether llguidance keeps a mark apart from text: not every added token is special to it."""
        token_id = self._renderer.special.ids.get(mark)
        return token_id is not None and bool(self.tokenizer.is_special_token(token_id))

    def holds(
        self, grammar: str, turn: str, tools: Sequence[FunctionTool], calls: Sequence[tuple[str, Any]]
    ) -> bool:
        """Whether a turn passes a grammar and reads as these calls."""
        ids = self._alphabet.ids(turn)
        matcher = self._matcher(grammar)
        passes = all(matcher.consume_token(token_id) for token_id in ids) and matcher.is_accepting()
        return passes and self._read(ids, tools) == list(calls)

    def reads(self, layout: Calls, tool: FunctionTool) -> bool:
        """Whether the call of a function reads as such: not every name and parameter can be written."""
        keys: list[str] = []
        written = "{}"
        if layout.parameters is not None:
            keys = list((tool.parameters or {}).get("properties", ()))
            written = layout.parameters.write([(key, "1") for key in keys])
        turn = f"{layout.opening.replace(NAMES[0], tool.name)}{written}{layout.closing}{layout.stop}"
        return self._read(self._alphabet.ids(turn), ()) == [(tool.name, dict.fromkeys(keys, 1))]

    def reads_answer(self, layout: Answers) -> bool:
        """Whether an answer reads as the text that it is."""
        ids = self._alphabet.ids(f"{layout.opening}{ANSWER}{layout.closing}{layout.stop}")
        items = self._renderer.parse(ids).items
        return [item.text.strip() for item in items if isinstance(item, Message)] == [ANSWER]

    def _read(self, ids: Sequence[int], tools: Sequence[FunctionTool]) -> list[tuple[str, Any]] | None:
        """Return the calls that a turn says; None if it says anything else."""
        items = self._renderer.parse(ids, tools=tools).items
        calls: list[tuple[str, Any]] = []
        for item in items:
            if not isinstance(item, FunctionCall):
                return None
            calls.append((item.name, json.loads(item.arguments)))
        return calls

    def _matcher(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self.tokenizer, grammar, log_level=0)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as llguidance has it; a large one takes a second.

        Raises:
            ValueError: llguidance cannot read it.
        """
        from llguidance.hf import from_tokenizer

        tokenizer: Any = self._renderer.tokenizer
        return from_tokenizer(tokenizer)
