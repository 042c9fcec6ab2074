"""The whole chain on real parts: what is trained is what was sampled, over HTTP and in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from aiohttp.test_utils import TestServer
from transformers import AutoModelForCausalLM

from backends.loading import PolicyConfig, load_policy
from backends.server import make_app
from gym_sdk import GymClient, Limits, Outcome, Sampling
from gym_sdk.environments import arithmetic, arithmetic_tasks
from gym_sdk.grpo import FolderSync, GRPOConfig, GRPOTrainer, OptimizerConfig, TensorSync, WeightSync
from gym_sdk.tokens import TokenSequence

pytestmark = [pytest.mark.asyncio, pytest.mark.slow, pytest.mark.timeout(600)]

LIMITS = Limits(concurrency=64, max_turns=4)
SAMPLING = Sampling(temperature=1.0, max_output_tokens=64, seed=3)


@pytest_asyncio.fixture(params=["http", "local"])
async def client(request: pytest.FixtureRequest, tiny_policy: Path) -> AsyncIterator[GymClient]:
    if request.param == "local":
        async with GymClient.local(tiny_policy) as client:
            yield client
        return
    policy = load_policy(PolicyConfig(model=str(tiny_policy)))
    async with TestServer(make_app(policy), handler_cancellation=True) as server:
        async with GymClient(str(server.make_url("/v1")), model="policy") as client:
            yield client
    await policy.aclose()


def forward_log_probs(model: torch.nn.Module, row: TokenSequence) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([row.token_ids])).logits[0].float()
    log_probs = torch.log_softmax(logits[:-1], dim=-1)
    targets = torch.tensor(row.token_ids[1:])
    return [0.0, *log_probs.gather(1, targets[:, None])[:, 0].tolist()]


async def test_rollouts_with_tools_are_one_row_and_their_log_probs_are_the_models(
    client: GymClient, tiny_policy: Path
) -> None:
    tasks = arithmetic_tasks(size=16, seed=11)
    collection = await client.collect(
        tasks, environment=arithmetic(), group_size=4, sampling=SAMPLING, limits=LIMITS
    )
    model = AutoModelForCausalLM.from_pretrained(str(tiny_policy)).eval()
    used_tools = 0
    worst = 0.0
    for rollout in collection.rollouts:
        assert rollout.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED)
        assert rollout.reward in (0.0, 1.0)
        assert rollout.metrics.get("forks", 0.0) == 0.0
        rows = rollout.sequences()
        assert len(rows) == 1
        used_tools += len(rollout.model_calls) > 1
        sampled = sum(len(call.tokens.generation_token_ids) for call in rollout.model_calls if call.tokens)
        assert rows[0].trained_tokens == sampled
        expected = forward_log_probs(model, rows[0])
        pairs = zip(rows[0].loss_mask, rows[0].log_probs, expected, strict=True)
        worst = max(worst, *(abs(found - wanted) for trained, found, wanted in pairs if trained))
    assert used_tools >= 4  # the warm start has taught it to call the calculator now and then
    assert worst < 1e-4


@pytest.mark.parametrize("carrier", ["folder", "tensors"])
async def test_training_stays_on_policy_through_weight_syncs(
    tiny_policy: Path, tmp_path: Path, carrier: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_policy))
    async with GymClient.local(tiny_policy) as client:
        sync: WeightSync = (
            FolderSync(client, tmp_path / "weights") if carrier == "folder" else TensorSync(client)
        )
        trainer = GRPOTrainer(
            model,
            rollouts=partial(
                client.rollouts, environment=arithmetic(), group_size=8, sampling=SAMPLING, limits=LIMITS
            ),
            tasks=arithmetic_tasks(size=24, seed=5),
            sync=sync,
            config=GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-4), tasks_per_step=8, max_steps=3),
            output_dir=tmp_path,
            tokenizer_dir=tiny_policy,
        )
        async with trainer:
            steps = [step async for step in trainer]
            await trainer.save(tmp_path / "checkpoint")
    assert [step.index for step in steps] == [1, 2, 3]
    for step in steps:
        assert step.metrics["updates"] >= 1
        assert step.metrics["max_logprob_diff"] < 1e-4
        assert step.metrics["failed"] == 0
    versions = [
        {
            span.version
            for rollout in step.groups[0].rollouts
            for row in rollout.sequences()
            for span in row.weight_versions
        }
        for step in steps
    ]
    assert versions == [{"0"}, {"step-000001"}, {"step-000002"}]
    async with GymClient.local(tmp_path / "checkpoint") as client:
        assert (await client.respond("1 + 1 =", max_output_tokens=4)).tokens is not None
