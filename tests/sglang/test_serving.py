"""`gym-sdk serve --backend sglang`: the same server, with the real SGLang behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backends.sglang import SGLangProcess
from gym_sdk import GymClient, Sampling, Task, tool
from gym_sdk.launch import launch_server
from gym_sdk.schema import Outcome

pytestmark = [pytest.mark.sglang, pytest.mark.asyncio(loop_scope="session")]


QUESTION = "State the final answer to the following arithmetic problem: {} + 5 ="


@tool
def calculator(expression: str) -> str:
    """Add numbers."""
    return str(sum(int(number) for number in expression.replace("- ", "+ -").split("+")))


@pytest_asyncio.fixture(loop_scope="session")
async def url(sglang: SGLangProcess, tiny_policy: Path, tmp_path: Path) -> AsyncIterator[str]:
    arguments = ["--backend", "sglang", "--sglang-url", sglang.url]
    async with launch_server(tiny_policy, arguments=arguments, log=tmp_path / "server.log") as address:
        yield address


async def test_rollouts_with_tools_are_exact(url: str) -> None:
    async with GymClient(url, model="policy") as client:
        found = await client.collect(
            [Task(QUESTION.format(number)) for number in range(8)],
            tools=[calculator],
            group_size=2,
            sampling=Sampling(max_output_tokens=96),
        )
    assert {rollout.outcome for rollout in found.rollouts} <= {Outcome.COMPLETED, Outcome.TRUNCATED}
    numbers = found.summary()
    assert numbers["forks"] == numbers["unreported_forks"] == 0
    assert numbers["sequences"] == 16
    assert numbers["trained_share"] == 1.0
