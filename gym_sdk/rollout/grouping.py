"""Scoring the rollouts of a group together."""

from __future__ import annotations

import asyncio

from gym_sdk.rollout.deadline import was_cancelled, within
from gym_sdk.rollout.groups import OpenGroup, is_scorable
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.schema import Rollout, Stage
from gym_sdk.verifiers import run_group_verifier

__all__ = ["is_scored", "score_group"]

_SCORED = "group_scored"
"""The metric of a rollout whose reward is the group verifier's."""


def is_scored(group: OpenGroup) -> bool:
    """Whether all rewards are the group verifier's already, as those of a stored group are."""
    return all(_SCORED in rollout.metrics for rollout in group.chosen() if is_scorable(rollout))


async def score_group(group: OpenGroup, spec: RolloutSpec) -> list[Rollout]:
    """Run the environment's group verifier on the rollouts that have come to an end of their own.

    Its reward replaces that of the rollout's own verifier, which stays as the component `verifier`. If it
    fails, all of these rollouts fail: there is no reward without the others'.

    Returns:
        The rollouts that were scored, or failed.
    """
    verifier = spec.environment.group_verifier
    rollouts = [rollout for rollout in group.chosen() if is_scorable(rollout)]
    if verifier is None or not rollouts:
        return rollouts
    for rollout in rollouts:
        _take_back(rollout)
    slots = spec.gates.verifiers
    if slots is not None:
        await slots.acquire(group.order)
    try:
        rewards = await within(
            "the group verifier", spec.deadlines.verifier_s, run_group_verifier(verifier, rollouts)
        )
    except (Exception, asyncio.CancelledError) as error:
        if was_cancelled():
            raise
        for rollout in rollouts:
            rollout.fail(error, Stage.GROUP_VERIFIER)
        return rollouts
    finally:
        if slots is not None:
            slots.release()
    for rollout, reward in zip(rollouts, rewards, strict=True):
        own = {} if rollout.reward is None else {"verifier": rollout.reward}
        rollout.reward_components |= own | dict(reward.components)
        rollout.reward = reward.value
        rollout.metrics[_SCORED] = 1.0
    return rollouts


def _take_back(rollout: Rollout) -> None:
    """Give a rollout that was scored among others the reward of its own verifier again."""
    if rollout.metrics.pop(_SCORED, None) is not None:
        rollout.reward = rollout.reward_components.pop("verifier", None)
