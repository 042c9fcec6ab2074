"""Errors of the Responses core, in the words of Chat Completions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from backends.server.surfaces.surface import renamed
from gym_sdk.errors import PolicyError
from gym_sdk.schema import TOKEN_FIELDS

__all__ = ["ChatWords", "Origin"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an item comes from.

    Attributes:
        message: the message's path, such as `messages[2]`.
        path: the item's own, such as `messages[2].tool_calls[0]`.
        names: what the item's fields are called there, if not the same.
    """

    message: str
    path: str
    names: Mapping[str, str] = field(default_factory=dict)

    def named(self, rest: str) -> str:
        """Return the path of a field of the item, which is given as `.content[0].text`."""
        name, end = _split(rest)
        if name in TOKEN_FIELDS:
            return f"{self.message}.{name}{end}"
        return f"{self.path}.{self.names.get(name, name)}{end}" if name else self.path


@dataclass(frozen=True, slots=True)
class ChatWords:
    """Knows the fields of a chat request by their names in the Responses request that was made of it.

    Attributes:
        origins: of the items, in order.
        tools: the kinds of the tools: `function` or `custom`.
        choice: the kind of tool that is demanded.
        allowed: the kinds of the tools that are allowed.
        limit: the field that limits the tokens.
    """

    origins: Sequence[Origin] = ()
    tools: Sequence[str] = ()
    choice: str = "function"
    allowed: Sequence[str] = ()
    limit: str = "max_completion_tokens"

    def __call__(self, error: PolicyError) -> PolicyError:
        """Return an error that names the chat's own field."""
        return renamed(error, self.named)

    def named(self, param: str) -> str:
        """Return the name of a field of the Responses request."""
        for pattern, name in _NAMES:
            match = pattern.fullmatch(param)
            if match is not None:
                return name(self, match)
        return param

    def _item(self, match: re.Match[str]) -> str:
        index = int(match[1])
        return self.origins[index].named(match[2]) if index < len(self.origins) else "messages"

    def _tool(self, match: re.Match[str]) -> str:
        index = int(match[1])
        kind = self.tools[index] if index < len(self.tools) else "function"
        return f"tools[{index}].{kind}.{match[2]}"

    def _allowed(self, match: re.Match[str]) -> str:
        index = int(match[1])
        kind = self.allowed[index] if index < len(self.allowed) else "function"
        return f"tool_choice.allowed_tools.tools[{index}].{kind}.{match[2]}"


def _always(name: str) -> Callable[[ChatWords, re.Match[str]], str]:
    return lambda words, match: match.expand(name)


_NAMES: Sequence[tuple[re.Pattern[str], Callable[[ChatWords, re.Match[str]], str]]] = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"input", _always("messages")),
        (r"input\[(\d+)\](.*)", ChatWords._item),
        (r"tools\[(\d+)\]\.(?!type)(.+)", ChatWords._tool),
        (r"tool_choice\.name", lambda words, match: f"tool_choice.{words.choice}.name"),
        (r"tool_choice\.tools\[(\d+)\]\.(.+)", ChatWords._allowed),
        (r"tool_choice\.(mode|tools)", _always(r"tool_choice.allowed_tools.\1")),
        (r"text\.format(\.type)?", _always(r"response_format\1")),
        (r"text\.format\.(.+)", _always(r"response_format.json_schema.\1")),
        (r"text\.verbosity", _always("verbosity")),
        (r"reasoning\.effort", _always("reasoning_effort")),
        (r"max_output_tokens", lambda words, match: words.limit),
    )
]


def _split(rest: str) -> tuple[str, str]:
    """Split `.content[0].text` into `content` and `[0].text`."""
    match = re.match(r"\.?(\w*)(.*)", rest, re.DOTALL)
    assert match is not None
    return match[1], match[2]
