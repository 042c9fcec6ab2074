"""openai-agents: `Runner.run` over its own Responses model, without tracing."""

from __future__ import annotations

import asyncio

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from agents.result import RunResult
from measure import QUESTION, Cost, Order, check, serve
from measure import add as plain_add
from openai import AsyncOpenAI

add = function_tool(plain_add)


async def attempt_all(order: Order, cost: Cost) -> None:
    set_tracing_disabled(True)
    kept: list[RunResult] = []
    scores: list[float] = []
    todo = iter(range(order.rollouts))
    async with AsyncOpenAI(base_url=order.url, api_key="none") as client:
        model = OpenAIResponsesModel(model="policy", openai_client=client)
        agent = Agent(name="adder", model=model, tools=[add])

        async def worker() -> None:
            for _ in todo:
                result = await Runner.run(agent, QUESTION)
                scores.append(float("5" in result.final_output))
                if order.keep:
                    kept.append(result)

        with cost:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(order.concurrency, order.rollouts)):
                    group.create_task(worker())
    check(scores, order.rollouts)


if __name__ == "__main__":
    serve(attempt_all)
