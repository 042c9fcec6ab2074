"""Model calls into one list of items."""

from __future__ import annotations

from typing import Any

import pytest

from gym_sdk.capture.calls import CapturedCall
from gym_sdk.capture.outcome import call_metrics
from gym_sdk.capture.transcript import Transcript, write_transcript
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Message, Reasoning, Task, TextPart, as_items
from gym_sdk.tokens import CallTokens


def user(text: str) -> Message:
    return Message(role="user", content=text)


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def thought(text: str) -> Reasoning:
    return Reasoning(id=f"rs_{text}", summary=[], content=[TextPart(text=text)])


def call(number: int, arguments: str = '{"a": 1}') -> FunctionCall:
    return FunctionCall(id=f"fc_{number}", call_id=f"call_{number}", name="f", arguments=arguments)


def output(number: int) -> FunctionCallOutput:
    return FunctionCallOutput(call_id=f"call_{number}", output=str(number))


def calls_of(*exchanges: tuple[Any, ...], instructions: Any = None) -> list[CapturedCall]:
    """Make calls from (input, output) or (input, output, instructions)."""
    return [
        CapturedCall(
            number=number,
            route="responses",
            status="completed" if entry[1] else "refused",
            started_at=0.0,
            duration_s=0.0,
            instructions=entry[2] if len(entry) > 2 else instructions,
            input=as_items(entry[0]),
            response_id=f"resp_{number}" if entry[1] else None,
            output=as_items(entry[1]),
        )
        for number, entry in enumerate(exchanges)
    ]


def shown(transcript: Transcript) -> list[str]:
    texts = []
    for item in transcript.items:
        text = getattr(item, "text", None) or getattr(item, "call_id", "")
        texts.append(f"{getattr(item, 'role', item.type)}:{text}")
    return texts


def write(*exchanges: tuple[Any, ...], task: Task | None = None, instructions: Any = None) -> Transcript:
    return write_transcript(calls_of(*exchanges, instructions=instructions), task or Task("q"))


def test_a_conversation_grows_by_what_is_new() -> None:
    echo = [
        user("q"),
        FunctionCall(call_id="call_1", name="f", arguments='{ "a":1 }'),
    ]  # other id, written anew
    transcript = write(
        ([user("q")], [thought("hm"), call(1)]),
        ([*echo, output(1)], [said("one")]),
        ([*echo, Reasoning(summary=[]), output(1), said("one"), user("more")], [said("two")]),
    )
    assert shown(transcript) == [
        "user:q",
        "reasoning:hm",
        "function_call:call_1",
        "function_call_output:1",
        "assistant:one",
        "user:more",
        "assistant:two",
    ]
    assert transcript.input_items == 1
    assert [(entry.first_item, entry.end_item) for entry in transcript.model_calls] == [
        (1, 3),
        (4, 5),
        (6, 7),
    ]


def test_system_text_stands_where_it_begins_and_where_it_changes() -> None:
    task = Task("q", instructions="known")
    exchanges = (
        ([user("q")], [call(1)], "known"),
        ([user("q"), call(1), output(1)], [said("bye")], "handed over"),
        ([user("q"), call(1), output(1), said("bye"), user("and")], [said("end")], "handed over"),
    )
    expected = ["user:q", "function_call:call_1", "system:handed over", "function_call_output:1"]
    assert shown(write(*exchanges, task=task))[:4] == expected
    as_messages = [
        ([Message(role="system", content=text), *given], answer) for given, answer, text in exchanges
    ]
    assert shown(write(*as_messages, task=task)) == shown(write(*exchanges, task=task))
    assert shown(write(*exchanges))[0] == "system:known"
    assert write(*exchanges).input_items == 2


def test_sub_agents_add_their_own_conversation() -> None:
    transcript = write(
        ([user("main")], [call(1)], "a"),
        ([user("sub")], [call(2)], "b"),
        ([user("sub"), call(2), output(2)], [said("found")], "b"),
        ([user("main"), call(1), output(1)], [said("done")], "a"),
    )
    assert shown(transcript) == [
        *("system:a", "user:main", "function_call:call_1"),
        *("system:b", "user:sub", "function_call:call_2", "function_call_output:2", "assistant:found"),
        *("function_call_output:1", "assistant:done"),
    ]


def test_edited_and_shortened_histories_add_only_what_was_not_there() -> None:
    history = [user("1"), said("a"), user("2"), said("b"), user("3")]
    edited = [user("1"), said("A!"), user("2"), said("b"), user("3"), said("c"), user("4")]
    transcript = write(
        ([user("1")], [said("a")]),
        (history[:3], [said("b")]),
        (history, [said("c")]),
        (edited, [said("d")]),
        ([user("3"), said("c"), user("4"), said("d"), user("5")], [said("e")]),  # a sliding window
    )
    assert shown(transcript)[5:] == [
        *("assistant:c", "assistant:A!", "user:4", "assistant:d"),
        *("user:5", "assistant:e"),
    ]


def test_repeated_words_are_new_when_they_come_again() -> None:
    transcript = write(
        ([user("go on")], [said("ok")]),
        ([user("go on"), said("ok"), user("go on")], [said("ok")]),
        ([user("go on"), said("ok"), user("go on"), said("ok"), user("go on")], [said("end")]),
    )
    assert shown(transcript) == ["user:go on", "assistant:ok"] * 2 + ["user:go on", "assistant:end"]


def test_calls_that_failed_and_were_tried_again() -> None:
    calls = calls_of(([user("q")], []), ([user("q")], [said("a")]), ([user("q"), said("a"), user("r")], []))
    transcript = write_transcript(calls, Task("q"))
    assert shown(transcript) == ["user:q", "assistant:a", "user:r"]
    assert len(transcript.model_calls) == 1
    assert call_metrics(calls, 0) == {"turns": 1, "tool_calls": 0, "refused_calls": 2}


@pytest.mark.parametrize(("prompt", "forks"), [([1, 2, 3, 4], 0), ([1, 9, 9, 4], 1)])
def test_a_continued_conversation_with_other_tokens_is_a_fork(prompt: list[int], forks: int) -> None:
    calls = calls_of(([user("q")], [said("a")]), ([user("q"), said("a"), user("r")], [said("b")]))
    calls[0].tokens = CallTokens([1, 2], [3], [-0.1])
    calls[1].tokens = CallTokens(prompt, [5], [-0.1])
    assert write_transcript(calls, Task("q")).silent_forks == forks
    calls[1].fork = "said already"
    assert write_transcript(calls, Task("q")).silent_forks == 0
