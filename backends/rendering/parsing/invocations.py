"""Calls as tags with names: `<invoke name="f"><parameter name="a">1</parameter></invoke>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from backends.rendering.parsing.parts import Call
from backends.rendering.parsing.typed import typed_arguments
from gym_sdk.schema import FunctionTool

__all__ = ["Invocations"]


class Invocations:
    """Reads the calls of a section. Values are written as they are, without XML's escapes.

    A value may itself hold closing tags: it ends where a parameter, a call or the section's end follows.

    Args:
        prefix: stands before the names of the tags, e.g. `atem:`.
        end: what ends the section, as a pattern.
    """

    def __init__(self, prefix: str, end: str) -> None:
        tag = re.escape(prefix)
        after_call = rf'</{tag}invoke>\s*(?:<{tag}invoke name="|{end})'
        self._invoke = re.compile(rf'\s*<{tag}invoke name="([^"\n]+)">\s*')
        self._parameter = re.compile(
            rf'<{tag}parameter name="([^"\n]*)">(.*?)</{tag}parameter>\s*'
            rf'(?=<{tag}parameter name="|{after_call})',
            re.DOTALL,
        )
        self._end_of_call = re.compile(rf"(?={after_call})</{tag}invoke>")
        self._end = re.compile(rf"\s*{end}")

    def read(self, text: str, start: int, tools: Sequence[FunctionTool]) -> tuple[list[Call], int, bool]:
        """Read calls up to the end of their section, or up to what is not a call.

        Args:
            text: holds the section.
            start: where it begins, after its opening tag.
            tools: the functions on offer; their schemas type the values.

        Returns:
            The calls, where reading ended, and whether that is the end of a section with calls.
        """
        calls: list[Call] = []
        while invoke := self._invoke.match(text, start):
            index = invoke.end()
            written: list[tuple[str, str]] = []
            while parameter := self._parameter.match(text, index):
                written.append((parameter[1], parameter[2]))
                index = parameter.end()
            end = self._end_of_call.match(text, index)
            if end is None:
                return calls, start, False
            calls.append(Call(invoke[1], typed_arguments(invoke[1], written, tools)))
            start = end.end()
        closing = self._end.match(text, start) if calls else None
        return calls, closing.end() if closing else start, closing is not None
