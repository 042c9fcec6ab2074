"""What every parser takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gym_sdk.schema import FunctionTool, Item

__all__ = ["Decoder", "ParsedOutput", "Parser"]


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
        items: output items in the order of sampling; at least one, unless the generation goes on.
        reasoning_tokens: how many sampled tokens were thinking.
        unparsed_calls: pieces of tool-call markup that did not parse and stayed text.
        open: whether the last item goes on: its text is the beginning of what it will be.
    """

    items: list[Item] = field(default_factory=list)
    reasoning_tokens: int = 0
    unparsed_calls: int = 0
    open: bool = False


class Parser(Protocol):
    """Turns the ids of one generation into items."""

    @property
    def name(self) -> str:
        """The format's name, one of `PARSERS`."""
        ...

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse one generation. Nothing is lost: what is not a call or thinking stays text.

        The same ids give the same content; only fresh ids of items and calls differ.

        A partial parse gives what is settled: whatever is sampled next, the whole parse begins with these
        items. What may still become markup, a call or another character is held back, and if nothing is
        settled there are no items. The counts are those of the moment.

        Args:
            generation: the sampled ids, the stop token included or not.
            prompt: the ids that it followed. Its last turn decides whether the generation starts inside
                thinking; without a prompt, a closing mark that nothing opened decides.
            tools: the functions on offer; their schemas type the arguments of formats that write no types.
            partial: whether the generation goes on.
        """
        ...
