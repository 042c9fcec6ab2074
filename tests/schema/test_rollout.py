"""Rollouts and groups as data."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from pydantic import ValidationError
from support.token_calls import call_lists, chain

from gym_sdk.errors import ContextOverflowError, DatasetError, GymError, TokenContractError, TransportError
from gym_sdk.schema import Group, Message, ModelCall, Outcome, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens, WeightSpan


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


def linked_calls() -> list[CallTokens]:
    one = CallTokens([1, 2], [3, 4], [-0.1, -0.2], (WeightSpan("0", 0, 2),))
    two = CallTokens.extending(one, [9], [5], [-0.3], (WeightSpan("1", 0, 1),))
    return [one, two, CallTokens.extending(one, [8], [6], [-0.4])]


def test_linked_tokens_are_written_once() -> None:
    first = rollout(1.0, calls=linked_calls())
    data = json.loads(first.model_dump_json())
    assert data["schema_version"] == 3
    assert [call["tokens"] for call in data["model_calls"]] == [
        {
            "prompt_token_ids": [1, 2],
            "generation_token_ids": [3, 4],
            "generation_log_probs": [-0.1, -0.2],
            "weight_versions": [{"version": "0", "start": 0, "end": 2}],
        },
        {
            "extends": 0,
            "new_prompt_token_ids": [9],
            "generation_token_ids": [5],
            "generation_log_probs": [-0.3],
            "weight_versions": [{"version": "1", "start": 0, "end": 1}],
        },
        {
            "extends": 0,
            "new_prompt_token_ids": [8],
            "generation_token_ids": [6],
            "generation_log_probs": [-0.4],
            "weight_versions": [],
        },
    ]
    for again in (Rollout.model_validate(first.model_dump()), Rollout.model_validate_json(json.dumps(data))):
        assert again == first
        one, two, three = (call.tokens for call in again.model_calls)
        assert two is not None
        assert three is not None
        assert two.parent is three.parent is one


@settings(deadline=None)
@given(call_lists())
def test_calls_of_any_shape_survive_json(calls: list[CallTokens]) -> None:
    first = rollout(1.0, calls=calls)
    again = Rollout.model_validate_json(first.model_dump_json())
    assert again == first
    for index, call in enumerate(calls):
        linked = again.model_calls[index].tokens
        assert linked is not None
        for place, other in enumerate(calls[:index]):
            if call.parent is other:
                assert linked.parent is again.model_calls[place].tokens


def test_a_call_that_skips_its_parent_extends_the_closest_ancestor() -> None:
    one, two, _ = linked_calls()
    three = CallTokens.extending(two, [7], [7], [-0.5])
    first = rollout(1.0, calls=[one, three])
    tokens = first.model_dump()["model_calls"][1]["tokens"]
    assert (tokens["extends"], tokens["new_prompt_token_ids"]) == (0, [9, 5, 7])
    assert Rollout.model_validate_json(first.model_dump_json()) == first


def test_a_call_before_its_parent_is_written_whole() -> None:
    one, two, _ = linked_calls()
    first = rollout(1.0, calls=[two, one])
    assert first.model_dump()["model_calls"][0]["tokens"]["prompt_token_ids"] == [1, 2, 3, 4, 9]
    assert Rollout.model_validate_json(first.model_dump_json()) == first


def test_a_long_rollout_holds_and_writes_each_token_once() -> None:
    first = rollout(1.0, calls=chain(1_000, new=20, generated=10))
    text = first.model_dump_json()
    again = Rollout.model_validate_json(text)
    last = again.model_calls[-1].tokens
    assert last is not None
    assert last == first.model_calls[-1].tokens
    held = sum(call.tokens.own_tokens for call in again.model_calls if call.tokens)
    assert held == last.total_tokens == 30_000
    assert text.count("7,") <= 20_000


def test_a_lone_model_call_is_written_whole_and_read_only_so() -> None:
    call = rollout(1.0, calls=linked_calls()).model_calls[1]
    data = call.model_dump()
    assert data["tokens"]["prompt_token_ids"] == [1, 2, 3, 4, 9]
    assert ModelCall.model_validate_json(call.model_dump_json()) == call
    data["tokens"] = {"extends": 0, "new_prompt_token_ids": [9], **data["tokens"]}
    with pytest.raises(ValidationError, match="a model call by itself needs prompt_token_ids"):
        ModelCall.model_validate(data)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"extends": 2}, r"model_calls\[2\]\.tokens extends 2, which is not .* an earlier model call"),
        ({"extends": 7}, r"model_calls\[2\]\.tokens extends 7"),
        ({"extends": -1}, r"model_calls\[2\]\.tokens extends -1, which is not"),
        ({"extends": 1}, r"model_calls\[2\]\.tokens extends 1, but that model call has no tokens"),
        ({"extends": "x"}, r"extends\s+Input should be a valid integer"),
        ({"new_prompt_token_ids": [-1]}, "new_prompt_token_ids holds a negative id"),
        ({"generation_log_probs": []}, "generation_log_probs has 0 entries for 1"),
        ({"prompt_token_ids": []}, r"prompt_token_ids\s+Unexpected keyword argument"),
    ],
)
def test_links_that_lead_nowhere_are_refused_by_name(change: dict[str, object], complaint: str) -> None:
    data = rollout(1.0, calls=linked_calls()).model_dump()
    data["model_calls"][1]["tokens"] = None
    data["model_calls"][2]["tokens"].update(change)
    with pytest.raises(ValidationError, match=complaint):
        Rollout.model_validate(data)


def test_tokens_can_be_left_out() -> None:
    data = rollout(1.0, calls=linked_calls()).model_dump(exclude={"model_calls": {"__all__": {"tokens"}}})
    assert all("tokens" not in call for call in data["model_calls"])


def test_version_1_is_read_and_what_is_newer_refused() -> None:
    data = rollout(1.0, calls=linked_calls()).model_dump()
    data["schema_version"] = 1
    for call, tokens in zip(data["model_calls"], linked_calls(), strict=True):
        for name in ("fork", "unparsed_calls"):
            del call[name]
        call["tokens"] = {
            "prompt_token_ids": tokens.prompt_token_ids,
            "generation_token_ids": tokens.generation_token_ids,
            "generation_log_probs": tokens.generation_log_probs,
            "weight_versions": [asdict(span) for span in tokens.weight_versions],
        }
    again = Rollout.model_validate_json(json.dumps(data))
    assert again == rollout(1.0, calls=linked_calls())
    assert again.schema_version == 3
    data["schema_version"] = 4
    with pytest.raises(
        ValidationError, match="version 4 of the data is not known; this gym-sdk reads 1 to 3"
    ):
        Rollout.model_validate(data)


def test_the_report_knows_what_the_server_said() -> None:
    one, two, other = linked_calls()
    first = rollout(1.0, calls=[one, two, other])
    assert first.token_report().unreported_forks == 1
    first.model_calls[2].fork = "history edited"
    first.model_calls[1].unparsed_calls = 2
    report = first.token_report(decode=lambda ids: " ".join(map(str, ids)))
    assert (report.unparsed_calls, report.unreported_forks, report.sequences) == (2, 0, 2)
    assert [(fork.reason, fork.found_text) for fork in report.forks] == [("history edited", "8")]


def test_abandoned_rows_can_be_left_out() -> None:
    lost, kept = CallTokens([1], [2], [-0.1]), CallTokens([1], [3], [-0.1])
    both = rollout(1.0, calls=[lost, kept])
    assert [row.abandoned for row in both.sequences()] == [False, True]
    assert [row.calls for row in both.sequences(abandoned=False)] == [[1]]
    group = Group(task=both.task, rollouts=[both, rollout(0.0, index=1, calls=[kept])])
    assert len(group.sequences()) == 3
    assert len(group.sequences(abandoned=False)) == 2


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


def test_numbers_that_json_lacks_do_not_keep_a_rollout_from_being_read() -> None:
    """A verifier noted a NaN; the rollout was stored, so it has to come back."""
    rollout = Rollout(
        id="r",
        task=Task("q", id="t"),
        reward=1.0,
        reward_components={"style": float("nan"), "right": 1.0},
        metrics={"ratio": float("inf"), "tool_calls": 2.0},
        timing=Timing(started_at=0.0),
    )
    read = Rollout.model_validate_json(rollout.model_dump_json())
    assert (read.reward_components, read.metrics) == ({"right": 1.0}, {"tool_calls": 2.0})
