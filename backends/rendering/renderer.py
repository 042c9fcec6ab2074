"""The renderer protocol: what the policy needs to know about one model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from backends.rendering.parsing import ParsedOutput
from gym_sdk.schema import FunctionTool, Item

__all__ = ["Bridge", "Conversation", "Rendered", "Renderer"]


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

    def until(self, end: int) -> Conversation:
        """Return the conversation that ends before item `end`."""
        return Conversation(self.items[:end], self.tools, self.instructions, self.template_kwargs)


class Rendered:
    """A rendered prompt.

    Args:
        token_ids: the prompt.
        attribute: finds the owners when they are asked for.
    """

    def __init__(self, token_ids: list[int], attribute: Callable[[], list[int]] | None = None) -> None:
        self.token_ids = token_ids
        self._attribute = attribute

    @cached_property
    def owners(self) -> list[int]:
        """For each token the index of the item that it comes from, or -1.

        -1 stands for the instructions, the tools, the generation prompt, and for everything if the template
        rewrites its messages so that it can't be told.
        """
        if self._attribute is None:
            return [-1] * len(self.token_ids)
        return self._attribute()


@dataclass(frozen=True, slots=True)
class Bridge:
    """The outcome of bridging or splicing: the next prompt, or why there is none."""

    token_ids: list[int] | None
    reason: str | None = None


class Renderer(Protocol):
    """Renders conversations into token ids and parses generated ids into items."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        ...

    def render(self, conversation: Conversation) -> Rendered:
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

    def splice(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by what a rendering of the whole conversation has after `items[start - 1]`.

        It costs as much as `render`; the arguments are those of `bridge`.
        """
        ...

    def drops_thinking(self, conversation: Conversation, start: int) -> bool:
        """Whether a full rendering leaves out thinking that was sampled before `items[start]`."""
        ...

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse what was sampled, as `Parser.parse`. Nothing is lost: what is not markup stays text.

        Args:
            generation: the sampled ids.
            prompt: the ids that they followed; they may have opened the thinking.
            tools: the functions on offer, whose types decide how arguments read.
            partial: whether the generation goes on: only what is settled is returned.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        ...
