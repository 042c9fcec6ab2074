"""Streams of a policy: what is told early is what is told in the end, however the tokens come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agents import TOOL, call_text
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.unfolding import ArgumentsGrown, ItemBegun, ItemEnded, TextGrown, Unfolding
from backends.snapshots import Pacer, Snapshot, StableIds
from gym_sdk.schema import FunctionCall, Item, Message, Reasoning, Response, ResponseRequest

PIECES = st.sampled_from(
    [
        *("<think>\n", "\n</think>\n\n", "So. ", "naïve 東京 🙂", " ", "\n\n", "stop", "st", "op here"),
        *("<tool_call>", "\n</tool_call>", call_text("1 + 2").removesuffix("<|im_end|>"), '{"name": "x"}'),
    ]
)
SAID = st.lists(PIECES, min_size=1, max_size=10).map("".join)
CHUNKS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
STOPS = st.lists(st.sampled_from(["stop", "東", "op h", "\n\n"]), min_size=1, max_size=3)
ENDS = st.sampled_from(["<|im_end|>", ""])


def said(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """What items say, ids aside."""
    rows: list[tuple[str, ...]] = []
    for item in items:
        if isinstance(item, FunctionCall):
            rows.append((item.type, item.name, item.arguments))
        else:
            assert isinstance(item, Message | Reasoning)
            rows.append((item.type, item.text))
    return rows


async def streamed(
    renderer: TemplateRenderer, text: str, chunks: Sequence[int], **fields: Any
) -> list[Snapshot]:
    engine = ReplayEngine([renderer.encode(text)], chunks=chunks)
    policy = Policy(engine, renderer)
    policy.pacer = Pacer(share=1e9)  # looks after each chunk
    request = ResponseRequest(input="q", tools=[TOOL], **fields)
    async with aclosing(policy.stream(request)) as snapshots:
        return [snapshot async for snapshot in snapshots]


async def whole(renderer: TemplateRenderer, text: str, **fields: Any) -> Response:
    policy = Policy(ReplayEngine([renderer.encode(text)]), renderer)
    return await policy.respond(ResponseRequest(input="q", tools=[TOOL], **fields))


def rebuilt(snapshots: Sequence[Snapshot]) -> list[Item]:
    """The items by their changes alone."""
    unfolding, ended, texts = Unfolding(), [], ""
    for snapshot in snapshots:
        for change in unfolding.take(snapshot):
            match change:
                case ItemBegun():
                    assert change.index == len(ended)
                    texts = ""
                case TextGrown() | ArgumentsGrown():
                    texts += change.delta
                case ItemEnded():
                    item = change.item
                    assert texts == (item.arguments if isinstance(item, FunctionCall) else item.text)  # type: ignore[union-attr]
                    ended.append(item)
    return ended


@settings(deadline=None)
@given(text=SAID, end=ENDS, chunks=CHUNKS)
def test_what_is_streamed_is_the_response(
    renderer: TemplateRenderer, text: str, end: str, chunks: list[int]
) -> None:
    snapshots = asyncio.run(streamed(renderer, text + end, chunks))
    response = asyncio.run(whole(renderer, text + end))
    last = snapshots[-1]
    assert [snapshot.done for snapshot in snapshots] == [False] * (len(snapshots) - 1) + [True]
    assert said(last.response.output) == said(response.output)
    assert last.response.status == response.status
    assert last.response.tokens == response.tokens
    assert rebuilt(snapshots) == [item.without_tokens() for item in last.response.output]


@settings(deadline=None)
@given(
    text=SAID,
    end=ENDS,
    chunks=CHUNKS,
    stops=STOPS,
)
def test_stop_strings_cut_the_same_tokens_however_they_come(
    renderer: TemplateRenderer, text: str, end: str, chunks: list[int], stops: list[str]
) -> None:
    snapshots = asyncio.run(streamed(renderer, text + end, chunks, stop=stops))
    response = asyncio.run(whole(renderer, text + end, stop=stops))
    last = snapshots[-1].response
    assert (last.stop_sequence, last.tokens) == (response.stop_sequence, response.tokens)
    assert said(last.output) == said(response.output)
    assert rebuilt(snapshots) == [item.without_tokens() for item in last.output]
    assert response.tokens is not None
    sampled = renderer.decode(response.tokens.generation_token_ids)
    first = min((at for stop in stops if (at := (text + end).find(stop)) >= 0), default=None)
    assert (response.stop_sequence is None) == (first is None)
    if response.stop_sequence is not None:
        assert response.status == "completed"
        assert response.stop_sequence in sampled
        # nothing but the token that completes it stands after it
        assert len(sampled) <= len(text + end)


@settings(deadline=None)
@given(count=st.integers(1, 4), chunks=CHUNKS, between=st.sampled_from(["", "\n", "text"]))
def test_calls_are_cut_after_as_many_as_may_be(
    renderer: TemplateRenderer, count: int, chunks: list[int], between: str
) -> None:
    call = call_text("1 + 2").removesuffix("<|im_end|>")
    text = between.join([call] * count) + "<|im_end|>"
    responses = [
        asyncio.run(streamed(renderer, text, chunks, max_tool_calls=2))[-1].response,
        asyncio.run(whole(renderer, text, max_tool_calls=2)),
    ]
    for response in responses:
        calls = [item for item in response.output if isinstance(item, FunctionCall)]
        assert len(calls) == min(count, 2)
        assert response.status == "completed"
    assert responses[0].tokens == responses[1].tokens
    tokens = responses[0].tokens
    assert tokens is not None
    assert renderer.decode(tokens.generation_token_ids).count("</tool_call>") == min(count, 2)


@settings(deadline=None)
@given(text=SAID, chunks=CHUNKS)
def test_log_probs_grow_with_the_text(renderer: TemplateRenderer, text: str, chunks: list[int]) -> None:
    include = ["message.output_text.logprobs"]
    snapshots = asyncio.run(streamed(renderer, text + "<|im_end|>", chunks, include=include))
    unfolding = Unfolding()
    entries: dict[int, list[Any]] = {}
    for snapshot in snapshots:
        for change in unfolding.take(snapshot):
            if isinstance(change, TextGrown):
                entries.setdefault(change.index, []).extend(change.log_probs)
    for index, item in enumerate(snapshots[-1].response.output):
        if not isinstance(item, Message):
            continue
        (part,) = item.content
        assert part.logprobs == entries.get(index, [])  # type: ignore[union-attr]
        spelled = b"".join(bytes(entry["bytes"]) for entry in part.logprobs)  # type: ignore[union-attr]
        assert not spelled or part.text.encode() in spelled  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_a_stream_that_is_left_aborts_and_is_counted_out(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("one two three four<|im_end|>")], chunks=[1]), renderer)
    snapshots = policy.stream(ResponseRequest(input="q"))
    await anext(snapshots)
    await anext(snapshots)
    assert policy.pacer.streams == 1
    await snapshots.aclose()
    assert policy.pacer.streams == 0
    assert policy.stats.responses == 0


def test_looks_take_a_bounded_share_of_the_time() -> None:
    pacer = Pacer(share=0.5)
    with pacer.stream(), pacer.stream(), pacer.stream(), pacer.stream():
        # four streams, each of whose looks costs 1 ms, may take half of the time
        assert pacer.pause_s(0.001 - Pacer._OVERHEAD_S) == pytest.approx(0.008)


def test_ids_stay_what_they_were_at_first() -> None:
    ids = StableIds()
    first = ids.apply([Message(id="msg_1", role="assistant", content="a")])
    again = ids.apply(
        [
            Message(id="msg_2", role="assistant", content="ab"),
            FunctionCall(id="fc_1", call_id="sampled:0", name="f", arguments="{}"),
        ]
    )
    assert [item.id for item in (*first, *again)] == ["msg_1", "msg_1", "fc_1"]  # type: ignore[union-attr]
    (_, call) = ids.apply(
        [*again[:1], FunctionCall(id="fc_9", call_id="sampled:0", name="f", arguments="{}")]
    )
    assert (call.id, call.call_id) == ("fc_1", "sampled:0")  # type: ignore[union-attr]
