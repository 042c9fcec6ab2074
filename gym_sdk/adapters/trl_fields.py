"""Rollouts as the fields of TRL's rollout functions, and their rewards as TRL wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gym_sdk.adapters.split import SplitRow, split_row
from gym_sdk.errors import GymError
from gym_sdk.schema import Outcome, Rollout

__all__ = ["reward_from_rollout", "trl_fields"]


def trl_fields(rollouts: Sequence[Rollout], *, filler: int) -> dict[str, list[Any]]:
    """Lay rollouts out as what a `rollout_func` of TRL 1.16 returns.

    TRL takes one row for each rollout, and knows no rollout that failed:

    - of a rollout that forked, the row with the most trained tokens is taken; `untrained_tokens` counts the
      sampled tokens of the others;
    - a rollout that failed or was cancelled, or has nothing to train, becomes two filler tokens that are
      masked out of the loss.

    Args:
        rollouts: in the order of TRL's prompts.
        filler: a token id that the model has.

    Returns:
        `prompt_ids`, `completion_ids`, `logprobs` and `env_mask` (1 where the token was sampled) as TRL
        defines them; and for the reward functions `rollout_reward` (None if there is none),
        `rollout_outcome`, `rollout_id`, `untrained_tokens` and `weight_versions` (of the row's tokens).

    Raises:
        GymError: nothing is left to train: TRL would divide by zero tokens, and its weights become NaN.
        TokenContractError: a rollout that did not fail has no tokens.
    """
    fields: dict[str, list[Any]] = {
        name: []
        for name in (
            "prompt_ids",
            "completion_ids",
            "logprobs",
            "env_mask",
            "rollout_reward",
            "rollout_outcome",
            "rollout_id",
            "untrained_tokens",
            "weight_versions",
        )
    }
    for rollout in rollouts:
        split, untrained, versions = _longest(rollout)
        if split is None:
            split = SplitRow([filler], [filler], [0], [0.0])
        fields["prompt_ids"].append(split.prompt_ids)
        fields["completion_ids"].append(split.completion_ids)
        fields["logprobs"].append(split.completion_log_probs)
        fields["env_mask"].append(split.completion_mask)
        fields["rollout_reward"].append(rollout.reward)
        fields["rollout_outcome"].append(str(rollout.outcome))
        fields["rollout_id"].append(rollout.id)
        fields["untrained_tokens"].append(untrained)
        fields["weight_versions"].append(versions)
    if not any(any(mask) for mask in fields["env_mask"]):
        failure = next((rollout.failure for rollout in rollouts if rollout.failure is not None), None)
        reason = f"; the first failure: {failure.error}: {failure.message}" if failure is not None else ""
        raise GymError(f"none of {len(rollouts)} rollouts has a token to train on{reason}")
    return fields


def reward_from_rollout(
    *,
    rollout_reward: list[float | None],
    rollout_outcome: list[str],
    untrained_tokens: list[int],
    log_metric: Callable[[str, float], None],
    **_: Any,
) -> list[float | None]:
    """Hand the verifier's rewards to TRL: one of its `reward_funcs`.

    A rollout without reward gives None, which TRL leaves out of the group's mean and deviation. Further
    reward functions beside this one must give None wherever `rollout_reward` is None, or the filler of a
    failed rollout is scored.

    Logs `rollouts/failed`, the share of rollouts that failed or were cancelled, and
    `rollouts/untrained_tokens`, how many sampled tokens the batch leaves out for forks.
    """
    failed = sum(outcome in (Outcome.FAILED, Outcome.CANCELLED) for outcome in rollout_outcome)
    log_metric("rollouts/failed", failed / max(1, len(rollout_outcome)))
    log_metric("rollouts/untrained_tokens", float(sum(untrained_tokens)))
    return rollout_reward


def _longest(rollout: Rollout) -> tuple[SplitRow | None, int, list[str]]:
    """The row with the most trained tokens, how many the others have, and the versions of the row's."""
    if rollout.outcome in (Outcome.FAILED, Outcome.CANCELLED):
        return None, 0, []
    rows = rollout.sequences()
    if not rows:
        return None, 0, []
    row = max(rows, key=lambda row: row.trained_tokens)
    untrained = sum(other.trained_tokens for other in rows) - row.trained_tokens
    return split_row(row), untrained, list(dict.fromkeys(span.version for span in row.weight_versions))
