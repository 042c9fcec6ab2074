"""The pages of a list of items."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stored import asked, stored

from backends.server.state import MemoryStore, StoredHistory, StoredResponse
from backends.server.state.listing import Order, Page, input_items
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCallOutput, Item, ItemReference, Message, UnknownItem


def numbered(count: int) -> list[Item]:
    return [asked(str(number), f"msg_{number}") for number in range(count)]


@given(count=st.integers(0, 60), limit=st.integers(1, 100), order=st.sampled_from(["asc", "desc"]))
def test_all_pages_together_are_the_list(count: int, limit: int, order: Order) -> None:
    items = numbered(count)
    expected = [item.to_wire() for item in (items if order == "asc" else items[::-1])]
    forwards: list[dict[str, object]] = []
    after = None
    while True:
        page = Page(limit, order, after=after).of(items)
        assert len(page["data"]) <= limit
        forwards += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert forwards == expected
    if not items:
        assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        return
    assert page["last_id"] == expected[-1]["id"]
    backwards = [expected[-1]]
    before, more = expected[-1]["id"], True
    while more:
        page = Page(limit, order, before=before).of(items)
        backwards = page["data"] + backwards
        before, more = page["first_id"], page["has_more"]
    assert backwards == expected


@given(count=st.integers(2, 30), data=st.data(), limit=st.integers(1, 40))
def test_between_two_items(count: int, data: st.DataObject, limit: int) -> None:
    items = numbered(count)
    first, last = sorted(data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True)))
    page = Page(limit, "asc", after=f"msg_{first}", before=f"msg_{last}").of(items)
    between = [f"msg_{number}" for number in range(first + 1, last)]
    assert [item["id"] for item in page["data"]] == between[:limit]
    assert page["has_more"] == (len(between) > limit)
    assert Page(limit, "asc", after=f"msg_{last}", before=f"msg_{first}").of(items)["data"] == []


@pytest.mark.parametrize("name", ["after", "before"])
def test_a_page_begins_at_an_item_of_the_list(name: str) -> None:
    with pytest.raises(PolicyError, match="must be the id of an item of this list") as caught:
        Page(**{name: "msg_x"}).of(numbered(3))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.param) == (400, name)


@given(ids=st.lists(st.lists(st.sampled_from([None, "a", "b", "resp"]), max_size=4), min_size=1, max_size=4))
def test_every_item_has_an_id_of_its_own(ids: list[list[str | None]]) -> None:
    async def run() -> list[Item]:
        store = MemoryStore()
        last: StoredResponse | None = None
        for names in ids:
            response = stored("said", previous=last).response
            last = StoredResponse.of(response, [asked("asked", name) for name in names])
            await store.keep(last)
        assert last is not None
        chain = await store.chain(last.id, "")
        assert chain is not None
        items = await input_items(chain, StoredHistory(store))
        again = await input_items(chain, StoredHistory(store))
        assert [item.to_wire() for item in again] == [item.to_wire() for item in items]
        for item in items:
            found = await StoredHistory(store).item(item.id)  # type: ignore[union-attr,arg-type]
            assert isinstance(found, Message)
            assert (found.id, found.text) == (item.id, item.text)  # type: ignore[union-attr]
        return items

    items = asyncio.run(run())
    assert len(items) == sum(map(len, ids)) + len(ids) - 1
    assert len({item.id for item in items}) == len(items)  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_items_are_shown_as_the_api_shows_them() -> None:
    store = MemoryStore()
    first = stored("said")
    await store.keep(first)
    said = first.response.output[0]
    second = StoredResponse.of(
        stored("more", response_id="resp_2").response,
        [
            Message(role="user", content="plain"),
            Message(role="assistant", content="made up"),
            FunctionCallOutput(call_id="c", output="42", status="incomplete"),
            ItemReference(id=said.id or ""),
            ItemReference(id="msg_gone"),
            UnknownItem(type="strange"),
        ],
    )
    items = [item.to_wire() for item in await input_items([second], StoredHistory(store))]
    assert items[0] == {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "plain"}],
        "id": "msg_resp_2_0",
        "status": "completed",
    }
    assert items[1]["content"] == [{"type": "output_text", "text": "made up", "annotations": []}]
    assert items[2] == {
        "type": "function_call_output",
        "call_id": "c",
        "output": "42",
        "id": "fco_resp_2_2",
        "status": "incomplete",
    }
    assert items[3] == said.without_tokens().to_wire()
    assert items[4] == {"type": "item_reference", "id": "msg_gone"}
    assert items[5] == {"type": "strange", "id": "item_resp_2_5", "status": "completed"}
