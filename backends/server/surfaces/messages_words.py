"""Errors of the Responses core, in the words of the Messages API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backends.server.surfaces.surface import renamed
from gym_sdk.errors import PolicyError

__all__ = ["MessagesWords"]

_NAMES = {
    "instructions": "system",
    "max_output_tokens": "max_tokens",
    "stop": "stop_sequences",
    "text.format": "output_config.format",
    "reasoning.effort": "thinking",
    "reasoning": "thinking",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "user": "metadata.user_id",
    "input": "messages",
}


@dataclass(frozen=True, slots=True)
class MessagesWords:
    """Knows the fields of a request by their names in the Responses request that was made of it.

    Anthropic's errors have no field for a parameter: the message begins with its path.

    Attributes:
        places: of the input's items, in order.
    """

    places: Sequence[str] = ()

    def __call__(self, error: PolicyError) -> PolicyError:
        """Return an error that names the Messages' own field."""
        other = renamed(error, self.named)
        if other.param is not None:
            text = str(other).replace("`required`", "`any`") if "tool_choice" in other.param else str(other)
            other.args = (text if text.startswith(other.param) else f"{other.param}: {text}",)
        return other

    def named(self, param: str) -> str:
        """Return the name of a field of the Responses request."""
        item = re.fullmatch(r"input\[(\d+)\](.*)", param, re.DOTALL)
        if item is not None:
            index = int(item[1])
            return self.places[index] if index < len(self.places) else "messages"
        for name in sorted(_NAMES, key=len, reverse=True):
            if re.match(rf"{re.escape(name)}(?!\w)", param):
                param = _NAMES[name] + param[len(name) :]
                break
        param = re.sub(r"^(tools\[\d+\])\.parameters", r"\1.input_schema", param)
        return re.sub(r"\[(\d+)\]", r".\1", param)
