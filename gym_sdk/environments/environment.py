"""What surrounds a policy during a rollout."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gym_sdk.calling import call_function
from gym_sdk.schema import Task
from gym_sdk.tools import Tool, ToolLike, resolve_tools
from gym_sdk.verifiers import GroupVerifier, Verifier

__all__ = ["Environment"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Tools, a verifier and, if they need it, state of their own for each rollout.

    ```python
    async def setup(task: Task) -> Shop:
        return await Shop.open(task.metadata["stock"])

    shop = Environment(
        setup=setup,
        tools=lambda state: [tool(state.search), tool(state.buy)],
        verifier=bought_the_right_thing,
        teardown=Shop.close,
    )
    ```

    Functions may be coroutine functions or plain ones, which run in a worker thread; `tools` is called on
    the event loop.

    Attributes:
        tools: the tools, or a function from the state to the tools. Tools that take a `ToolContext` find
            the state there too.
        verifier: scores the finished rollout; None gives no reward.
        group_verifier: scores the finished rollouts of a group together, in streams; its rewards replace
            those of `verifier`, which it finds in the rollouts.
        setup: makes the state for one rollout of a task; without it the state is None.
        teardown: releases the state; runs whenever `setup` succeeded, also after a failure or a cancellation.
        instructions: system text for tasks that have none of their own.
    """

    tools: Sequence[ToolLike] | Callable[[Any], Sequence[ToolLike]] = ()
    verifier: Verifier | None = None
    group_verifier: GroupVerifier | None = None
    setup: Callable[[Task], Awaitable[Any] | Any] | None = None
    teardown: Callable[[Any], Awaitable[None] | None] | None = None
    instructions: str | None = None

    def __post_init__(self) -> None:
        """Check the tools that are known now, rather than in the first rollout.

        Raises:
            ConfigurationError: a function cannot be a tool, or two have the same name.
        """
        tools: Any = self.tools
        if isinstance(tools, Tool) or not callable(tools):  # a single tool is callable, and a mistake
            object.__setattr__(self, "tools", tuple(resolve_tools(tools).values()))

    @property
    def tools_are_fixed(self) -> bool:
        """Whether all rollouts have the same tools."""
        return not callable(self.tools)

    @property
    def has_state(self) -> bool:
        """Whether rollouts have state of their own, without which one that stopped cannot go on."""
        return self.setup is not None

    async def start(self, task: Task) -> Any:
        """Make the state for one rollout.

        Raises:
            Exception: whatever `setup` raises.
        """
        return await call_function(self.setup, task) if self.setup is not None else None

    def tools_for(self, state: Any) -> tuple[Tool[..., Any], ...]:
        """The tools of a rollout with this state.

        Raises:
            ConfigurationError: a function cannot be a tool, or two have the same name.
        """
        tools = self.tools(state) if callable(self.tools) else self.tools
        return tuple(resolve_tools(tools).values())

    async def stop(self, state: Any) -> None:
        """Release the state of one rollout.

        Raises:
            Exception: whatever `teardown` raises.
        """
        if self.teardown is not None:
            await call_function(self.teardown, state)
