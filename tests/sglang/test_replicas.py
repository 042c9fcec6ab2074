"""Real SGLangs that are killed while rollouts are in flight: none is lost, and none is scored for it."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp.test_utils import unused_port

from backends.engine import FolderWeights
from backends.sglang import SGLangEngine, SGLangProcess, launch_sglang
from gym_sdk import GymClient, Limits, Rollout, Sampling, Task, tool
from gym_sdk.launch import launch_server
from gym_sdk.schema import Outcome

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

QUESTION = "State the final answer to the following arithmetic problem: {} + 5 ="
START_S = 120.0


@tool
def calculator(expression: str) -> str:
    """Add numbers."""
    return str(sum(int(number) for number in expression.replace("- ", "+ -").split("+")))


def one(rollout: Rollout) -> float:
    """Whatever was said is worth 1, so that a reward of 0 can only come from a fault."""
    return 1.0 if rollout.output_text else 0.5


async def health(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url.removesuffix("/v1") + "/health") as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def until_serving(url: str, restarts: list[int]) -> None:
    async with asyncio.timeout(START_S):
        while True:
            replicas = (await health(url))["replicas"]
            if all(one["serves"] for one in replicas) and [one["restarts"] for one in replicas] == restarts:
                return
            await asyncio.sleep(0.1)


def servers() -> list[psutil.Process]:
    """The SGLang servers that descend from this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command[1:3] == ["-m", "sglang.launch_server"]:
            found.append(process)
    return found


async def test_two_hundred_rollouts_survive_two_kills(
    tiny_policy: Path, python: Path, arguments: Sequence[str], tmp_path: Path
) -> None:
    before = {process.pid for process in servers()}
    serve = [
        *(
            "--backend",
            "sglang",
            "--sglang-python",
            str(python),
            "--sglang-log",
            str(tmp_path / "sglang.log"),
        ),
        *("--sglang-args", " ".join(arguments), "--sglang-restarts", "2"),
    ]
    shutil.copytree(tiny_policy, tmp_path / "pushed")
    async with (
        launch_server(tiny_policy, arguments=serve, log=tmp_path / "server.log", start_s=START_S) as url,
        GymClient(url, model="policy") as client,
    ):
        await client.update_weights(tmp_path / "pushed", version="1")
        found: list[Rollout] = []
        async with client.rollouts(
            [Task(QUESTION.format(number)) for number in range(50)],
            tools=[calculator],
            verifier=one,
            group_size=4,
            sampling=Sampling(max_output_tokens=96),
            limits=Limits(concurrency=24),
        ) as stream:
            async for group in stream:
                found += group.rollouts
                if len(found) in (60, 140):
                    await until_serving(url, [len(found) // 100])
                    (victim,) = [process for process in servers() if process.pid not in before]
                    victim.kill()
        state = await health(url)
    assert len(found) == 200
    assert Counter(rollout.outcome for rollout in found)[Outcome.FAILED] == 0
    assert {rollout.reward for rollout in found} <= {0.5, 1.0}
    assert [replica["restarts"] for replica in state["replicas"]] == [2]
    calls = [call for rollout in found for call in rollout.model_calls]
    assert sum(call.retries for call in calls) > 0  # what was in flight was asked for again
    versions = {span.version for call in calls for span in call.tokens.weight_versions}
    assert versions == {"1"}  # also after a restart, which begins with the model's own weights
    reports = [rollout.token_report() for rollout in found]
    assert not any(report.forks or report.unreported_forks for report in reports)
    assert all(report.trained_tokens == report.generated_tokens for report in reports)


@asynccontextmanager
async def router(python: Path, workers: Sequence[str], log: Path) -> AsyncIterator[str]:
    """The real sglang-router over some SGLangs."""
    url = f"http://127.0.0.1:{unused_port()}"
    command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", url.rpartition(":")[2], "--worker-urls", *workers]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while True:
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/workers") as answer:
                        if answer.status == 200 and (await answer.json())["total"] == len(workers):
                            break
                await asyncio.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def test_replicas_behind_a_router_take_the_same_weights_and_one_may_die(
    sglang: SGLangProcess,
    engine: SGLangEngine,
    tiny_policy: Path,
    python: Path,
    arguments: Sequence[str],
    tmp_path: Path,
) -> None:
    await engine.update_weights(FolderWeights(tiny_policy), version="0")
    shutil.copytree(tiny_policy, tmp_path / "pushed")
    found: list[Rollout] = []
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(
            launch_sglang(
                tiny_policy, python=python, arguments=arguments, log=tmp_path / "log", start_s=START_S
            )
        )
        address = await stack.enter_async_context(
            router(python, [sglang.url, second.url], tmp_path / "router.log")
        )
        serve = ["--backend", "sglang", "--sglang-url", address]
        url = await stack.enter_async_context(
            launch_server(tiny_policy, arguments=serve, log=tmp_path / "server.log", start_s=START_S)
        )
        assert {replica["url"] for replica in (await health(url))["replicas"]} == {sglang.url, second.url}
        client = await stack.enter_async_context(GymClient(url, model="policy"))
        stream = await stack.enter_async_context(
            client.rollouts(
                [Task(QUESTION.format(number)) for number in range(40)],
                tools=[calculator],
                verifier=one,
                group_size=4,
                sampling=Sampling(max_output_tokens=96),
                limits=Limits(concurrency=24),
            )
        )
        async for group in stream:
            found += group.rollouts
            if len(found) == 40:
                await client.update_weights(tmp_path / "pushed", version="1")
            if len(found) == 80:
                psutil.Process(second._keeper.pid).children()[0].kill()
        after = await client.rollout(Task(QUESTION.format(7)), tools=[calculator])
        state = {replica["url"]: replica for replica in (await health(url))["replicas"]}
    assert len(found) == 160
    assert Counter(rollout.outcome for rollout in found)[Outcome.FAILED] == 0
    assert {rollout.reward for rollout in found} <= {0.5, 1.0}
    assert state[sglang.url]["serves"]
    assert not state[second.url]["serves"]
    versions = {span.version for call in after.model_calls for span in call.tokens.weight_versions}
    assert versions == {"1"}
    assert not any(rollout.token_report().forks for rollout in found)
