"""Policies that know nothing yet, in the environments that they will learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.tiny import RECIPES, build_tiny_policy
from gym_sdk.client import GymClient
from gym_sdk.environments import lockers, lockers_tasks, spelling, spelling_tasks
from gym_sdk.rollout import Limits, Sampling


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("family", "environment", "tasks"),
    [("lockers", lockers, lockers_tasks), ("spelling", spelling, spelling_tasks)],
)
async def test_rollouts_of_an_untrained_policy_end_with_a_reward(
    family: str, environment: Any, tasks: Any, tmp_path: Path
) -> None:
    recipe = replace(RECIPES[family], copy_steps=0, trace_steps=0)
    folder = build_tiny_policy(tmp_path / family, recipe)
    async with GymClient.local(folder, device="cpu", threads=1) as client:
        stream = client.rollouts(
            tasks(size=2, seed=0),
            environment=environment(),
            group_size=2,
            sampling=Sampling(temperature=1.0, max_output_tokens=8, seed=0),
            limits=Limits(max_turns=2),
        )
        async with stream as groups:
            rollouts = [rollout async for group in groups for rollout in group.rollouts]
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert rollout.failure is None
        assert rollout.reward is not None
        assert 0.0 <= rollout.reward <= 1.0
        (sequence,) = rollout.sequences()
        assert any(sequence.loss_mask)
