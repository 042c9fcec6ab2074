"""An OpenAI-compatible aiohttp server over a policy."""

from backends.server.app import make_app
from backends.server.capture import CaptureLimits
from backends.server.run import ServerConfig, serve

__all__ = ["CaptureLimits", "ServerConfig", "make_app", "serve"]
