"""The yardstick: aiohttp and asyncio, and no more than what such a rollout needs."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import aiohttp
import yarl
from measure import QUESTION, Cost, Order, add, check, serve
from pydantic_core import from_json, to_json

TOOL = {
    "type": "function",
    "name": "add",
    "description": "Add two integers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = {"add": add}
HEADERS = {"Content-Type": "application/json", "Gym-Token-Form": "compact"}


async def correct(items: list[dict[str, Any]]) -> float:
    return float("5" in items[-1]["content"][0]["text"])


async def attempt_all(order: Order, cost: Cost) -> None:
    url = yarl.URL(f"{order.url}/responses")
    room = asyncio.Semaphore(order.model_calls) if order.model_calls else nullcontext()
    kept: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []
    scores: list[float] = []
    started = most_at_once = 0

    async def model_call(fields: dict[str, Any]) -> dict[str, Any]:
        async with room, session.post(url, data=to_json(fields)) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{url} answered {answer.status}: {data[:300]!r}")
        response: dict[str, Any] = from_json(data)
        return response

    async def rollout() -> None:
        nonlocal started, most_at_once
        started += 1
        most_at_once = max(most_at_once, started - len(scores))
        items: list[dict[str, Any]] = [{"type": "message", "role": "user", "content": QUESTION}]
        fields: dict[str, Any] = {"model": "policy", "input": list(items), "tools": [TOOL], "store": False}
        calls: list[dict[str, Any]] = []
        while True:
            response = await model_call(fields)
            calls.append(response["token_delta"])
            items += response["output"]
            outputs = []
            for item in response["output"]:
                if item["type"] == "function_call":
                    result = await TOOLS[item["name"]](**from_json(item["arguments"]))
                    output = {"type": "function_call_output", "call_id": item["call_id"]}
                    outputs.append({**output, "output": str(result)})
            if not outputs:
                break
            items += outputs
            fields = {"model": "policy", "input": outputs, "store": False}
            fields["previous_response_id"] = response["id"]
        scores.append(await correct(items))
        if order.keep:
            kept.append((items, calls))

    async def worker() -> None:
        for _ in todo:
            await rollout()

    todo = iter(range(order.rollouts))
    with cost:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers=HEADERS,
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(order.concurrency, order.rollouts)):
                group.create_task(worker())
    check(scores, order.rollouts)
    cost.more["most_at_once"] = most_at_once


if __name__ == "__main__":
    serve(attempt_all)
