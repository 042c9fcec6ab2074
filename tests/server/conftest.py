"""The server on loopback."""

from support.capturing import renderer, serve
from support.chatting import chat_policy, chat_url

__all__ = ["chat_policy", "chat_url", "renderer", "serve"]
