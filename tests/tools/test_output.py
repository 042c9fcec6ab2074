"""Outputs that are too long: what the model reads, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core import to_json

from gym_sdk.errors import ConfigurationError, ToolError
from gym_sdk.tools import Tool, tool
from gym_sdk.tools import output as module
from gym_sdk.tools.output import output_of


class Point(BaseModel):
    x: int = 1


@dataclasses.dataclass
class Pair:
    a: Any
    b: Any


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(Point()),
    lambda child: (
        st.lists(child)
        | st.tuples(child, child)
        | st.dictionaries(st.text() | st.integers(), child)
        | st.builds(Pair, child, child)
        | st.frozensets(st.integers())
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(_json, st.integers(1, 200), st.integers(1, 4), st.integers(0, 40))
def test_the_head_is_that_of_the_whole(value: Any, limit: int, batch: int, piece: int) -> None:
    """However a value is cut into pieces, they join to what would be written at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH", batch)
        patch.setattr(module, "_PIECE", piece)
        whole = output_of(value).text
        output = output_of(value, limit)
        assert "".join(module._pieces(value)) == to_json(value, inf_nan_mode="constants").decode()
    if output.cut:
        assert len(whole) > limit
        head, _, last = output.text.rpartition("\n")
        assert head == whole[:limit]
        assert last.startswith(f"[output cut: only its first {limit}")
    else:
        assert output.text == whole
        assert len(whole) <= limit


def test_a_text_says_how_long_it_was() -> None:
    output = output_of("ä" * 3_000, 1_000)
    assert output.text == "ä" * 1_000 + "\n[output cut: only its first 1,000 of 3,000 characters are shown]"
    assert output.cut
    assert output_of("x" * 1_000, 1_000).text == "x" * 1_000
    assert output_of("\udcff" * 9, 2).text.startswith("??\n")
    assert not output_of(None, 1).cut


def numbers() -> Iterator[int]:
    return (n for n in itertools.count())


@pytest.mark.parametrize(
    "value",
    [
        list(range(5_000_000)),
        {"rows": [{"id": n, "name": "some text"} for n in range(300_000)]},
        ["y" * 1_000_000 for _ in range(60)],
        numbers(),
    ],
    ids=["numbers", "rows", "texts", "endless"],
)
def test_a_huge_object_costs_no_more_than_its_head(value: Any) -> None:
    tracemalloc.start()
    try:
        output = output_of(value, 50_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert output.cut
    assert output.text.endswith("\n[output cut: only its first 50,000 characters are shown]")
    assert peak < 12_000_000


def test_an_object_that_holds_itself_has_no_text() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="nested too deeply, or holds itself"):
        output_of(circle, 1_000_000)


@pytest.mark.asyncio
async def test_a_tool_s_own_limit_goes_before_the_rollout_s() -> None:
    def text() -> str:
        return json.dumps("x" * 98)

    own = Tool(text, max_output_chars=10)
    assert (await own.run("")).startswith('"xxxxxxxxx\n[output cut: only its first 10 of 100')
    assert (await own.answer("", max_output_chars=50)).text == await own.run("")
    assert (await Tool(own, max_output_chars=200).answer("", max_output_chars=50)).text == text()
    assert (await tool(text).answer("", max_output_chars=50)).cut
    assert await tool(text).run("") == text()
    with pytest.raises(ConfigurationError, match="tool text: max_output_chars must be at least 1, not 0"):
        tool(max_output_chars=0)(text)
    with pytest.raises(ToolError, match="which cannot be written as JSON"):
        await Tool(numbers_of_nothing, max_output_chars=10).run("")


def numbers_of_nothing() -> Any:
    return [object()] * 3
