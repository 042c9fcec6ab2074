"""The function calls of a turn: order, slots, limits; and the short way to read simple arguments."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from gym_sdk.errors import ToolError
from gym_sdk.rollout.calls import run_function_calls
from gym_sdk.schema import FunctionCall
from gym_sdk.tools import Tool, ToolContext, resolve_tools, tool


@tool
async def repeat(text: str, times: int = 1, pause_s: float = 0.0) -> str:
    await anyio.sleep(pause_s)
    return text * times


def calls(*arguments: dict[str, Any], name: str = "repeat") -> list[FunctionCall]:
    return [
        FunctionCall(call_id=f"c{n}", name=name, arguments=json.dumps(entry))
        for n, entry in enumerate(arguments)
    ]


TOOLS = resolve_tools([repeat])
CONTEXT = ToolContext()


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, 3])
async def test_outputs_in_order_with_errors_and_cuts_counted(count: int) -> None:
    wanted = [{"text": "a", "times": 30, "pause_s": 0.01}, {"text": "b"}, {"words": "c"}][:count]
    results = await run_function_calls(calls(*wanted), TOOLS, CONTEXT, timeout_s=30, max_output_chars=20)
    assert [output.call_id for output in results.outputs] == ["c0", "c1", "c2"][:count]
    assert results.outputs[0].text.startswith("a" * 20 + "\n[output cut")
    assert (results.errors, results.cut) == (count // 3, 1)
    outputs, errors = results.outputs, results.errors
    assert (outputs, errors) == (results.outputs, results.errors)


@pytest.mark.asyncio
async def test_waiting_for_a_slot_is_not_the_tool_s_time() -> None:
    slots = anyio.Semaphore(1)
    results = await run_function_calls(
        calls(*[{"text": "x", "pause_s": 0.2}] * 4), TOOLS, CONTEXT, timeout_s=0.5, slots=slots
    )
    assert [output.text for output in results.outputs] == ["x"] * 4
    assert slots.value == 1
    results = await run_function_calls(
        calls({"text": "x", "pause_s": 30}), TOOLS, CONTEXT, timeout_s=0.01, slots=slots
    )
    assert results.outputs[0].text == "Error: repeat did not finish within 0.01 s"
    assert slots.value == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, 2])
async def test_cancelling_passes_through_and_frees_the_slots(count: int) -> None:
    slots = anyio.CapacityLimiter(5)
    with anyio.move_on_after(0.05) as scope:
        await run_function_calls(
            calls(*[{"text": "x", "pause_s": 30}] * count), TOOLS, CONTEXT, timeout_s=30, slots=slots
        )
    assert scope.cancelled_caught
    assert slots.borrowed_tokens == 0


@tool
async def take(
    a: int,
    b: str = "b",
    c: float = 0.5,
    d: bool | None = None,
    e: Literal["x", "y"] = "x",
    f: Annotated[list[int] | None, Field(max_length=2)] = None,
    g: Annotated[int, Field(ge=0)] | str = 0,
) -> None: ...


_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["x", "y", [1], [1, 2, 3], [None], {}, 2**70])
)
_texts = st.dictionaries(st.sampled_from([*"abcdefgh"]), _values).map(json.dumps) | st.lists(
    st.tuples(
        st.sampled_from([*"abcdefgh"]), _values.map(json.dumps) | st.sampled_from(["1e999", "nan", "-0"])
    )
).map(lambda pairs: "{" + ",".join(f'"{key}": {value}' for key, value in pairs) + " }")


@settings(deadline=None, max_examples=400)
@given(_texts | st.text())
def test_the_short_way_reads_what_the_long_way_reads(text: str) -> None:
    def read(made: Tool[..., Any], flat: bool) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made._arguments, "_is_flat", flat)
            try:
                return repr(made._arguments.parse(text))
            except ToolError as error:
                return str(error)

    assert take._arguments._is_flat
    assert read(take, True) == read(take, False)


@pytest.mark.parametrize(
    ("annotation", "flat"),
    [
        (int, True),
        (str | None, True),
        (list[str], True),
        (Literal[1, 2], True),
        (list[float], False),
        (dict[str, int], False),
        (list[list[int]], False),
        (tuple[int, str], False),
        (Any, False),
    ],
)
def test_what_goes_the_short_way(annotation: Any, flat: bool) -> None:
    def take(value: Any) -> None: ...

    take.__annotations__["value"] = annotation
    assert Tool(take)._arguments._is_flat == flat
