"""SGLang's parse routes, and which of its parsers to use there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from backends.rendering.parsing import SGLANG
from backends.rendering.parsing.parts import Call
from backends.sglang.parsing.marks import REASONING_PARSERS, TOOL_PARSERS, Section
from gym_sdk.errors import ConfigurationError, PolicyError, TransportError

__all__ = ["ParseRoutes", "Posts", "SGLangParsers", "Tools", "as_tools"]

_CALLS, _REASONING = "/parse_function_call", "/separate_reasoning"

Tools: TypeAlias = list[dict[str, Any]]
"""Functions on offer, as Chat Completions has them."""


@runtime_checkable
class Posts(Protocol):
    """The way to SGLang."""

    async def post(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Send a JSON object and read one.

        Raises:
            PolicyError: SGLang refuses the request.
            TransportError: no answer came, or none that is a JSON object.
            DeadlineError: the answer did not come in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class SGLangParsers:
    """Which of SGLang's parsers read: at least one.

    Attributes:
        tool: as in `--tool-call-parser`.
        reasoning: as in `--reasoning-parser`.
    """

    tool: str | None = None
    reasoning: str | None = None

    @classmethod
    def of(cls, name: str) -> SGLangParsers:
        """Read `sglang:TOOL`, `sglang:TOOL+REASONING` or `sglang:+REASONING`.

        Raises:
            ConfigurationError: it is none of these.
        """
        tool, plus, reasoning = name.removeprefix(SGLANG).partition("+")
        if not name.startswith(SGLANG) or not (tool or reasoning) or bool(plus) != bool(reasoning):
            raise ConfigurationError(
                f"{name!r} names no parsers of SGLang; write {SGLANG}TOOL, {SGLANG}TOOL+REASONING or "
                f"{SGLANG}+REASONING"
            )
        return cls(tool or None, reasoning or None)

    def __str__(self) -> str:
        return f"{SGLANG}{self.tool or ''}" + (f"+{self.reasoning}" if self.reasoning else "")


class ParseRoutes:
    """Asks one pair of parsers.

    Args:
        client: the way to SGLang.
        parsers: which of its parsers to ask.
    """

    def __init__(self, client: Posts, parsers: SGLangParsers) -> None:
        self.parsers = parsers
        self._client = client
        self._section = TOOL_PARSERS.get(parsers.tool or "")
        self._thought = REASONING_PARSERS.get(parsers.reasoning or "")

    async def ask_calls(self, text: str, tools: Tools) -> tuple[str, list[Call]]:
        """Return the text and the calls that SGLang's tool parser finds.

        Raises:
            TransportError: SGLang does not answer, or answers wrongly.
        """
        body = {"text": text, "tools": tools, "tool_call_parser": self.parsers.tool}
        answer = await self._post(_CALLS, body)
        try:
            normal, calls = (
                answer["normal_text"],
                [(one["name"], one["parameters"]) for one in answer["calls"]],
            )
        except (KeyError, TypeError) as error:
            raise _garbage(_CALLS, answer) from error
        if not isinstance(normal, str) or not all(isinstance(part, str) for call in calls for part in call):
            raise _garbage(_CALLS, answer)
        return normal, [Call(name, arguments) for name, arguments in calls]

    async def ask_reasoning(self, text: str) -> list[tuple[bool, str]]:
        """Return the stretches that SGLang's reasoning parser finds, and whether each is thinking.

        Raises:
            TransportError: SGLang does not answer, or answers wrongly.
        """
        body = {"text": text, "reasoning_parser": self.parsers.reasoning, "return_blocks": True}
        answer = await self._post(_REASONING, body)
        try:
            blocks = [(one["type"], one["text"]) for one in answer["blocks"]]
        except (KeyError, TypeError) as error:
            raise _garbage(_REASONING, answer) from error
        if not all(kind in ("reasoning", "text") and isinstance(said, str) for kind, said in blocks):
            raise _garbage(_REASONING, answer)
        return [(kind == "reasoning", said) for kind, said in blocks if said]

    @property
    def section(self) -> Section | None:
        """The marks around calls, if the tool parser's are known."""
        return self._section

    @property
    def opener(self) -> str | None:
        """The mark that opens thinking, if the reasoning parser's is known."""
        return self._thought.opener if self._thought is not None else None

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._twice(path, body)
        except PolicyError as error:  # what was asked is of this server's making, not its client's
            raise TransportError(
                f"SGLang's {path} refused a text: {error}", retryable=False, status=error.status
            ) from error

    async def _twice(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask again if the connection was lost: parsing changes nothing, and a generation is at stake."""
        try:
            return await self._client.post(path, body)
        except TransportError as error:
            if not error.retryable or error.status is not None:
                raise
        return await self._client.post(path, body)


def as_tools(names: Sequence[str]) -> Tools:
    """Return functions of which only the names are known."""
    return [{"type": "function", "function": {"name": name}} for name in names]


def _garbage(path: str, answer: Mapping[str, Any]) -> TransportError:
    return TransportError(f"SGLang's {path} answered unusably: {str(answer)[:300]}", retryable=False)
