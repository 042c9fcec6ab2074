"""The server on loopback."""

from support.capturing import renderer, serve

__all__ = ["renderer", "serve"]
