"""Function calls of a model turn, run concurrently; every failure becomes an output that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from gym_sdk.errors import ToolError
from gym_sdk.schema import FunctionCall, FunctionCallOutput
from gym_sdk.tools import Tool, ToolContext

__all__ = ["run_function_calls"]


async def run_function_calls(
    calls: Sequence[FunctionCall],
    tools: Mapping[str, Tool[..., Any]],
    context: ToolContext,
    *,
    timeout_s: float,
) -> tuple[list[FunctionCallOutput], int]:
    """Run the calls of one turn concurrently.

    Args:
        calls: what the policy asked for.
        tools: the tools on offer, by name.
        context: handed to tools that take one.
        timeout_s: deadline of each call; a tool's own deadline goes before it.

    Returns:
        The outputs in the order of the calls, and how many of them say that something went wrong.
    """
    outputs: list[FunctionCallOutput | None] = [None] * len(calls)
    errors = 0

    async def run(position: int, call: FunctionCall) -> None:
        nonlocal errors
        try:
            text = await _run_one(call, tools, context, timeout_s)
        except ToolError as error:
            errors += 1
            text = f"Error: {error}"
        outputs[position] = FunctionCallOutput(call_id=call.call_id, output=text)

    if len(calls) == 1:
        await run(0, calls[0])
    else:
        async with anyio.create_task_group() as group:
            for position, call in enumerate(calls):
                group.start_soon(run, position, call)
    return [output for output in outputs if output is not None], errors


async def _run_one(
    call: FunctionCall, tools: Mapping[str, Tool[..., Any]], context: ToolContext, timeout_s: float
) -> str:
    tool = tools.get(call.name)
    if tool is None:
        offered = ", ".join(tools) or "none"
        raise ToolError(f"there is no tool {call.name!r}; the tools are: {offered}", tool=call.name)
    limit_s = timeout_s if tool.timeout_s is None else tool.timeout_s
    with anyio.move_on_after(limit_s) as scope:
        return await tool.run(call.arguments, context)
    assert scope.cancelled_caught
    raise ToolError(f"{call.name} did not finish within {limit_s:g} s", tool=call.name)
