"""What the policy remembers: which tokens stand behind which history."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pydantic_core import to_json

from backends.ids import is_own_id
from backends.rendering.renderer import Conversation
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Message, Reasoning
from gym_sdk.tokens import CallTokens

__all__ = ["CallMemory", "HistoryKeys", "KnownCall", "content", "head_key", "one_spelling"]


def content(item: Item) -> tuple[object, ...]:
    """Return what an item says.

    Ids, status and unknown fields stay out, because agents drop them; call ids stay in, because they cannot.
    Arguments count as the JSON that they are, because some agents write them anew.
    """
    if isinstance(item, Message):
        return ("message", item.role, item.text)
    if isinstance(item, FunctionCall):
        return ("function_call", item.call_id, item.name, one_spelling(item.arguments))
    if isinstance(item, FunctionCallOutput):
        return ("function_call_output", item.call_id, item.text)
    if isinstance(item, Reasoning):
        return ("reasoning", item.text, item.encrypted_content)
    return ("other", item.type, to_json(item.without_tokens().to_wire()))


def one_spelling(text: str) -> str:
    """Return JSON arguments in one spelling; what is no object, or names a key twice, stays as it is."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return text
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _is_empty(item: Item) -> bool:
    """Whether the item says nothing: thinking without text, which some agents leave of what they drop."""
    return isinstance(item, Reasoning) and not item.text and not item.encrypted_content


class HistoryKeys:
    """Keys for the prefixes of a history.

    `whole(n)` stands for the first n items, `visible(n)` for the same without thinking, which many agents
    drop. Both begin with the scope, instructions, tools and template settings (`head`).

    Args:
        head: the key of the scope and settings.
        whole: the key of the items before `start`.
        visible: the same, without thinking.
        start: the first n for which there is a key.
        scope: the scope that `head` covers.
    """

    def __init__(self, head: bytes, whole: bytes, visible: bytes, start: int = 0, scope: str = "") -> None:
        self.head = head
        self.scope = scope
        self.start = start
        self._whole = [whole]
        self._visible = [visible]

    def whole(self, end: int) -> bytes:
        """Return the key of the first `end` items."""
        return self._whole[end - self.start]

    def visible(self, end: int) -> bytes:
        """Return the key of the first `end` items, without thinking."""
        return self._visible[end - self.start]

    @property
    def end(self) -> int:
        """How many items the keys cover."""
        return self.start + len(self._whole) - 1

    @classmethod
    def of(cls, conversation: Conversation, scope: str = "") -> HistoryKeys:
        """Return the keys of a conversation."""
        key = head_key(conversation, scope)
        keys = cls(key, key, key, scope=scope)
        keys.extend(conversation.items)
        return keys

    def extend(self, items: Iterable[Item]) -> None:
        """Add items to the end of the history."""
        for item in items:
            if _is_empty(item):
                self._whole.append(self._whole[-1])
                self._visible.append(self._visible[-1])
                continue
            said = to_json(content(item))
            self._whole.append(_digest(self._whole[-1] + said))
            if isinstance(item, Reasoning):
                self._visible.append(self._visible[-1])
            elif self._visible[-1] == self._whole[-2]:
                self._visible.append(self._whole[-1])
            else:
                self._visible.append(_digest(self._visible[-1] + said))


def head_key(conversation: Conversation, scope: str) -> bytes:
    """Return the key of a scope and a conversation's settings."""
    head = (
        scope,
        conversation.instructions,
        [tool.to_wire() for tool in conversation.tools],
        sorted(conversation.template_kwargs.items()),
    )
    return _digest(to_json(head))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


@dataclass(frozen=True, slots=True, eq=False)
class KnownCall:
    """A model call whose tokens are known, with the history that it ended.

    Attributes:
        tokens: what was prompted and sampled.
        parent: the call that this one extends; its items come before `items`.
        items: the history's items since the parent, the call's own output last.
        outputs: how many of `items` the call sampled.
        settings: the instructions, tools and template settings of the call; without items.
        head: the key of the scope and the settings.
        whole: the key of the history.
        visible: the key of the history without thinking.
        asked: the same, of the history before the call's output.
        response_id: the response that carried it; empty if items that a client sent told of it.
        scope: what the head's scope is.
    """

    tokens: CallTokens
    parent: KnownCall | None
    items: tuple[Item, ...]
    outputs: int
    settings: Conversation
    head: bytes
    whole: bytes
    visible: bytes
    asked: bytes
    response_id: str = ""
    scope: str = ""

    @property
    def output(self) -> tuple[Item, ...]:
        """The items that the call sampled."""
        return self.items[len(self.items) - self.outputs :]

    @property
    def keys(self) -> set[bytes]:
        """The keys under which the call is found."""
        return {self.whole, self.visible}

    @property
    def ids(self) -> set[str]:
        """The ids under which agents may refer to the call: of its response, its items and its calls.

        Call ids that the policy sampled itself are left out: others sample the same.
        """
        names = [getattr(item, name, None) or "" for item in self.output for name in ("id", "call_id")]
        return {name for name in names if is_own_id(name)} | ({self.response_id} - {""})

    def history(self) -> list[Item]:
        """Return all items up to and including the call's output."""
        return [item for call in reversed(list(self.chain())) for item in call.items]

    def chain(self) -> Iterator[KnownCall]:
        """Yield this call and those that it extends, newest first."""
        call: KnownCall | None = self
        while call is not None:
            yield call
            call = call.parent

    def agrees(self, history: Sequence[Item]) -> bool:
        """Whether a history says what this one says; thinking may be missing from it."""
        history = [item for item in history if not _is_empty(item)]
        position = len(history) - 1
        for call in self.chain():
            for item in reversed(call.items):
                if position >= 0 and content(history[position]) == content(item):
                    position -= 1
                elif not isinstance(item, Reasoning):
                    return False
        return position < 0


class CallMemory:
    """Model calls by the history that they ended and by the ids that they were given.

    The least recently used go first. A call that another one extends stays in memory with it, and counts. It
    may be asked and told from any thread.

    Args:
        max_tokens: how many tokens to hold, over all calls.
    """

    _MAX_ALIKE = 64

    def __init__(self, max_tokens: int = 8_000_000) -> None:
        if max_tokens < 1:
            raise ConfigurationError(f"max_tokens must be positive, not {max_tokens}")
        self._max_tokens = max_tokens
        self.tokens = 0
        self._order: OrderedDict[KnownCall, None] = OrderedDict()
        self._holders: dict[KnownCall, int] = {}
        self._by_key: dict[bytes, list[KnownCall]] = {}
        self._by_id: dict[str, KnownCall] = {}
        self._asked: Counter[bytes] = Counter()
        self._said: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._order)

    def remember(self, call: KnownCall) -> None:
        """Store a call."""
        with self._lock:
            self._order[call] = None
            self._hold(call)
            for key in call.keys:
                alike = self._by_key.setdefault(key, [])
                alike.append(call)
                if len(alike) > self._MAX_ALIKE:
                    del alike[0]
            for name in call.ids:
                self._by_id[name] = call
            self._asked[call.asked] += 1
            self._said.update(_sayings(call))
            while self.tokens > self._max_tokens and len(self._order) > 1:
                oldest, _ = self._order.popitem(last=False)
                self._forget(oldest)

    def ended(self, key: bytes) -> list[KnownCall]:
        """Return the calls that ended the history with this key, oldest first."""
        return list(self._by_key.get(key, ()))

    def named(self, name: str) -> KnownCall | None:
        """Return the call with this response id, item id or call id."""
        return self._by_id.get(name)

    def unname(self, name: str) -> None:
        """Let no id lead to the call with this one any more; its history still does."""
        with self._lock:
            call = self._by_id.get(name)
            for own in call.ids if call is not None else ():
                if self._by_id.get(own) is call:
                    del self._by_id[own]

    def asked(self, key: bytes) -> bool:
        """Whether a call was made after the history with this key, thinking left out."""
        return key in self._asked

    def said(self, item: Item, scope: str) -> bool:
        """Whether an item says what was sampled in this scope; always False without a scope.

        All clients share the empty scope, so that equal words say nothing there.
        """
        return bool(scope) and _saying(item, scope) in self._said

    def use(self, call: KnownCall) -> None:
        """Note that a call is in use, so that it is kept longer."""
        with self._lock:
            if call in self._order:
                self._order.move_to_end(call)

    def _hold(self, call: KnownCall) -> None:
        for held in call.chain():
            count = self._holders.get(held, 0)
            self._holders[held] = count + 1
            if count:
                return
            self.tokens += held.tokens.own_tokens

    def _release(self, call: KnownCall) -> None:
        for held in call.chain():
            self._holders[held] -= 1
            if self._holders[held]:
                return
            del self._holders[held]
            self.tokens -= held.tokens.own_tokens

    def _forget(self, call: KnownCall) -> None:
        for key in call.keys:
            alike = self._by_key.get(key, [])
            if call in alike:
                alike.remove(call)
            if not alike:
                self._by_key.pop(key, None)
        for name in call.ids:
            if self._by_id.get(name) is call:
                del self._by_id[name]
        self._asked[call.asked] -= 1
        self._said.subtract(_sayings(call))
        for counter in (self._asked, self._said):
            for key in [call.asked, *_sayings(call)]:
                if counter.get(key) == 0:
                    del counter[key]
        self._release(call)


def _sayings(call: KnownCall) -> list[bytes]:
    """Return keys of what a call in a scope said, thinking left out."""
    if not call.scope:
        return []
    return [_saying(item, call.scope) for item in call.output if not isinstance(item, Reasoning)]


def _saying(item: Item, scope: str) -> bytes:
    return _digest(to_json((scope, content(item))))
