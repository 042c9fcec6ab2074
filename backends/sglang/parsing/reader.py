"""Generations read by the parsers of a running SGLang, for formats that no parser here reads."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from pydantic_core import to_json

from backends.reading import RendererReader
from backends.rendering import ParsedOutput, Renderer
from backends.rendering.parsing import SGLANG
from backends.rendering.renderer import Bridge, Conversation, Rendered
from backends.sglang.facts import Facts
from backends.sglang.parsing.marks import REASONING_PARSERS, TOOL_PARSERS
from backends.sglang.parsing.routes import ParseRoutes, Posts, SGLangParsers, as_tools
from backends.sglang.parsing.text import TextReading
from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.schema import FunctionTool

__all__ = ["SGLangReader", "open_sglang_reader", "sglang_reader"]

_log = logging.getLogger(__name__)

_LOOK = 64
"""How many ids at a prompt's end are looked at for an opening mark of thinking."""
_READINGS = 16_384
"""How many readings are held to prove histories with."""


async def sglang_reader(
    client: Posts, facts: Facts, renderer: Renderer, parser: str | None
) -> SGLangReader | None:
    """Return what reads generations, if that is SGLang.

    It is if `parser` says so, or if `parser` is None, the renderer has no parser for the model and SGLang was
    started with parsers.

    Args:
        client: the way to SGLang. It stays the caller's.
        facts: what it was started with.
        renderer: decodes ids, and knows what ends a turn.
        parser: as `RenderingConfig.parser`.

    Raises:
        ConfigurationError: SGLang has no such parser.
        TransportError: SGLang does not answer.
    """
    if parser is not None:
        if not parser.startswith(SGLANG):
            return None
        parsers = SGLangParsers.of(parser)
        why = "as was asked for"
    else:
        tool, reasoning = facts.tool_parser, facts.reasoning_parser
        if RendererReader(renderer).name != "none" or (tool or reasoning) is None:
            return None
        parsers = SGLangParsers(tool, reasoning)
        why = "which it was started with, as no parser here reads what the chat template writes"
    reader = await open_sglang_reader(client, parsers, renderer)
    _log.info("generations are read by %s, %s", reader.name, why)
    return reader


async def open_sglang_reader(client: Posts, parsers: SGLangParsers, renderer: Renderer) -> SGLangReader:
    """Return a reader, once SGLang has shown that it has the parsers.

    No route lists the parsers; each is tried on a word.

    Args:
        client: the way to SGLang. It stays the caller's.
        parsers: which.
        renderer: decodes ids, and knows what ends a turn.

    Raises:
        ConfigurationError: SGLang has no such parser, or it cannot be used through its route.
        TransportError: SGLang does not answer.
    """
    reader = SGLangReader(client, parsers, renderer)
    for kind, name, known in (
        ("tool", parsers.tool, TOOL_PARSERS),
        ("reasoning", parsers.reasoning, REASONING_PARSERS),
    ):
        if name is None:
            continue
        try:
            if kind == "tool":
                await reader.routes.ask_calls("word", as_tools(["word"]))
            else:
                await reader.routes.ask_reasoning("word")
        except TransportError as error:
            if error.status not in (400, 404, 500):
                raise
            raise ConfigurationError(
                f"this SGLang reads nothing with the {kind} parser {name!r} ({error}); "
                f"SGLang 0.5.23 has {', '.join(sorted(known))}"
            ) from error
    return reader


class SGLangReader:
    """Reads generations through SGLang's parse routes.

    The routes take a whole text, and some parsers lose what stands between and after calls, calls of
    functions that are not on offer, and calls that are no JSON. So where a parser's calls stand between
    marks, each section goes alone, and what does not become a call stays text. Formats without marks go as a
    whole: of them the text that the parser gives back is kept, or all if it finds no call in what it takes.

    Marks count also where they are spelled out of ordinary tokens, because SGLang sees only text. Arguments
    are written anew by most parsers, and ids of calls are made here.

    Args:
        client: the way to SGLang.
        parsers: which of its parsers read.
        renderer: decodes ids, and knows what ends a turn.
    """

    def __init__(self, client: Posts, parsers: SGLangParsers, renderer: Renderer) -> None:
        self.routes = ParseRoutes(client, parsers)
        self._renderer = renderer
        self._readings: OrderedDict[bytes, ParsedOutput] = OrderedDict()

    @property
    def name(self) -> str:
        """The parsers, as `SGLangParsers.of` reads them."""
        return str(self.routes.parsers)

    async def read(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Read one generation; see `OutputReader.read`. Before its end nothing is known."""
        if partial:
            return ParsedOutput()
        opened = self._opened_by(prompt)
        output = await TextReading(self.routes, self._renderer, generation, opened, tools).read()
        self._readings[_key(generation, opened, tools)] = output
        if len(self._readings) > _READINGS:
            self._readings.popitem(last=False)
        return output

    async def prover(self, renderer: Renderer, conversation: Conversation) -> Renderer:
        """Return a renderer that knows what the generations in a conversation say.

        What this process read before is not read again; after a restart it is, once.
        """
        known: dict[bytes, ParsedOutput] = {}
        tools = conversation.tools
        for item in conversation.items:
            sent = item.tokens
            if sent is None:
                continue
            generation, prompt = sent.generation_token_ids, sent.prompt_token_ids
            key = _key(generation, self._opened_by(prompt), tools)
            if key in self._readings:
                self._readings.move_to_end(key)
                known[key] = self._readings[key]
            elif key not in known:
                known[key] = await self.read(generation, prompt=prompt, tools=tools)
        return _Prover(renderer, self, known)

    def key(self, generation: Sequence[int], prompt: Sequence[int], tools: Sequence[FunctionTool]) -> bytes:
        """Return what a reading depends on."""
        return _key(generation, self._opened_by(prompt), tools)

    def _opened_by(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends in an opened thought.

        The route takes no word on that, so the mark goes before the text. Only the very end counts: further
        up users may have written the mark.
        """
        opener = self.routes.opener
        if opener is None or not prompt:
            return False
        return self._renderer.decode(prompt[-_LOOK:]).rstrip().endswith(opener.rstrip())


def _key(generation: Sequence[int], opened: bool, tools: Sequence[FunctionTool]) -> bytes:
    said = to_json((list(generation), opened, [tool.to_wire() for tool in tools]))
    return blake2b(said, digest_size=16).digest()


class _Prover:
    """The renderer, with readings that were made before in place of its parser."""

    def __init__(self, renderer: Renderer, reader: SGLangReader, known: Mapping[bytes, ParsedOutput]) -> None:
        self._renderer = renderer
        self._reader = reader
        self._known = known

    @property
    def tokenizer(self) -> Any:
        return self._renderer.tokenizer

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self._renderer.stop_token_ids

    def render(self, conversation: Conversation) -> Rendered:
        return self._renderer.render(conversation)

    def bridge(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        return self._renderer.bridge(known, conversation, start)

    def splice(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        return self._renderer.splice(known, conversation, start)

    def drops_thinking(self, conversation: Conversation, start: int) -> bool:
        return self._renderer.drops_thinking(conversation, start)

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        if partial:
            return ParsedOutput()
        return self._known[self._reader.key(generation, prompt, tools)]

    def encode(self, text: str) -> list[int]:
        return self._renderer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._renderer.decode(token_ids)
