"""The ways in which a model call is asked for over HTTP."""

from backends.server.surfaces.chat import ChatSurface
from backends.server.surfaces.completions import CompletionSurface
from backends.server.surfaces.messages import MessagesSurface, prompt_request
from backends.server.surfaces.responses import ResponsesSurface
from backends.server.surfaces.surface import Asked, Events, Surface

__all__ = [
    "Asked",
    "ChatSurface",
    "CompletionSurface",
    "Events",
    "MessagesSurface",
    "ResponsesSurface",
    "Surface",
    "prompt_request",
]
