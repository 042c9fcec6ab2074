"""`POST /v1/chat/completions`: OpenAI's older API over the same policy."""

from __future__ import annotations

from functools import partial
from typing import Any

from backends.server.surfaces.chat_completion import chat_completion
from backends.server.surfaces.chat_events import ChatEvents
from backends.server.surfaces.chat_request import ChatRequest
from backends.server.surfaces.surface import Asked
from gym_sdk.schema import TokenForm

__all__ = ["ChatSurface"]


class ChatSurface:
    """Reads and writes Chat Completions."""

    name = "chat/completions"
    has_forms = False

    def read(self, body: dict[str, Any], *, model: str, form: TokenForm) -> Asked:
        """Read a request's body; see `Surface.read`."""
        chat = ChatRequest.read(body)
        events = ChatEvents(chat.shown, include_usage=chat.include_usage)
        return Asked(
            chat.choices,
            partial(chat_completion, shown=chat.shown),
            events if chat.streams else None,
            worded=chat.words,
        )
