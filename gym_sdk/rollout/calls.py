"""Function calls of a model turn, run concurrently; every failure becomes an output that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import anyio

from gym_sdk.errors import ToolError
from gym_sdk.schema import FunctionCall, FunctionCallOutput
from gym_sdk.tools import Tool, ToolContext

__all__ = ["CallOutputs", "run_function_calls"]


@dataclass(slots=True)
class CallOutputs:
    """What the calls of one turn gave.

    Attributes:
        outputs: in the order of the calls.
        errors: how many outputs say that something went wrong.
        cut: how many outputs were too long, and lack their end.
    """

    outputs: list[FunctionCallOutput]
    errors: int = 0
    cut: int = 0


async def run_function_calls(
    calls: Sequence[FunctionCall],
    tools: Mapping[str, Tool[..., Any]],
    context: ToolContext,
    *,
    timeout_s: float,
    max_output_chars: int | None = None,
    slots: AbstractAsyncContextManager[Any] | None = None,
) -> CallOutputs:
    """Run the calls of one turn concurrently.

    Args:
        calls: what the policy asked for.
        tools: the tools on offer, by name.
        context: handed to tools that take one.
        timeout_s: deadline of each call; a tool's own deadline goes before it. Waiting for a slot is not
            part of it.
        max_output_chars: where outputs are cut; a tool's own limit goes before it.
        slots: limits how many calls run at once, such as a semaphore; each call enters it.
    """
    results = CallOutputs([])

    async def run(call: FunctionCall) -> FunctionCallOutput:
        tool = tools.get(call.name)
        try:
            if tool is None:
                offered = ", ".join(tools) or "none"
                raise ToolError(f"there is no tool {call.name!r}; the tools are: {offered}", tool=call.name)
            if slots is None:
                output = await tool.answer(call.arguments, context, timeout_s, max_output_chars)
            else:
                async with slots:
                    output = await tool.answer(call.arguments, context, timeout_s, max_output_chars)
        except ToolError as error:
            results.errors += 1
            return FunctionCallOutput(call_id=call.call_id, output=f"Error: {error}")
        results.cut += output.cut
        return FunctionCallOutput(call_id=call.call_id, output=output.text)

    if len(calls) == 1:  # nearly always; a task group costs as much as five calls
        results.outputs.append(await run(calls[0]))
        return results
    outputs: dict[int, FunctionCallOutput] = {}

    async def run_at(position: int, call: FunctionCall) -> None:
        outputs[position] = await run(call)

    async with anyio.create_task_group() as group:
        for position, call in enumerate(calls):
            group.start_soon(run_at, position, call)
    results.outputs.extend(outputs[position] for position in range(len(calls)))
    return results
