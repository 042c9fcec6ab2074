"""Captures of the real engine: isolated from each other, and exact to the log-prob."""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from gym_sdk import GymClient, Outcome, Rollout, Task
from gym_sdk.environments import arithmetic, arithmetic_tasks
from gym_sdk.schema import TOKEN_FIELDS
from gym_sdk.tokens import TokenSequence
from gym_sdk.transport.local import LocalTransport

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

pytestmark = pytest.mark.asyncio


def worst_difference(model: torch.nn.Module, row: TokenSequence) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([row.token_ids])).logits[0].float()
    log_probs = torch.log_softmax(logits[:-1], dim=-1)
    expected = log_probs.gather(1, torch.tensor(row.token_ids[1:])[:, None])[:, 0].tolist()
    pairs = zip(row.loss_mask[1:], row.log_probs[1:], expected, strict=True)
    return max(abs(found - wanted) for trained, found, wanted in pairs if trained)


def length(rollout: Rollout) -> float:
    return float(len(rollout.model_calls))


async def test_sixteen_equal_prompts_at_once_stay_apart(untrained_policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(untrained_policy)).eval()

    async def attempt(client: GymClient, index: int) -> Rollout:
        async with client.capture(Task("1 + 2 =", id="same"), index=index) as session:
            openai = session.openai()
            history: list[Any] = []
            for turn in range(3):
                history.append({"role": "user", "content": f"turn {turn}"})
                response = await openai.responses.create(
                    model=session.model, input=history, max_output_tokens=12, stream=False
                )
                # as a client that knows no token fields sends them back
                history += [
                    item.model_dump(exclude_unset=True, exclude=set(TOKEN_FIELDS)) for item in response.output
                ]
            return await session.finish(verifier=length)

    async with GymClient.local(untrained_policy) as client:
        rollouts = await asyncio.gather(*(attempt(client, index) for index in range(16)))
    assert len({rollout.id for rollout in rollouts}) == 16
    assert len({tuple(rollout.sequences()[0].token_ids) for rollout in rollouts}) > 1
    for rollout in rollouts:
        assert rollout.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED)
        assert rollout.reward == 3.0
        assert len(rollout.model_calls) == 3
        (row,) = rollout.sequences()
        assert worst_difference(model, row) < 1e-4


async def test_an_embedded_engine_is_served_while_its_client_is_open(untrained_policy: Path) -> None:
    async with GymClient.local(untrained_policy) as client:
        async with client.capture("q") as first, client.capture("q") as second:
            assert first.base_url.split("/rollouts/")[0] == second.base_url.split("/rollouts/")[0]
            completion = await first.openai().chat.completions.create(
                model=first.model, messages=[{"role": "user", "content": "q"}], max_tokens=4
            )
            assert completion.usage is not None
            assert (await first.finish()).model_calls[0].tokens is not None
            address = first.base_url
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{address}/models")


async def test_closing_the_client_does_not_wait_for_agents(untrained_policy: Path) -> None:
    transport = LocalTransport(untrained_policy)
    async with GymClient.over(transport, model="policy") as client:
        async with client.capture("q") as session, aiohttp.ClientSession() as agent:
            await transport.policy.pause()
            call = asyncio.ensure_future(agent.post(f"{session.base_url}/responses", json={"input": "q"}))
            await asyncio.sleep(0.1)
            assert not call.done()
            async with asyncio.timeout(5):
                await client.aclose()
            with pytest.raises(aiohttp.ClientError):
                await call
    assert session.rollout is not None
    assert session.rollout.outcome is Outcome.CANCELLED


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stream", [False, True], ids=["run", "run_streamed"])
@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_the_agents_sdk_is_recorded_exactly(tiny_policy: Path, route: str, stream: bool) -> None:
    agents: Any = import_module("agents")
    kind = agents.OpenAIResponsesModel if route == "responses" else agents.OpenAIChatCompletionsModel
    model = AutoModelForCausalLM.from_pretrained(str(tiny_policy)).eval()

    (calculator,) = arithmetic().tools_for(None)

    async def run_tool(context: Any, arguments: str) -> str:
        return str(await calculator.run(arguments))

    tool = agents.FunctionTool(
        name=calculator.name,
        description=calculator.description,
        params_json_schema=calculator.schema.parameters,
        on_invoke_tool=run_tool,
    )

    async def attempt(client: GymClient, task: Task) -> Rollout:
        async with client.capture(task) as session:
            agent = agents.Agent(
                name="arithmetic",
                tools=[tool],
                model=kind(model=session.model, openai_client=session.openai()),
                model_settings=agents.ModelSettings(max_tokens=64),
            )
            text = task.items()[0].text  # type: ignore[union-attr]
            try:
                if stream:
                    result = agents.Runner.run_streamed(agent, text, max_turns=4)
                    async for _ in result.stream_events():
                        pass
                else:
                    await agents.Runner.run(agent, text, max_turns=4)
            except agents.AgentsException as error:
                return await session.fail(error)
            return await session.finish(verifier=length)

    async with GymClient.local(tiny_policy) as client:
        tasks = arithmetic_tasks(size=24, seed=11)
        rollouts = await asyncio.gather(*(attempt(client, task) for task in tasks))
    assert sum(len(rollout.model_calls) > 1 for rollout in rollouts) >= 3
    for rollout in rollouts:
        (row,) = rollout.sequences()
        assert rollout.metrics.get("forks", 0) == 0
        assert worst_difference(model, row) < 1e-4
