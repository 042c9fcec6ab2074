"""What the policy remembers: which tokens stand behind which history."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from pydantic_core import to_json

from backends.rendering.renderer import Conversation
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Message, Reasoning
from gym_sdk.tokens import CallTokens

__all__ = ["CallMemory", "extend_key", "history_keys"]


def history_keys(conversation: Conversation) -> list[bytes]:
    """Return a key for each prefix of the conversation: `keys[n]` stands for its first n items.

    A key covers the instructions, tools, template settings and the content of the items. Item ids, status
    and unknown fields stay out of it, because agents drop them; call ids stay in, because they cannot.
    """
    head = (
        conversation.instructions,
        [tool.to_wire() for tool in conversation.tools],
        sorted(conversation.template_kwargs.items()),
    )
    keys = [_digest(to_json(head))]
    for item in conversation.items:
        keys.append(extend_key(keys[-1], [item]))
    return keys


def extend_key(key: bytes, items: Iterable[Item]) -> bytes:
    """Return the key of the history that `key` stands for, followed by these items."""
    for item in items:
        key = _digest(key + to_json(_content(item)))
    return key


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _content(item: Item) -> Sequence[object]:
    if isinstance(item, Message):
        return ("message", item.role, item.text)
    if isinstance(item, FunctionCall):
        return ("function_call", item.call_id, item.name, item.arguments)
    if isinstance(item, FunctionCallOutput):
        return ("function_call_output", item.call_id, item.text)
    if isinstance(item, Reasoning):
        return ("reasoning", item.text, item.encrypted_content)
    return ("other", item.without_tokens().to_wire())


class CallMemory:
    """Model calls by the key of the history that they ended; the least recently used go first.

    Args:
        max_tokens: how many tokens to hold, over all calls.
    """

    def __init__(self, max_tokens: int = 8_000_000) -> None:
        if max_tokens < 1:
            raise ConfigurationError(f"max_tokens must be positive, not {max_tokens}")
        self._max_tokens = max_tokens
        self._tokens = 0
        self._calls: OrderedDict[bytes, CallTokens] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def remember(self, key: bytes, call: CallTokens) -> None:
        """Store the call under the key of the history that ends with its output."""
        known = self._calls.pop(key, None)
        if known is not None:
            self._tokens -= _size(known)
        self._calls[key] = call
        self._tokens += _size(call)
        while self._tokens > self._max_tokens and len(self._calls) > 1:
            _, dropped = self._calls.popitem(last=False)
            self._tokens -= _size(dropped)

    def recall(self, key: bytes) -> CallTokens | None:
        """Return the call that ended this history, if it is still known."""
        call = self._calls.get(key)
        if call is not None:
            self._calls.move_to_end(key)
        return call


def _size(call: CallTokens) -> int:
    return len(call.prompt_token_ids) + len(call.generation_token_ids)
