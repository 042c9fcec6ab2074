"""Which rows are trained, and which numbers describe a step's rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo import GRPOConfig, select_rows
from gym_sdk.schema import Failure, Group, Outcome, Rollout, Task
from gym_sdk.tokens import CallTokens

Make = Callable[..., Rollout]
CALL = CallTokens([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3])
LATER = CallTokens([1, 2, 3, 4, 5, 9], [6], [-0.4])
FORK = CallTokens([1, 9, 9], [7, 8], [-0.5, -0.6])
FAILURE = Failure(error="TransportError", message="gone", where="model_call")


def group(
    make: Make, *rewards: float | None, name: str = "a", calls: tuple[CallTokens, ...] = (CALL,)
) -> Group:
    task = Task("x", id=name)
    rollouts = [
        make(
            task,
            index,
            calls=calls if reward is not None else [None],
            reward=reward,
            outcome=Outcome.COMPLETED if reward is not None else Outcome.FAILED,
            failure=None if reward is not None else FAILURE,
        )
        for index, reward in enumerate(rewards)
    ]
    return Group(task=task, rollouts=rollouts)


def test_failed_rollouts_have_no_rows_and_leave_the_baseline_alone(make_rollout: Make) -> None:
    config = GRPOConfig()
    with_failures = select_rows([group(make_rollout, 1.0, None, 0.0, None)], config, vocab_size=10)
    without = select_rows([group(make_rollout, 1.0, 0.0)], config, vocab_size=10)
    assert [row.advantage for row in with_failures.trained_rows] == [
        row.advantage for row in without.trained_rows
    ]
    assert [row.rollout_id for row in with_failures.trained_rows] == ["a/0", "a/2"]
    assert with_failures.trained_rows[0].advantage == pytest.approx(1.0, abs=1e-5)


def test_groups_without_variance_or_with_too_few_rewards_are_dropped_and_counted(make_rollout: Make) -> None:
    groups = [
        group(make_rollout, 1.0, 0.0, name="kept"),
        group(make_rollout, 1.0, 1.0, name="same"),
        group(make_rollout, 1.0, None, None, name="few"),
    ]
    selection = select_rows(groups, GRPOConfig(), vocab_size=10)
    assert {row.task_id for row in selection.trained_rows} == {"kept"}
    assert (selection.no_variance, selection.too_few) == (1, 1)
    assert selection.trainable

    kept = select_rows(groups[1:2], GRPOConfig(drop_zero_variance=False), vocab_size=10)
    assert [row.advantage for row in kept.trained_rows] == [0.0, 0.0]
    assert not kept.trainable

    strict = select_rows(groups[:1], GRPOConfig(min_valid_per_group=3), vocab_size=10)
    assert strict.too_few == 1


def test_every_row_of_a_forked_rollout_gets_its_advantage(make_rollout: Make) -> None:
    forked = group(make_rollout, 1.0, 0.0, calls=(CALL, LATER, FORK))
    selection = select_rows([forked], GRPOConfig(scale="none"), vocab_size=10)
    assert [(row.rollout_id, row.advantage) for row in selection.trained_rows] == [
        ("a/0", 0.5),
        ("a/0", 0.5),
        ("a/1", -0.5),
        ("a/1", -0.5),
    ]
    assert selection.extra_rows == 2
    assert selection.generated == [6, 6]
    assert selection.prompt_tokens == 2 * (3 + 3)


def test_rows_without_a_sampled_token_are_left_out(make_rollout: Make) -> None:
    empty = group(make_rollout, 1.0, 0.0, calls=(CallTokens([1, 2], [], []),))
    selection = select_rows([empty], GRPOConfig(), vocab_size=10)
    assert not selection.groups
    assert not selection.trainable


def test_missing_tokens_are_an_error_even_in_a_group_that_is_dropped(make_rollout: Make) -> None:
    task = Task("x", id="a")
    bare = Group(task=task, rollouts=[make_rollout(task, i, calls=[None], reward=1.0) for i in range(2)])
    with pytest.raises(TokenContractError, match="carries no token ids"):
        select_rows([bare], GRPOConfig(), vocab_size=10)


def test_tokens_that_the_model_does_not_have_are_an_error(make_rollout: Make) -> None:
    with pytest.raises(TokenContractError, match=r"a/0: token id 5 is outside .* vocabulary of 5"):
        select_rows([group(make_rollout, 1.0, 0.0)], GRPOConfig(), vocab_size=5)


def test_a_reward_that_is_not_finite_is_an_error(make_rollout: Make) -> None:
    with pytest.raises(ConfigurationError, match="a verifier must return a finite number"):
        select_rows([group(make_rollout, 1.0, math.nan)], GRPOConfig(), vocab_size=10)
