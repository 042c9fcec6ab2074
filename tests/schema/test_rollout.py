"""Rollouts and groups as data."""

from __future__ import annotations

import pickle

import pytest

from gym_sdk.errors import ContextOverflowError, DatasetError, GymError, TokenContractError, TransportError
from gym_sdk.schema import Group, Message, ModelCall, Outcome, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens


def rollout(reward: float | None, *, index: int = 0, calls: list[CallTokens] | None = None) -> Rollout:
    return Rollout(
        id=f"ro_{index}",
        task=Task("q", answer={"n": [1, 2]}, id="t", metadata={"tags": ["a"]}),
        index=index,
        items=[Message(role="user", content="q"), Message(role="assistant", content="a")],
        input_items=1,
        model_calls=[
            ModelCall(response_id=f"resp_{n}", first_item=1, end_item=2, tokens=call)
            for n, call in enumerate(calls or [])
        ],
        outcome=Outcome.COMPLETED if reward is not None else Outcome.FAILED,
        reward=reward,
        timing=Timing(started_at=1.0),
    )


def test_a_rollout_survives_json() -> None:
    first = rollout(1.0, calls=[CallTokens([1, 2], [3], [-0.25])])
    again = Rollout.model_validate_json(first.model_dump_json())
    assert again == first
    assert again.task.answer == {"n": [1, 2]}
    assert again.output_text == "a"


def test_a_failed_rollout_has_no_reward_and_stays_out_of_the_group() -> None:
    call = CallTokens([1], [2], [-0.5])
    group = Group(
        task=Task("q", id="t"),
        rollouts=[rollout(value, index=n, calls=[call]) for n, value in enumerate([1.0, None, 0.0])],
    )
    assert group.mean_reward == 0.5
    rows = group.sequences()
    assert [row.rollout_id for row in rows] == ["ro_0", "ro_2"]
    assert [round(row.advantage or 0.0, 3) for row in rows] == [1.0, -1.0]


def test_sequences_extend_or_fork() -> None:
    one = CallTokens([1, 2], [3, 4], [-0.1, -0.2])
    two = CallTokens([1, 2, 3, 4, 9], [5], [-0.3])
    (row,) = rollout(1.0, calls=[one, two]).sequences()
    assert row.token_ids == [1, 2, 3, 4, 9, 5]
    assert row.loss_mask == [0, 0, 1, 1, 0, 1]
    assert row.log_probs == [0.0, 0.0, -0.1, -0.2, 0.0, -0.3]
    edited = CallTokens([1, 2, 3, 8], [5], [-0.3])
    rows = rollout(1.0, calls=[one, edited]).sequences()
    assert [r.forked for r in rows] == [False, True]
    assert rows[1].loss_mask == [0, 0, 0, 0, 1]


def test_rows_need_tokens() -> None:
    bare = rollout(1.0)
    bare.model_calls.append(ModelCall(response_id="resp_x", first_item=1, end_item=2))
    with pytest.raises(TokenContractError, match="resp_x carries no token ids"):
        bare.sequences()


@pytest.mark.parametrize(
    "error",
    [
        TransportError("down", retryable=True, status=503, retry_after_s=2.0),
        ContextOverflowError("long", prompt_tokens=9, context_length=8),
        DatasetError("bad", path="a.jsonl", line=3, field="input"),
    ],
)
def test_errors_pickle_with_their_data(error: GymError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
