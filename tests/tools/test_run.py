from __future__ import annotations

import contextlib
import enum
import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gym_sdk.errors import ConfigurationError, ToolError
from gym_sdk.schema import Task
from gym_sdk.tools import Tool, ToolContext, tool


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: int
    y: int = 3


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str = "Rex"


@dataclass
class Range:
    start: float
    end: float | None = None


@tool
async def add(a: int, b: int = 10) -> int:
    """Add."""
    return a + b


def arguments_of(made: Tool[..., Any], text: str) -> Any:
    return made._arguments.parse(text)[1]


@pytest.mark.asyncio
async def test_a_tool_is_still_the_function() -> None:
    assert await add(1, 2) == 3
    assert await add(a=1) == 11
    assert add.__name__ == "add"
    assert add.__doc__ == "Add."
    assert repr(add) == "Tool('add')"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "output"),
    [
        ('{"a": 1, "b": 2}', "3"),
        ('{"a": 1}', "11"),
        ('{"a": 1, "b": null}', "11"),
        (' {"a":-5,"b":5} ', "0"),
        ('{"a": 123456789012345678901234567890}', "123456789012345678901234567900"),
    ],
)
async def test_arguments(text: str, output: str) -> None:
    assert await add.run(text) == output


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid arguments for add: `a` is missing"),
        ("{}", "`a` is missing"),
        ('{"a": null}', "`a`: Input should be a valid integer, got null"),
        ('{"a": "1"}', '`a`: Input should be a valid integer, got "1"'),
        ('{"a": 1.5}', "`a`: .*integer.*got 1.5"),
        ('{"a": true}', "`a`: Input should be a valid integer, got true"),
        ('{"a": 1, "c": 2}', "`c` is unknown; known here: `a`, `b`"),
        ('{"a": 1e999}', "`a`: the number is too large"),
        ('{"a": {}, "b": []}', r"`a`: .*got {}; `b`: .*got \[\]"),
        ("[1, 2]", r'must be a JSON object such as {"a": ..., "b": ...}, not a list'),
        ("3", "not a number"),
        ("true", "not a boolean"),
        ("null", "not null"),
        ('"{}"', "not a string"),
        ("{'a': 1}", "not valid JSON: .* line 1 column 2"),
        ('{"a": NaN}', "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (json.dumps({"a": "x" * 1000}), r'got "x{70,80}\.\.\.$'),
        (json.dumps({f"k{i}": i for i in range(9)}), "; and 4 more$"),
    ],
)
async def test_bad_arguments_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ToolError, match=message) as caught:
        await add.run(text)
    assert caught.value.tool == "add"


def test_nested_values_become_what_the_function_declares() -> None:
    @tool
    def take(
        point: Point,
        colour: Colour,
        range_: Range,
        pet: Cat | Dog,
        trees: list[Tree],
        maybe: Point | None = None,
        number: int | None = 5,
    ) -> None: ...

    assert arguments_of(
        take,
        json.dumps(
            {
                "point": {"x": 1, "y": None},
                "colour": "blue",
                "range_": {"start": 1, "end": None},
                "pet": {"kind": "dog", "name": None},
                "trees": [{"value": 1, "children": [{"value": 2, "children": None}]}],
                "maybe": {"x": 2, "y": None},
                "number": None,
            }
        ),
    ) == {
        "point": Point(x=1, y=3),
        "colour": Colour.BLUE,
        "range_": Range(1.0, None),
        "pet": Dog(kind="dog", name="Rex"),
        "trees": [Tree(value=1, children=[Tree(value=2)])],
        "maybe": Point(x=2),
        "number": None,  # null is a value of this argument, so it isn't its default
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"point": {"x": 1, "z": 2}}, "`point.z` is unknown; known here: `x`, `y`"),
        ({"point": {"x": "1"}}, "`point.x`: Input should be a valid integer"),
        ({"trees": [{"value": 1, "children": [{"valu": 1}]}]}, r"`trees.0.children.0.valu` is unknown"),
        ({"colour": "green"}, "`colour`: Input should be 'red' or 'blue', got \"green\""),
        ({"pet": {"kind": "fish"}}, "`pet.*kind`: Input should be 'cat'"),
        ({"pet": {"kind": "dog", "wings": 2}}, "`pet.wings` is unknown; known here: `kind`, `name`"),
    ],
)
def test_nested_errors_name_the_field(values: dict[str, Any], message: str) -> None:
    @tool
    def take(
        point: Point = Point(x=0),  # noqa: B008
        colour: Colour = Colour.RED,
        pet: Cat | Dog = Cat(),  # noqa: B008
        trees: list[Tree] = [],  # noqa: B006
    ) -> None: ...

    with pytest.raises(ToolError, match=message):
        arguments_of(take, json.dumps(values))


def test_without_strict_free_form_values_pass() -> None:
    @tool
    def take(values: dict[str, list[int]], pair: tuple[int, str], anything: Any = 1) -> None: ...

    assert arguments_of(take, '{"values": {"a": [1]}, "pair": [1, "x"], "anything": null}') == {
        "values": {"a": [1]},
        "pair": (1, "x"),
        "anything": None,
    }
    with pytest.raises(ToolError, match=r"`values.a.0`: .*integer"):
        arguments_of(take, '{"values": {"a": ["1"]}, "pair": [1, "x"]}')
    with pytest.raises(ToolError, match="`other` is unknown"):
        arguments_of(take, '{"values": {}, "pair": [1, "x"], "other": 1}')


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "i": st.integers(),
            "f": st.floats(allow_nan=False, allow_infinity=False),
            "s": st.text(st.characters(exclude_categories=["Cs"])),
            "b": st.booleans(),
            "o": st.none() | st.integers(),
            "e": st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.integers()),
            "d": st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers()),
        }
    )
)
def test_what_a_model_sends_is_what_the_function_gets(values: dict[str, Any]) -> None:
    @tool
    def take(
        i: int,
        f: float,
        s: str,
        b: bool,
        o: int | None,
        e: list[str | int],
        d: dict[str, int],
    ) -> None: ...

    assert arguments_of(take, json.dumps(values)) == values


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda child: st.lists(child) | st.dictionaries(st.sampled_from(["a", "b", "x", "y"]) | st.text(), child),
    max_leaves=8,
)


@settings(deadline=None)
@given(_json | st.text())
def test_any_other_text_is_a_tool_error_or_is_valid(value: Any) -> None:
    @tool
    def take(a: int, p: Point | None = None, b: list[Tree] | str = "x") -> None: ...

    with contextlib.suppress(ToolError):
        got = arguments_of(take, value if isinstance(value, str) else json.dumps(value))
        assert isinstance(got["a"], int)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("result", "output"),
    [
        ("text ü", "text ü"),
        (None, ""),
        (True, "true"),
        (3, "3"),
        (2.5, "2.5"),
        (10**40, "1" + "0" * 40),
        (float("inf"), "Infinity"),
        (Colour.RED, "red"),
        (Point(x=1), '{"x":1,"y":3}'),
        (Range(1.0), '{"start":1.0,"end":null}'),
        ([Point(x=1), {"k": (1, None)}], '[{"x":1,"y":3},{"k":[1,null]}]'),
        (b"bytes", '"bytes"'),
        ("bad \udcff name", "bad ? name"),
    ],
)
async def test_results_become_text(result: Any, output: str) -> None:
    @tool
    def give() -> Any:
        return result

    assert await give.run("") == output


@pytest.mark.asyncio
async def test_results_that_have_no_text_form() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for result in (object(), circle, {1: lambda: 0}):

        @tool
        def give(result: Any = result) -> Any:
            return result

        with pytest.raises(ToolError, match=r"give returned a .*, which cannot be written as JSON"):
            await give.run("{}")


@pytest.mark.asyncio
async def test_exceptions_become_tool_errors() -> None:
    @tool
    def divide(a: int, b: int) -> float:
        return a / b

    @tool
    async def own() -> None:
        raise ToolError("no such file: a.txt", tool="own")

    @tool
    def leave() -> None:
        sys.exit(3)

    @tool
    async def grouped() -> None:
        async with anyio.create_task_group():
            raise KeyError("k")

    @tool
    def long() -> None:
        raise ValueError("x" * 100_000)

    with pytest.raises(ToolError, match="divide failed: ZeroDivisionError: division by zero") as caught:
        await divide.run('{"a": 1, "b": 0}')
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ToolError, match=r"^no such file: a\.txt$"):
        await own.run("")
    with pytest.raises(ToolError, match="leave failed: SystemExit: 3"):
        await leave.run("")
    with pytest.raises(ToolError, match="grouped failed: KeyError: 'k'"):
        await grouped.run("")
    with pytest.raises(ToolError) as caught:
        await long.run("")
    assert len(str(caught.value)) < 2_100


@pytest.mark.asyncio
async def test_sync_functions_leave_the_loop_free() -> None:
    loop_thread = threading.get_ident()

    @tool
    def block() -> bool:
        time.sleep(0.2)
        return threading.get_ident() != loop_thread

    @tool
    async def where() -> bool:
        return threading.get_ident() == loop_thread

    results = []
    start = time.perf_counter()

    async def call() -> None:
        results.append(await block.run(""))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(call)
        assert await where.run("") == "true"
    assert results == ["true"] * 4
    assert time.perf_counter() - start < 0.7


@pytest.mark.asyncio
async def test_a_function_that_returns_a_coroutine_is_awaited() -> None:
    @tool
    def indirect(a: int) -> Any:
        return add(a, 1)

    assert await indirect.run('{"a": 1}') == "2"


@pytest.mark.asyncio
async def test_timeouts() -> None:
    released = threading.Event()

    @tool(timeout_s=0.05)
    async def hang() -> None:
        await anyio.sleep(30)

    @tool(timeout_s=0.05)
    def block() -> None:
        released.wait(30)

    @tool(timeout_s=5)
    async def own() -> None:
        raise TimeoutError("the database")

    for made in (hang, block):
        with pytest.raises(ToolError, match=f"{made.name} did not finish within 0.05 s"):
            await made.run("")
    released.set()
    with pytest.raises(ToolError, match="own failed: TimeoutError: the database"):
        await own.run("")


@pytest.mark.asyncio
async def test_cancellation_is_not_swallowed() -> None:
    released = threading.Event()

    @tool
    def block() -> None:
        released.wait(30)

    with anyio.move_on_after(0.05) as scope:
        await block.run("")
    released.set()
    assert scope.cancelled_caught


@pytest.mark.asyncio
async def test_context_and_state() -> None:
    @tool
    async def who(context: ToolContext, suffix: str = "!") -> str:
        assert context.task is not None
        return f"{context.task.input} {context.rollout_id} {context.state}{suffix}"

    assert await who.run("", ToolContext(Task("q"), "r1", [1])) == "q r1 [1]!"
    with pytest.raises(ConfigurationError, match="takes a ToolContext"):
        await who.run("")
    with pytest.raises(ToolError, match="`context` is unknown"):
        await who.run('{"context": {}}', ToolContext())


@pytest.mark.asyncio
async def test_bound_methods_keep_their_state() -> None:
    class Account:
        def __init__(self) -> None:
            self.balance = 0

        async def deposit(self, amount: int) -> int:
            self.balance += amount
            return self.balance

    one, two = Account(), Account()
    for account in (one, one, two):
        await Tool(account.deposit).run('{"amount": 5}')
    assert (one.balance, two.balance) == (10, 5)


@pytest.mark.asyncio
async def test_positional_only_arguments() -> None:
    @tool
    def sub(a: int, b: int = 1, /, *, c: int = 0) -> int:
        return a - b - c

    assert await sub.run('{"a": 5, "c": 2}') == "2"
    assert await sub.run('{"a": 5, "b": null, "c": null}') == "4"
    assert await sub.run('{"a": 5, "b": 3, "c": 0}') == "2"
