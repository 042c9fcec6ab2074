"""The prefix rule: the next prompt extends what was sampled, or is a fork with a reason."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Literal, TypeAlias

from backends.ids import is_own_id
from backends.memory import CallMemory, HistoryKeys, KnownCall, content, head_key, one_spelling
from backends.rendering.chat import is_policy_item
from backends.rendering.renderer import Conversation, Renderer
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, Item, Message, Reasoning
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["Prompt", "Step", "Thinking", "next_prompt"]

Thinking: TypeAlias = Literal["keep", "template"]
"""What becomes of thinking in earlier turns: `keep` it, or fork where the `template` drops it."""


class Step(StrEnum):
    """How a prompt was made."""

    START = "start"
    """Rendered: nothing of this history was sampled here."""
    BRIDGE = "bridge"
    """What was sampled, and the rendering of what is new."""
    SPLICE = "splice"
    """What was sampled, and the end of a rendering of everything."""
    FORK = "fork"
    """Rendered, although some of this history was sampled here: it does not extend that."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The next prompt.

    Attributes:
        token_ids: what the engine is conditioned on.
        keys: the keys of the history it was made from.
        step: how it was made.
        parent: the model call that it extends; None for `START` and `FORK`.
        known_items: how many items of the history that call covers.
        fork: why it does not extend the newest model call of the history; None if it does, or if there
            is no model call in the history. It may still extend an older one.
    """

    token_ids: list[int]
    keys: HistoryKeys
    step: Step
    parent: KnownCall | None = None
    known_items: int = 0
    fork: str | None = None

    @property
    def affinity(self) -> str:
        """Names what shares this prompt's beginning: the prompt with which the conversation began."""
        ids = self.token_ids
        if self.parent is not None:
            *_, first = self.parent.chain()
            ids = first.tokens.prompt_token_ids
        return blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest()

    def tokens_of(
        self,
        generation: list[int],
        log_probs: list[float],
        weight_versions: tuple[WeightSpan, ...] = (),
    ) -> CallTokens:
        """Return the tokens of the model call that followed this prompt with a generation."""
        if self.parent is None:
            return CallTokens(self.token_ids, generation, log_probs, weight_versions)
        parent = self.parent.tokens
        new = self.token_ids[parent.total_tokens :]
        return CallTokens.extending(parent, new, generation, log_probs, weight_versions)

    def call(
        self, conversation: Conversation, output: Sequence[Item], tokens: CallTokens, response_id: str = ""
    ) -> KnownCall:
        """Return what is to be remembered of the model call that followed this prompt.

        Args:
            conversation: what the prompt was made from.
            output: the items that were sampled.
            tokens: the call's tokens.
            response_id: the response that carries them.
        """
        new = [item.without_tokens() for item in conversation.items[self.known_items :]]
        last = self.keys.end
        keys = HistoryKeys(
            self.keys.head, self.keys.whole(last), self.keys.visible(last), last, self.keys.scope
        )
        keys.extend(output)
        return KnownCall(
            tokens=tokens,
            parent=self.parent,
            items=(*new, *output),
            outputs=len(output),
            settings=conversation.until(0),
            head=keys.head,
            whole=keys.whole(keys.end),
            visible=keys.visible(keys.end),
            asked=keys.visible(last),
            scope=keys.scope,
            response_id=response_id,
        )


def next_prompt(
    conversation: Conversation,
    renderer: Renderer,
    memory: CallMemory,
    *,
    scope: str = "",
    thinking: Thinking = "keep",
    previous: KnownCall | None = None,
) -> Prompt:
    """Make the next prompt by the prefix rule.

    If the tokens of a model call in the history are known and proven, the prompt is exactly that call's
    prompt and generation, followed by the rendering of everything after it. Known means that the items
    carry the token fields, or that the memory holds them; proven means that the call's prompt is what this
    history leads to and that its generation parses to the items that stand there. What is not proven is
    rendered anew, and reported as a fork.

    Args:
        conversation: the history, tools and settings.
        renderer: the model family's format.
        memory: earlier calls; those that the items tell of are added.
        scope: what is remembered is kept apart by it.
        thinking: what becomes of thinking in earlier turns.
        previous: the call that the conversation continues, if the request names it: its history comes first
            in the conversation.

    Raises:
        PolicyError: the conversation cannot be rendered.
    """
    ladder = _Ladder(conversation, renderer, memory, _keys(conversation, scope, previous), thinking)
    return ladder.climb(previous)


class _Ladder:
    """One prompt in the making."""

    def __init__(
        self,
        conversation: Conversation,
        renderer: Renderer,
        memory: CallMemory,
        keys: HistoryKeys,
        thinking: Thinking,
    ) -> None:
        self._conversation = conversation
        self._renderer = renderer
        self._memory = memory
        self._thinking = thinking
        self._items = conversation.items
        self._keys = keys

    def climb(self, previous: KnownCall | None) -> Prompt:
        first = self._keys.start
        carriers = [end for end in range(len(self._items), first, -1) if _may_end_call(self._items, end)]
        known, end, doubt = self._newest_known(carriers)
        if known is None and first:  # the keys begin after the previous call, whose settings are these
            known, end = previous, first
        for position in reversed(carriers):
            sent = self._items[position - 1].tokens
            if position <= end or sent is None:
                continue
            reason = self._why_unproven(sent, position, known, end)
            if reason is not None:
                doubt = f"the tokens on input[{position - 1}] are not proven: {reason}"
                break
            known, end, doubt = self._learn(sent, position, known, end), position, None
        if known is None:
            changed = "the instructions, tools or template settings changed" if previous is not None else None
            return self._rendered(changed or doubt or self._why_not_newest(0))
        self._memory.use(known)
        if self._thinking == "template" and self._loses_thinking(known, end):
            return self._rendered("the chat template drops the thinking of earlier turns")
        return self._extended(known, end, doubt or self._why_not_newest(end))

    def _newest_known(self, carriers: Sequence[int]) -> tuple[KnownCall | None, int, str | None]:
        """Return the newest remembered call of the history, where it ends, and why it isn't a newer one."""
        doubt: str | None = None
        for end in carriers:
            found = self._remembered(end)
            sent = self._items[end - 1].tokens
            if sent is not None:
                found = [call for call in found if _same(call.tokens, sent)]
            if not found:
                continue
            call = _the_one(found, _turn_ids(self._items, end))
            if call is not None:
                return call, end, doubt
            doubt = doubt or f"{len(found)} remembered generations read like input[{end - 1}]"
        return None, 0, doubt

    def _remembered(self, end: int) -> list[KnownCall]:
        """Return the calls that ended the history before `items[end]`."""
        key, visible = self._keys.whole(end), self._keys.visible(end)
        exact = [call for call in self._memory.ended(key) if call.whole == key]
        if self._thinking == "template":
            return exact
        alike = [call for call in self._memory.ended(visible) if call.whole != key]
        history = self._items[:end]
        return exact + [call for call in alike if call.agrees(history)]

    def _why_unproven(self, sent: CallTokens, position: int, known: KnownCall | None, end: int) -> str | None:
        """Return why the sent tokens cannot be what this history sampled, or None if they are proven."""
        parsed = self._renderer.parse(
            sent.generation_token_ids, prompt=sent.prompt_token_ids, tools=self._conversation.tools
        ).items
        start = position - len(parsed)
        if start < end or not _reads_as(parsed, self._items[start:position]):
            return "the generation does not read as the items that stand there"
        before = self._conversation.until(start)
        prompt = sent.prompt_token_ids
        try:
            if known is not None and _extend(known, end, before, self._renderer)[0] == prompt:
                return None
            if self._renderer.render(before).token_ids == prompt:
                return None
        except PolicyError as error:
            return str(error)
        return "the history before it does not lead to its prompt"

    def _learn(self, sent: CallTokens, position: int, known: KnownCall | None, end: int) -> KnownCall:
        """Remember a call that the items told of and that is proven."""
        parsed = self._renderer.parse(
            sent.generation_token_ids, prompt=sent.prompt_token_ids, tools=self._conversation.tools
        ).items
        tokens = sent
        if known is not None and _extends(sent, known.tokens):
            tokens = CallTokens.extending(
                known.tokens,
                sent.prompt_token_ids[known.tokens.total_tokens :],
                sent.generation_token_ids,
                sent.generation_log_probs,
                sent.weight_versions,
            )
        else:
            known, end = None, 0
        call = KnownCall(
            tokens=tokens,
            parent=known,
            items=tuple(item.without_tokens() for item in self._items[end:position]),
            outputs=len(parsed),
            settings=self._conversation.until(0),
            head=self._keys.head,
            whole=self._keys.whole(position),
            visible=self._keys.visible(position),
            asked=self._keys.visible(position - len(parsed)),
            scope=self._keys.scope,
        )
        self._memory.remember(call)
        return call

    def _extended(self, known: KnownCall, end: int, fork: str | None) -> Prompt:
        ids, step, reason = _extend(known, end, self._conversation, self._renderer)
        if ids is None:
            return self._rendered(reason)
        return Prompt(ids, self._keys, step, known, end, fork)

    def _rendered(self, fork: str | None) -> Prompt:
        ids = self._renderer.render(self._conversation).token_ids
        return Prompt(ids, self._keys, Step.START if fork is None else Step.FORK, fork=fork)

    def _why_not_newest(self, end: int) -> str | None:
        """Return why sampled items after `items[:end]` are not known, if there are any."""
        lost: str | None = None
        for index in range(len(self._items) - 1, end - 1, -1):
            item = self._items[index]
            if not is_policy_item(item):
                continue
            for name in _names(item):
                call = self._memory.named(name)
                if call is not None:
                    return self._why_changed(call, index)
                if lost is None and is_own_id(name):
                    lost = f"input[{index}] was sampled here, but its tokens are not remembered any more"
            follows = index > end and is_policy_item(self._items[index - 1])
            if lost is None and not follows and self._memory.asked(self._keys.visible(index)):
                lost = f"input[{index}] stands where the policy was asked, and is not what it said"
            if lost is None and self._memory.said(item, self._keys.scope):
                lost = f"input[{index}] was sampled here, and what stood before it changed"
        return lost

    def _why_changed(self, call: KnownCall, index: int) -> str:
        if call.head != self._keys.head:
            return "the instructions, tools or template settings changed"
        same = any(content(self._items[index]) == content(own) for own in call.items)
        where = "the history before it" if same else "it"
        return f"input[{index}] was sampled here, and {where} was edited since"

    def _loses_thinking(self, known: KnownCall, end: int) -> bool:
        sampled = (item for call in known.chain() for item in call.output)
        thought = any(isinstance(item, Reasoning) and item.text for item in sampled)
        return thought and self._renderer.drops_thinking(self._conversation, end)


def _keys(conversation: Conversation, scope: str, previous: KnownCall | None) -> HistoryKeys:
    """Return the keys of the conversation; if it continues a call with its settings, only those after it."""
    if previous is None:
        return HistoryKeys.of(conversation, scope)
    settings = conversation.until(0)
    head = previous.head if settings == previous.settings else head_key(conversation, scope)
    if head != previous.head:
        return HistoryKeys.of(conversation, scope)
    start = sum(len(call.items) for call in previous.chain())
    keys = HistoryKeys(head, previous.whole, previous.visible, start, scope)
    keys.extend(conversation.items[start:])
    return keys


def _may_end_call(items: Sequence[Item], end: int) -> bool:
    """Whether a model call may have ended right before `items[end]`."""
    if items[end - 1].tokens is not None:
        return True
    return is_policy_item(items[end - 1])


def _extend(
    known: KnownCall, end: int, conversation: Conversation, renderer: Renderer
) -> tuple[list[int] | None, Step, str | None]:
    """Return the prompt that extends `known`, or why there is none."""
    tokens = known.tokens.token_ids
    bridge = renderer.bridge(tokens, conversation, end)
    if bridge.token_ids is not None:
        return bridge.token_ids, Step.BRIDGE, None
    splice = renderer.splice(tokens, conversation, end)
    if splice.token_ids is not None:
        return splice.token_ids, Step.SPLICE, None
    return None, Step.FORK, bridge.reason


def _the_one(found: Sequence[KnownCall], ids: set[str]) -> KnownCall | None:
    """Return the call that is meant: by its ids, else any if all have the same tokens, else none."""
    named = [call for call in found if ids & call.ids]
    found = named or found
    newest = found[-1]
    return newest if all(call is newest or _same(call.tokens, newest.tokens) for call in found) else None


def _turn_ids(items: Sequence[Item], end: int) -> set[str]:
    ids: set[str] = set()
    for index in range(end - 1, -1, -1):
        if not is_policy_item(items[index]):
            break
        ids.update(_names(items[index]))
    return ids


def _names(item: Item) -> list[str]:
    """Return the ids by which an item may be known."""
    names = (getattr(item, "id", None), getattr(item, "call_id", None))
    return [name for name in names if name]


def _same(one: CallTokens, other: CallTokens) -> bool:
    if one.prompt_length != other.prompt_length or one.generation_token_ids != other.generation_token_ids:
        return False
    if one.parent is other.parent:
        return one.new_prompt_ids == other.new_prompt_ids
    return one.prompt_token_ids == other.prompt_token_ids


def _extends(call: CallTokens, parent: CallTokens) -> bool:
    return call.prompt_token_ids[: parent.total_tokens] == parent.token_ids


def _reads_as(parsed: Sequence[Item], written: Sequence[Item]) -> bool:
    """Compare what a generation says with what stands in the history; ids do not matter."""
    return [_said(item) for item in parsed] == [_said(item) for item in written]


def _said(item: Item) -> tuple[str, ...]:
    if isinstance(item, Message | Reasoning):
        return (item.type, item.text)
    if isinstance(item, FunctionCall):
        return (item.type, item.name, one_spelling(item.arguments))
    return (item.type,)
