"""What a collection says of its groups."""

from __future__ import annotations

import pytest
from support.scored import group_of, scored

from gym_sdk.errors import TransportError
from gym_sdk.metrics import final_number
from gym_sdk.rollout import Collection
from gym_sdk.schema import Failure, Group, Outcome, Stage, Task


def collection() -> Collection:
    failure = Failure.of(TransportError("no answer", retryable=True), Stage.MODEL_CALL)
    lost = scored(None, outcome=Outcome.FAILED, failure=failure)
    one = group_of(
        [1.0, 1.0, 0.0], task=Task("q", id="a", metadata={"tags": ["sum"]}), texts=["5", "5.0", "6"]
    )
    other = group_of([0.0, 0.0, 1.0], task=Task("q", id="b", metadata={"level": 2}), texts=["1", "2", "3"])
    return Collection([one, other, Group(task=Task("q", id="c"), rollouts=[lost])], duration_s=2.0)


def test_estimates_leave_out_what_has_no_reward() -> None:
    found = collection()
    assert found.mean_reward == 0.5
    assert found.reward_error == pytest.approx(1 / 6)
    assert found.pass_at(3) == 1.0
    assert found.pass_hat(2) == pytest.approx((1 / 3 + 0) / 2)
    assert found.majority_at(3, answer_of=final_number) == pytest.approx((1 + 1 / 3) / 2)
    assert found.majority_at(3) == pytest.approx((2 / 3 + 1 / 3) / 2)  # "5" and "5.0" differ as texts
    assert found.pass_at(4) is None
    assert found.pass_hat(1, threshold=0.0) == 1.0


def test_numbers_by_name() -> None:
    found = collection()
    numbers = found.metrics()
    assert numbers["reward/mean"] == 0.5
    assert numbers["errors/model_call/TransportError"] == 1
    assert numbers["throughput/rollouts_per_s"] == 3.5
    summary = found.summary()
    assert summary["mean_reward"] == numbers["reward/mean"]
    assert summary["reward_error"] == pytest.approx(numbers["reward/error"])
    assert summary["pass@2"] == pytest.approx(numbers["pass_at/2"])
    assert summary["rollouts_per_s"] == 3.5
    assert summary["generated_tokens"] == numbers["totals/generated_tokens"]
    assert "pass@4" not in summary


def test_tables() -> None:
    found = collection()
    assert [row["name"] for row in found.by_tag().to_dicts()] == ["(none)", "sum", "all"]
    by_level = found.by_tag(lambda task: str(task.metadata.get("level", "?")), ks=(1,))
    assert {row["name"]: row["pass@1"] for row in by_level.to_dicts()}["2"] == pytest.approx(1 / 3)
    assert found.table(limit=1).endswith("... and 6 more")
    assert "1 x TransportError in model_call" in str(found)
    assert "mean_reward <b>0.5</b>" in found._repr_html_()


def test_an_empty_collection_has_no_numbers_that_need_some() -> None:
    found = Collection()
    assert (found.mean_reward, found.reward_error, found.pass_at(1), found.majority_at(1)) == (None,) * 4
    assert found.metrics()["rollouts"] == 0
    assert "mean_reward" not in found.summary()
    assert repr(found) == "<Collection of 0 tasks, 0 rollouts, mean reward none>"
    assert str(found).startswith("task")
