"""Items to token ids and back, for one model family."""

from backends.rendering.chat import chat_messages, chat_tools
from backends.rendering.parsing import HermesParser, ParsedOutput
from backends.rendering.renderer import Bridge, Renderer
from backends.rendering.template import TemplateRenderer

__all__ = [
    "Bridge",
    "HermesParser",
    "ParsedOutput",
    "Renderer",
    "TemplateRenderer",
    "chat_messages",
    "chat_tools",
]
