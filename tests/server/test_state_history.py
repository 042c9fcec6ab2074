"""A restarted server continues what was stored, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.replay import ReplayEngine
from support.stored import asked, stored

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.state import MemoryStore, ResponseStore, SqliteStore, StoredHistory, StoredResponse
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Item, ItemReference, Message, Response, ResponseRequest, as_items

pytestmark = pytest.mark.asyncio

CUSTOM = {"type": "custom", "name": "shell"}
CALL = '<tool_call>\n{"name": "shell", "arguments": {"input": "ls"}}\n</tool_call><|im_end|>'


async def turn(policy: Policy, store: ResponseStore, **fields: Any) -> Response:
    request = ResponseRequest.model_validate({"max_output_tokens": 8, "store": True, **fields})
    response = await policy.respond(request, history=StoredHistory(store))
    await store.keep(StoredResponse.of(response, as_items(request.input)))
    return response


async def conversation(policy: Policy, store: ResponseStore) -> list[Response]:
    first = await turn(policy, store, input="1 + 2 =", instructions="Add.", seed=1)
    second = await turn(
        policy, store, input="and 3?", instructions="Add.", seed=2, previous_response_id=first.id
    )
    return [first, second]


def check_extends(response: Response, previous: Response) -> None:
    assert response.fork is None
    assert response.tokens is not None
    assert previous.tokens is not None
    known = previous.tokens.token_ids
    assert response.tokens.prompt_token_ids[: len(known)] == known
    assert response.tokens.prompt_length > len(known)


async def test_a_restart_loses_nothing(untrained_policy: Path, tmp_path: Path) -> None:
    config = PolicyConfig(model=str(untrained_policy), context_length=256)
    policy, store = load_policy(config), SqliteStore(tmp_path / "kept.db")
    *_, last = await conversation(policy, store)
    await policy.aclose()
    await store.aclose()

    policy, store = load_policy(config), SqliteStore(tmp_path / "kept.db")
    more = {"input": "and 4?", "instructions": "Add.", "previous_response_id": last.id}
    request = ResponseRequest.model_validate(more)
    with pytest.raises(PolicyError, match="not remembered"):
        await policy.respond(request)
    count = await policy.count_input_tokens(request, history=StoredHistory(store))
    third = await turn(policy, store, **more)
    check_extends(third, last)
    assert third.tokens is not None
    assert third.tokens.prompt_length == count
    fourth = await turn(policy, store, input="and 5?", instructions="Add.", previous_response_id=third.id)
    check_extends(fourth, third)
    await policy.aclose()
    await store.aclose()


@pytest.mark.parametrize(
    ("says", "extra"),
    [
        ("<think>\nhm\n</think>\n\nYes.<|im_end|>", {}),
        ("<think>\nhm\n</think>\n\nYes.<|im_end|>", {"include": ["reasoning.encrypted_content"]}),
        ("Yes.<|im_end|>", {"include": ["message.output_text.logprobs"]}),
        (CALL, {"tools": [CUSTOM]}),
        ("cut off", {}),
    ],
)
async def test_whatever_was_said_is_proven(
    renderer: TemplateRenderer, says: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    store = SqliteStore(tmp_path / "kept.db")
    engine = ReplayEngine([renderer.encode(says), renderer.encode("Good.<|im_end|>")])
    first = await turn(Policy(engine, renderer), store, input="Is it?", **extra)
    output = first.output[-1]
    more: list[dict[str, Any]] = [{"role": "user", "content": "Sure?"}]
    if output.type == "custom_tool_call":
        more = [{"type": "custom_tool_call_output", "call_id": output.call_id, "output": "a"}]  # type: ignore[union-attr]
    second = await turn(Policy(engine, renderer), store, input=more, previous_response_id=first.id, **extra)
    check_extends(second, first)
    await store.aclose()


async def test_a_history_with_a_gap_is_none(renderer: TemplateRenderer) -> None:
    store = MemoryStore()
    here = stored("two", previous=stored("one"))
    await store.keep(here)
    history = StoredHistory(store)
    assert await history.items_of(here.id) is None
    assert await history.items_of("resp_x") is None
    lost = StoredResponse.of(stored("three").response, [ItemReference(id="msg_gone")])
    await store.keep(lost)
    assert await history.items_of(lost.id) is None


async def test_what_is_not_finished_cannot_be_continued() -> None:
    store = MemoryStore()
    begun = stored("one", status="in_progress")
    await store.keep(begun)
    with pytest.raises(PolicyError, match="not done yet") as caught:
        await StoredHistory(store).items_of(begun.id)
    assert caught.value.param == "previous_response_id"


async def test_references_are_looked_up_and_places_have_names() -> None:
    store = MemoryStore()
    first = stored("one")
    await store.keep(first)
    said = first.response.output[0]
    assert said.id is not None
    inputs: list[Item] = [ItemReference(id=said.id), asked("what?"), asked("mine", "msg_mine")]
    second = StoredResponse.of(stored("two", response_id="resp_2").response, inputs, scope="")
    await store.keep(second)
    history = StoredHistory(store)

    items = await history.items_of("resp_2")
    assert items is not None
    assert [item.text for item in items if isinstance(item, Message)] == ["one", "what?", "mine", "two"]
    assert items[0].tokens == first.response.tokens
    assert items[-1].tokens == second.response.tokens

    for name, text in (("msg_resp_2_1", "what?"), ("msg_resp_2_0", "one"), ("msg_mine", "mine")):
        found = await history.item(name)
        assert isinstance(found, Message)
        assert (found.id, found.text) == (name, text)
    for name in ("msg_resp_2_3", "msg_resp_3_0", "msg_resp_2_01", "msg_resp_2_" + "9" * 50, "nothing"):
        assert await history.item(name) is None
    assert await StoredHistory(store, "other").item("msg_resp_2_1") is None


async def test_what_is_forgotten_is_known_by_its_words_alone(renderer: TemplateRenderer) -> None:
    engine = ReplayEngine([renderer.encode("Yes.<|im_end|>")] * 2)
    policy = Policy(engine, renderer)
    first = await policy.respond(ResponseRequest(input="Is it?"))
    policy.forget(first.id)
    policy.forget("resp_x")
    said = first.output[-1]
    again: list[Item] = [asked("Sure?")]
    with pytest.raises(PolicyError, match="not remembered"):
        await policy.respond(ResponseRequest(input=again, previous_response_id=first.id))
    with pytest.raises(PolicyError, match="no item"):
        await policy.respond(ResponseRequest(input=[ItemReference(id=said.id or "")]))  # type: ignore[union-attr]
    whole = ResponseRequest(input=[asked("Is it?"), said, *again])
    check_extends(await policy.respond(whole), first)
