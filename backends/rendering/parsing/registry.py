"""Parsers by name."""

from __future__ import annotations

from collections.abc import Callable

from backends.rendering.parsing.atem import AtemParser
from backends.rendering.parsing.base import Decoder, Parser
from backends.rendering.parsing.deepseek_v3 import DeepseekV3Parser
from backends.rendering.parsing.gemma4 import Gemma4Parser
from backends.rendering.parsing.glm45 import Glm45Parser
from backends.rendering.parsing.gpt_oss import GptOssParser
from backends.rendering.parsing.hermes import HermesParser
from backends.rendering.parsing.kimi_k2 import KimiK2Parser
from backends.rendering.parsing.llama3_json import Llama3JsonParser
from backends.rendering.parsing.minimax_m2 import MinimaxM2Parser
from backends.rendering.parsing.mistral import MistralParser
from backends.rendering.parsing.plain import PlainParser
from backends.rendering.parsing.pythonic import PythonicParser
from backends.rendering.parsing.qwen3_coder import Qwen3CoderParser
from gym_sdk.errors import ConfigurationError

__all__ = ["PARSERS", "SGLANG", "make_parser"]

SGLANG = "sglang:"
"""How the names of SGLang's parsers begin; they read only where SGLang generates."""

_MAKERS: dict[str, Callable[[Decoder, frozenset[int]], Parser]] = {
    maker.name: maker
    for maker in (
        HermesParser,
        Qwen3CoderParser,
        Llama3JsonParser,
        PythonicParser,
        MistralParser,
        DeepseekV3Parser,
        Glm45Parser,
        KimiK2Parser,
        GptOssParser,
        Gemma4Parser,
        AtemParser,
        MinimaxM2Parser,
        PlainParser,
    )
}

PARSERS: tuple[str, ...] = tuple(_MAKERS)
"""The names that `make_parser` knows."""


def make_parser(name: str, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> Parser:
    """Make the parser of a format.

    Args:
        name: one of `PARSERS`; `detect_parser` finds it for a tokenizer.
        tokenizer: decodes ids.
        stop_token_ids: tokens that end a turn.

    Raises:
        ConfigurationError: there is no parser of that name.
    """
    maker = _MAKERS.get(name)
    if name.startswith(SGLANG):
        raise ConfigurationError(f"the parser {name!r} is SGLang's: only the backend `sglang` reads by it")
    if maker is None:
        raise ConfigurationError(f"there is no parser {name!r}; choose one of {', '.join(PARSERS)}")
    return maker(tokenizer, stop_token_ids)
