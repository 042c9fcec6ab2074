"""Prompts that were rendered lately: the requests of a group ask for the same one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import to_json

from backends.rendering.renderer import Conversation, Rendered

__all__ = ["RenderCache"]


class RenderCache:
    """Renders each conversation once, as long as it is remembered. The least recently used go first.

    Only for rendering in which nothing but the conversation and its settings matters, e.g. not the time.

    Args:
        render: renders a conversation.
        max_tokens: how many prompt tokens to hold; a longer prompt is not held.
    """

    def __init__(self, render: Callable[[Conversation], Rendered], max_tokens: int = 1_000_000) -> None:
        self._render = render
        self._max_tokens = max_tokens
        self._known: OrderedDict[bytes, Rendered] = OrderedDict()
        self._lock = threading.Lock()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._known)

    def render(self, conversation: Conversation, settings: Mapping[str, Any]) -> Rendered:
        """Return the rendering of a conversation; the ids are the caller's own. Errors are not remembered.

        Args:
            conversation: what to render.
            settings: everything else that the rendering depends on.
        """
        key = _key(conversation, settings)
        if key is None:
            return self._render(conversation)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        if known is None:
            known = self._render(conversation)
            with self._lock:
                self._keep(key, known)
        return Rendered(list(known.token_ids), lambda: list(known.owners))

    def _keep(self, key: bytes, rendered: Rendered) -> None:
        if len(rendered.token_ids) > self._max_tokens:
            return
        if key in self._known:
            return  # another thread rendered it meanwhile
        self._known[key] = rendered
        self.tokens += len(rendered.token_ids)
        while self.tokens > self._max_tokens:
            _, oldest = self._known.popitem(last=False)
            self.tokens -= len(oldest.token_ids)


def _key(conversation: Conversation, settings: Mapping[str, Any]) -> bytes | None:
    """Return all that is rendered, in one text; None if it is no JSON."""
    try:
        return to_json(
            (
                [item.without_tokens().to_wire() for item in conversation.items],
                [tool.to_wire() for tool in conversation.tools],
                conversation.instructions,
                settings,
            ),
            inf_nan_mode="strings",
        )
    except ValueError:
        return None
