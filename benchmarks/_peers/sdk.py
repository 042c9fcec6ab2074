"""This project: `client.rollouts` with a tool and a verifier."""

from __future__ import annotations

import asyncio
import cProfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from measure import QUESTION, Cost, Order, check, serve
from measure import add as plain_add
from profiling import shares

from gym_sdk import GymClient, Limits, Rollout, Task, tool
from gym_sdk.schema import Group

ABORT_S = 120.0
"""When to give up on generations that nobody aborts."""

add = tool(plain_add)


async def correct(rollout: Rollout) -> float:
    return float("5" in rollout.output_text)


@dataclass
class AtOnce:
    """Counts the rollouts that are under way, by the tasks that were asked for."""

    started: int = 0
    ended: int = 0
    most: int = 0

    def tasks(self, count: int) -> Iterator[Task]:
        """Give the tasks."""
        for _ in range(count):
            self.started += 1
            self.most = max(self.most, self.started - self.ended)
            yield Task(QUESTION, answer="5")


def limits(order: Order) -> Limits:
    """Return the limits that the order asks for."""
    more = {"model_calls": order.model_calls} if order.model_calls else {}
    return Limits(concurrency=order.concurrency, **more)


async def attempt_all(order: Order, cost: Cost) -> None:
    if order.cancel:
        await cancel_all(order, cost)
        return
    kept: list[Group] = []
    scores: list[Any] = []
    at_once = AtOnce()
    profile = cProfile.Profile() if order.profile else None
    if profile is not None:
        profile.enable()
    with cost:
        async with (
            GymClient(order.url, model="policy") as client,
            client.rollouts(
                at_once.tasks(order.rollouts),
                tools=[add],
                verifier=correct,
                limits=limits(order),
                store=order.store,
            ) as stream,
        ):
            async for group in stream:
                scores += group.rewards
                at_once.ended += 1
                if order.keep:
                    kept.append(group)
    if profile is not None:
        profile.disable()
        cost.more.update(shares(profile))
    cost.more["most_at_once"] = at_once.most
    check(scores, order.rollouts)


async def cancel_all(order: Order, cost: Cost) -> None:
    """Leave the stream when every rollout waits for its model; learn when the last one was aborted."""
    tasks = (Task(QUESTION, answer="5") for _ in range(order.rollouts))
    root_url = order.url.removesuffix("/v1")
    async with aiohttp.ClientSession() as session:

        async def until(name: str, value: int) -> dict[str, Any]:
            async with asyncio.timeout(ABORT_S):
                while True:
                    async with session.get(f"{root_url}/stats") as answer:
                        stats: dict[str, Any] = await answer.json()
                    if stats[name] == value:
                        return stats
                    await asyncio.sleep(0.02)

        async with GymClient(order.url, model="policy") as client:
            async with client.rollouts(tasks, tools=[add], verifier=correct, limits=limits(order)):
                await until("in_flight", order.rollouts)
                left_at = time.monotonic()
            cost.seconds = time.monotonic() - left_at
            stats = await until("in_flight", 0)
            if stats["aborted"] != order.rollouts or stats["requests"] != order.rollouts:
                raise RuntimeError(f"not every generation was aborted once: {stats}")
            cost.more["aborted_s"] = stats["last_abort_at"] - left_at
        stats = await until("open", 0)
        cost.more["closed_s"] = stats["last_close_at"] - left_at
        cost.more["requests"] = stats["requests"]


if __name__ == "__main__":
    serve(attempt_all)
