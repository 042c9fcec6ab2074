"""Where an assistant turn ends in a rendering, and what follows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.trained import byte_level_tokenizer

from backends.rendering.chat import chat_messages
from backends.rendering.neutral import earlier_calls, left_out, neutral_turn, unused_words
from backends.rendering.renderer import Conversation
from backends.rendering.special import SpecialTokens
from backends.rendering.tail import Tail, TurnEnds
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Message

SPECIAL = SpecialTokens(byte_level_tokenizer(["<e>", "<r>", "<u>", "</c>"], eos="<e>"))


def never() -> str:
    raise AssertionError("rendered again")


def find(full: str, alone: str, *, calls: bool = False, opens_next: bool = False) -> Tail | str:
    ends = TurnEnds(SPECIAL, opens_next=opens_next)
    return ends.find(full, "word", calls=calls, next_role="user", alone=lambda: alone)


def test_a_turn_ends_with_the_special_token_that_both_renderings_have() -> None:
    assert find("<u>q word<e>\n<u>next", "<u>q word<e>\n") == Tail(("<e>",), "\n<u>next")


def test_another_token_may_close_the_last_turn() -> None:
    assert find("word<e><u>next", "word<r>") == Tail(("<e>",), "<u>next")


def test_markup_of_a_call_is_not_closing() -> None:
    assert find('word"}</c><e><u>', 'word"}</c><e>', calls=True) == Tail(("<e>",), "<u>")


def test_a_turn_may_end_where_the_next_one_opens() -> None:
    assert find("word\n<u>next", "word", opens_next=True) == Tail((), "<u>next")


@pytest.mark.parametrize(
    ("full", "alone", "reason"),
    [
        ("nothing", "word<e>", "as they are given"),
        ("word<e>", "nothing", "as they are given"),
        ("word, next", "word.", "does not close a turn"),
    ],
)
def test_what_cannot_be_told_has_a_reason(full: str, alone: str, reason: str) -> None:
    found = find(full, alone)
    assert isinstance(found, str)
    assert reason in found


def test_turns_that_nothing_separates_have_a_reason() -> None:
    assert (
        find("word\nnext", "word", opens_next=True)
        == "the template does not separate turns by special tokens"
    )


def test_the_end_of_a_kind_of_turn_is_learned_once() -> None:
    ends = TurnEnds(SPECIAL, opens_next=False)
    renderings: list[Callable[[], str]] = [lambda: "word<e>", never]
    for alone in renderings:
        found = ends.find("word<e><u>", "word", calls=False, next_role="user", alone=alone)
        assert found == Tail(("<e>",), "<u>")
    relearned = ends.find("word<r><u>", "word", calls=False, next_role="user", alone=lambda: "word<r>")
    assert relearned == Tail(("<r>",), "<u>")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, (None, "<r>x<e>rest")),
        ("<r>", ("<r>", "x<e>rest")),
        ("<e>", ("<e>", "rest")),
        ("<u>", ("<e>", "rest")),
    ],
)
def test_only_what_a_generation_lacks_is_added(stop: str | None, expected: tuple[str | None, str]) -> None:
    assert Tail(("<r>", "x", "<e>"), "rest").after(stop) == expected


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, (None, "<u>rest")), ("<u>", ("<u>", "rest")), ("<e>", (None, "<u>rest"))],
)
def test_the_token_that_opens_the_next_turn_is_added_once(
    stop: str | None, expected: tuple[str | None, str]
) -> None:
    assert Tail((), "<u>rest").after(stop) == expected


def call(name: str) -> FunctionCall:
    return FunctionCall(call_id=name, name=f"f_{name}", arguments="{}")


def output(name: str, text: str = "out") -> FunctionCallOutput:
    return FunctionCallOutput(call_id=name, output=text)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def test_the_calls_that_are_answered_come_in_the_order_in_which_they_were_made() -> None:
    items: list[Item] = [
        call("x"),
        call("a"),
        call("b"),
        call("c"),
        output("c"),
        output("a"),
        user("?"),
        output("b"),
    ]
    conversation = Conversation(items)
    assert [made.call_id for made in earlier_calls(conversation, 4)] == ["a", "b", "c"]
    turn = neutral_turn(conversation, 4, "w", calls=True)
    assert [made["id"] for made in turn["tool_calls"]] == ["a", "c"]  # `b` is answered after a user message
    assert turn["content"] == ""
    assert neutral_turn(conversation, 4, "w", calls=False) == {"role": "assistant", "content": "w"}


def test_a_call_among_the_new_items_is_not_looked_for_before_them() -> None:
    items: list[Item] = [call("a"), user("?"), call("a"), output("a")]
    assert earlier_calls(Conversation(items), 1) == []


def test_words_are_drawn_that_nobody_wrote() -> None:
    text = "qzv0 xwk0k qzv1"
    one, other = unused_words(text)
    assert one != other
    assert one not in text
    assert other not in text


@pytest.mark.parametrize(
    ("text", "missing"),
    [("4 then 24", None), ("24", 1), ("24 then 4", 1), ('4 then "2\\n4"', None), ("", 0)],
)
def test_items_are_searched_for_in_their_order(text: str, missing: int | None) -> None:
    last = "2\n4" if "\\n" in text else "24"
    assert left_out(Conversation([user("4"), output("a", last)]), 0, text) == missing


def test_what_the_policy_said_may_be_left_out_of_a_full_rendering_only() -> None:
    items: list[Item] = [user("a"), Message(role="assistant", content="hidden"), user("b")]
    assert left_out(Conversation(items), 0, "a b") is None
    assert left_out(Conversation(items), 1, "b") == 1


def test_neighbouring_messages_of_assistants_are_not_glued_together() -> None:
    said = [Message(role="assistant", content=text) for text in ("one", "", "two")]
    assert chat_messages(said) == [{"role": "assistant", "content": "one\n\ntwo"}]
