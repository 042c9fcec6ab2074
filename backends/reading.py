"""How generations become items: by the renderer, or by parsers in another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from backends.rendering import ParsedOutput, Renderer
from backends.rendering.renderer import Conversation
from gym_sdk.schema import FunctionTool

__all__ = ["OutputReader", "RendererReader"]


class OutputReader(Protocol):
    """Reads generations; it may have to ask another process."""

    @property
    def name(self) -> str:
        """What reads, e.g. `hermes` or `sglang:hermes+qwen3`."""
        ...

    async def read(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Read one generation; arguments and contract are those of `Parser.parse`.

        Whether it was cut is told by its last id, so that the same ids read the same again. A reader may
        know of nothing that is settled before the end.

        Raises:
            TransportError: the process that reads does not answer, or answers wrongly.
        """
        ...

    async def prover(self, renderer: Renderer, conversation: Conversation) -> Renderer:
        """Return a renderer that reads whatever generation the conversation's items carry, as `read` does.

        The prefix rule asks it whether sampled ids read as the items that stand there.

        Raises:
            TransportError: as `read`.
        """
        ...


class RendererReader:
    """Reads with the renderer's own parser.

    Args:
        renderer: parses.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    @property
    def name(self) -> str:
        """The name of the renderer's parser."""
        parser = getattr(self._renderer, "parser", None)
        return str(getattr(parser, "name", type(self._renderer).__name__))

    async def read(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Read one generation."""
        return self._renderer.parse(generation, prompt=prompt, tools=tools, partial=partial)

    async def prover(self, renderer: Renderer, conversation: Conversation) -> Renderer:
        """Return the renderer: it reads by itself."""
        return renderer
