"""verifiers: a `ToolEnv` and its `generate`, over Chat Completions.

Each rollout is scored by itself (`independent_scoring`), without a progress bar and without files. `generate`
always returns all rollouts, and builds its metadata anew with each one that ends: many rollouts in one call
would make it slower than it is here.
"""

from __future__ import annotations

import os
from typing import Any

import verifiers as vf
from datasets import Dataset
from measure import QUESTION, Cost, Order, add, check, serve
from verifiers.types import ClientConfig

os.environ["SCRIPTED_API_KEY"] = "none"


async def correct(completion: list[Any], answer: str) -> float:
    return float(answer in str(completion[-1].content))


def nothing(*_: object, **__: object) -> None:
    """Show no progress."""


async def attempt_all(order: Order, cost: Cost) -> None:
    rows = [{"question": QUESTION, "answer": "5"}] * order.rollouts
    env = vf.ToolEnv(dataset=Dataset.from_list(rows), tools=[add], rubric=vf.Rubric(funcs=[correct]))
    config = ClientConfig(api_key_var="SCRIPTED_API_KEY", api_base_url=order.url)
    inputs = env.get_dataset()
    with cost:
        outputs = await env.generate(
            inputs,
            config,
            "policy",
            max_concurrent=order.concurrency,
            independent_scoring=True,
            on_start=nothing,
            on_progress=nothing,
            on_log=nothing,
        )
    check([output["reward"] for output in outputs["outputs"]], order.rollouts)


if __name__ == "__main__":
    serve(attempt_all)
