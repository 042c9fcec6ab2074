from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task
from gym_sdk.tools import ToolContext, tool


@dataclass
class Shop:
    stock: dict[str, int]
    closed: bool = False
    log: list[str] = field(default_factory=list)

    async def buy(self, what: str) -> str:
        """Buy something."""
        self.stock[what] -= 1
        return f"{self.stock[what]} left"

    async def close(self) -> None:
        self.closed = True


@tool
async def stock(context: ToolContext) -> dict[str, int]:
    found: dict[str, int] = context.state.stock
    return found


@pytest.mark.asyncio
async def test_without_state() -> None:
    environment = Environment(tools=[stock])
    state = await environment.start(Task("q"))
    assert state is None
    assert [made.name for made in environment.tools_for(state)] == ["stock"]
    await environment.stop(state)
    assert Environment().tools_for(None) == ()


@pytest.mark.asyncio
async def test_each_rollout_has_its_state() -> None:
    async def setup(task: Task) -> Shop:
        return Shop(dict(task.metadata["stock"]))

    environment = Environment(setup=setup, tools=lambda shop: [shop.buy, stock], teardown=Shop.close)
    task = Task("q", metadata={"stock": {"pear": 2}})
    one, two = await environment.start(task), await environment.start(task)
    buy, look = environment.tools_for(one)
    assert await buy.run('{"what": "pear"}') == "1 left"
    assert await look.run("", ToolContext(task, "r", one)) == '{"pear":1}'
    assert two.stock == {"pear": 2}
    await environment.stop(one)
    assert (one.closed, two.closed) == (True, False)


@pytest.mark.asyncio
async def test_plain_functions_run_in_a_thread() -> None:
    threads: list[int] = []

    def setup(task: Task) -> int:
        threads.append(threading.get_ident())
        return 1

    def teardown(state: int) -> None:
        threads.append(threading.get_ident())

    environment = Environment(setup=setup, teardown=teardown)
    await environment.stop(await environment.start(Task("q")))
    assert len(threads) == 2
    assert threading.get_ident() not in threads


@pytest.mark.asyncio
async def test_errors_of_setup_and_teardown_come_through() -> None:
    async def fail(value: Any) -> None:
        raise ConnectionError("the sandbox is down")

    environment = Environment(setup=fail, teardown=fail)
    with pytest.raises(ConnectionError):
        await environment.start(Task("q"))
    with pytest.raises(ConnectionError):
        await environment.stop(None)


def test_bad_tools_are_found_early_or_with_the_state() -> None:
    def untyped(x): ...  # type: ignore[no-untyped-def]

    with pytest.raises(ConfigurationError, match="argument `x` has no type annotation"):
        Environment(tools=[untyped])
    with pytest.raises(ConfigurationError, match="two tools are called 'stock'"):
        Environment(tools=[stock, stock])
    with pytest.raises(ConfigurationError, match="must be a list of tools"):
        Environment(tools=stock)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must be a list of tools"):
        Environment(tools=3)  # type: ignore[arg-type]
    environment = Environment(tools=lambda state: [stock, stock])
    with pytest.raises(ConfigurationError, match="two tools are called 'stock'"):
        environment.tools_for(None)
