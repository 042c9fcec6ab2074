"""Generated token ids into items: thinking, text and tool calls, by one parser for each format.

Where the tokenizer has markup as single tokens, only those tokens count: the same characters spelled out of
ordinary tokens are text. Nothing sampled is lost: what does not parse as a call stays text in its place.
"""

from backends.rendering.parsing.base import Decoder, ParsedOutput, Parser
from backends.rendering.parsing.detection import detect_parser
from backends.rendering.parsing.hermes import HermesParser
from backends.rendering.parsing.registry import PARSERS, SGLANG, make_parser

__all__ = [
    "PARSERS",
    "SGLANG",
    "Decoder",
    "HermesParser",
    "ParsedOutput",
    "Parser",
    "detect_parser",
    "make_parser",
]
