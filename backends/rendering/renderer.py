"""The renderer protocol: what the policy needs to know about one model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backends.rendering.parsing import ParsedOutput
from gym_sdk.schema import FunctionTool, Item

__all__ = ["Bridge", "Conversation", "Renderer"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a prompt is rendered from.

    Attributes:
        items: the history, in order.
        tools: the functions on offer.
        instructions: system text that stands before the items.
        template_kwargs: settings of the chat template, e.g. `{"enable_thinking": False}`.
    """

    items: Sequence[Item]
    tools: Sequence[FunctionTool] = ()
    instructions: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bridge:
    """The outcome of bridging: the next prompt, or why there is none."""

    token_ids: list[int] | None
    reason: str | None = None


class Renderer(Protocol):
    """Renders conversations into token ids and parses generated ids into items."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        ...

    def render(self, conversation: Conversation) -> list[int]:
        """Render everything, up to and including the generation prompt.

        Raises:
            PolicyError: the conversation cannot be expressed in this family's format.
        """
        ...

    def bridge(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by rendering only `conversation.items[start:]` and the generation prompt.

        Args:
            known: prompt and generation of the model call whose last output item is `items[start - 1]`.
            conversation: the whole conversation.
            start: index of the first new item.
        """
        ...

    def parse(self, generation_token_ids: Sequence[int]) -> ParsedOutput:
        """Parse what was sampled. Nothing is lost: what is not markup stays text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        ...
