"""What the policy remembers, and what it forgets."""

from __future__ import annotations

import pytest

from backends.ids import is_own_id, new_id
from backends.memory import CallMemory, HistoryKeys, KnownCall
from backends.rendering.renderer import Conversation
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import FunctionCall, Item, Message, OutputText, Reasoning, TextPart
from gym_sdk.tokens import CallTokens

SETTINGS = Conversation(())
OWN: dict[str, str] = {}
"""Ids of messages, by their text."""


def said(text: str) -> Message:
    return Message(
        id=OWN.setdefault(text, new_id("msg")),
        role="assistant",
        content=[OutputText(text=text, annotations=[])],
    )


def thought(text: str) -> Reasoning:
    return Reasoning(summary=[], content=[TextPart(type="reasoning_text", text=text)])


def known(name: str, parent: KnownCall | None = None, tokens: int = 2) -> KnownCall:
    own = ([1] * (tokens - 1), [2], [-0.5])
    call = CallTokens(*own) if parent is None else CallTokens.extending(parent.tokens, *own)
    key = name.encode()
    return KnownCall(call, parent, (said(name),), 1, SETTINGS, b"", key, key, b"", f"resp_{name}")


def test_the_least_recently_used_goes_first() -> None:
    memory = CallMemory(max_tokens=6)
    calls = [known(name) for name in "abcd"]
    for call in calls:
        memory.remember(call)
        memory.use(calls[0])
    assert len(memory) == 3
    assert memory.ended(b"a") == [calls[0]]
    assert memory.ended(b"b") == []
    assert memory.named("resp_a") is calls[0]
    assert memory.named(OWN["a"]) is calls[0]
    assert memory.named("resp_b") is None
    assert memory.tokens == 6


def test_ids_that_a_policy_samples_itself_name_nobody() -> None:
    sampled = FunctionCall(id=new_id("fc"), call_id="functions.add:0", name="add", arguments="{}")
    call = ended((sampled,), None)
    assert call.ids == {sampled.id}


def test_what_a_kept_call_extends_is_counted_for_as_long() -> None:
    memory = CallMemory(max_tokens=6)
    root = known("root")
    leaf = known("leaf", root)
    for call in (root, leaf, known("x")):
        memory.remember(call)
    assert memory.tokens == 6
    memory.use(leaf)
    memory.remember(known("y"))
    # the root is forgotten, but its tokens are held by the leaf, so the next oldest had to go as well
    assert memory.ended(b"root") == []
    assert memory.ended(b"x") == []
    assert memory.ended(b"leaf") == [leaf]
    assert memory.tokens == 6
    for name in "abc":
        memory.remember(known(name))
    assert memory.tokens == 6
    assert len(memory) == 3


def test_a_long_chain_is_released_without_recursion() -> None:
    memory = CallMemory(max_tokens=10)
    call = known("0")
    for number in range(1, 5_000):
        call = known(str(number), call)
    memory.remember(call)
    assert memory.tokens == 10_000
    memory.remember(known("new"))
    assert memory.tokens == 2
    assert memory.named("resp_4999") is None


def test_calls_that_end_alike_are_all_found_up_to_a_limit() -> None:
    memory = CallMemory()
    for number in range(100):
        call = known(str(number))
        memory.remember(
            KnownCall(call.tokens, None, call.items, 1, SETTINGS, b"", b"k", b"k", b"", f"r{number}")
        )
    found = memory.ended(b"k")
    assert len(found) == 64
    assert found[-1].response_id == "r99"
    assert memory.named("r0") is not None


def test_a_memory_must_hold_something() -> None:
    with pytest.raises(ConfigurationError, match="max_tokens"):
        CallMemory(0)


def keys(*items: Item, **settings: object) -> HistoryKeys:
    return HistoryKeys.of(Conversation(list(items), **settings))  # type: ignore[arg-type]


def test_keys_cover_what_is_said_and_not_its_ids() -> None:
    renamed = said("x").model_copy(update={"id": "other", "status": "completed"})
    assert keys(said("x")).whole(1) == keys(renamed).whole(1)
    assert keys(said("x")).whole(1) != keys(said("y")).whole(1)
    assert keys(said("x")).whole(1) != keys(said("x"), instructions="i").whole(1)
    assert keys(said("x"), said("y")).whole(1) == keys(said("x")).whole(1)


def test_visible_keys_leave_thinking_out() -> None:
    plain, thinking = keys(said("x"), said("y")), keys(thought("t"), said("x"), thought("u"), said("y"))
    assert thinking.visible(4) == plain.visible(2) == plain.whole(2)
    assert thinking.whole(4) != plain.whole(2)


def test_keys_go_on_where_others_ended() -> None:
    whole = keys(said("a"), thought("t"), said("b"))
    start = keys(said("a"), thought("t"))
    rest = HistoryKeys(start.head, start.whole(2), start.visible(2), 2)
    rest.extend([said("b")])
    assert (rest.end, rest.whole(3), rest.visible(3)) == (3, whole.whole(3), whole.visible(3))


def ended(items: tuple[Item, ...], parent: KnownCall | None) -> KnownCall:
    own = ([1], [2], [-1.0])
    tokens = CallTokens(*own) if parent is None else CallTokens.extending(parent.tokens, *own)
    return KnownCall(tokens, parent, items, len(items), SETTINGS, b"", b"", b"", b"")


def test_a_history_agrees_with_missing_thinking_only() -> None:
    first = ended((thought("t"), said("a")), None)
    call = ended((thought("u"), said("b")), first)
    assert call.agrees([thought("t"), said("a"), thought("u"), said("b")])
    assert call.agrees([said("a"), thought("u"), said("b")])
    assert call.agrees([said("a"), said("b")])
    assert not call.agrees([thought("x"), said("a"), said("b")])
    assert not call.agrees([said("b")])
    assert not call.agrees([said("a"), said("a"), said("b")])
    assert call.history() == [*first.items, *call.items]


def test_ids_tell_who_made_them() -> None:
    assert is_own_id(new_id("msg"))
    assert not is_own_id("msg_" + "0" * 24)
    assert not is_own_id("call_1")
    assert not is_own_id("")
