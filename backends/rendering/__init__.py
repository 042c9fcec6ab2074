"""Items to token ids and back, for one model family."""

from backends.rendering.chat import chat_messages, chat_tools
from backends.rendering.parsing import (
    PARSERS,
    HermesParser,
    ParsedOutput,
    Parser,
    detect_parser,
    make_parser,
)
from backends.rendering.renderer import Bridge, Renderer
from backends.rendering.template import TemplateRenderer

__all__ = [
    "PARSERS",
    "Bridge",
    "HermesParser",
    "ParsedOutput",
    "Parser",
    "Renderer",
    "TemplateRenderer",
    "chat_messages",
    "chat_tools",
    "detect_parser",
    "make_parser",
]
