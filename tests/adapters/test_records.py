"""Groups and rows as other trainers' records: every trained token is there once, where the trainer looks."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_calls import call_lists

from gym_sdk.adapters import (
    reward_from_rollout,
    slime_advantages,
    split_row,
    to_prime_rl,
    to_slime,
    to_tinker,
    to_verl,
    trl_fields,
)
from gym_sdk.errors import ConfigurationError, GymError, TokenContractError
from gym_sdk.schema import Group, ModelCall, Outcome, Rollout, Stage, Task, Timing
from gym_sdk.tokens import CallTokens, TokenSequence, WeightSpan

some = settings(max_examples=30, deadline=None)

Fact = tuple[str, tuple[int, ...], float, float]
"""A trained token: its rollout, all tokens up to it, its log-prob and its advantage."""


def make_rollout(
    calls: Sequence[CallTokens],
    *,
    index: int = 0,
    reward: float | None = 1.0,
    task: str = "t",
    outcome: Outcome = Outcome.COMPLETED,
) -> Rollout:
    return Rollout(
        id=f"{task}/{index}",
        task=Task(f"question {task}", answer=7, id=task),
        index=index,
        model_calls=[
            ModelCall(response_id=f"r{number}", first_item=0, end_item=0, tokens=call)
            for number, call in enumerate(calls)
        ],
        reward=reward,
        outcome=outcome,
        timing=Timing(started_at=0.0),
    )


def failed(*, index: int = 0, task: str = "t") -> Rollout:
    rollout = make_rollout([CallTokens([1], [2], [-0.5])], index=index, task=task)
    return rollout.fail(TimeoutError("too slow"), Stage.VERIFIER)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Two groups of three rollouts, whose rewards are such that no advantage is 0; one may have failed."""
    made = []
    for task in ("a", "b"):
        rollouts = []
        for index, reward in enumerate((0.0, 1.0, 5.0)):
            calls = [call for call in draw(call_lists()) if call.prompt_length]
            rollouts.append(make_rollout(calls, index=index, reward=reward, task=task))
        if draw(st.booleans()):
            rollouts[2] = failed(index=2, task=task)
        made.append(Group(task=rollouts[0].task, rollouts=rollouts))
    return made


def facts_of(rows: Iterable[TokenSequence]) -> Counter[Fact]:
    facts: Counter[Fact] = Counter()
    for row in rows:
        for at, trained in enumerate(row.loss_mask):
            if trained:
                assert row.advantage
                ids = tuple(row.token_ids[: at + 1])
                facts[row.rollout_id, ids, row.log_probs[at], round(row.advantage, 5)] += 1
    return facts


def all_rows(groups: Sequence[Group]) -> list[TokenSequence]:
    return [row for group in groups for row in group.sequences()]


def trainable(groups: Sequence[Group]) -> list[TokenSequence]:
    return [row for row in all_rows(groups) if any(row.loss_mask)]


@some
@given(groups())
def test_tinker_targets_are_shifted_by_one(groups: list[Group]) -> None:
    rows = all_rows(groups)
    facts: Counter[Fact] = Counter()
    for row, record in zip(trainable(groups), to_tinker(rows), strict=True):
        inputs = record["loss_fn_inputs"]
        assert {len(values) for values in (record["model_input"], *inputs.values())} == {len(row) - 1}  # type: ignore[arg-type]
        for at, advantage in enumerate(inputs["advantages"]):
            assert advantage or inputs["logprobs"][at] == 0.0
            if advantage:
                seen = (*record["model_input"][: at + 1], inputs["target_tokens"][at])
                facts[row.rollout_id, seen, inputs["logprobs"][at], round(advantage, 5)] += 1
    assert facts == facts_of(rows)


@some
@given(groups())
def test_prime_rl_keeps_the_rows_positions(groups: list[Group]) -> None:
    rows = all_rows(groups)
    facts: Counter[Fact] = Counter()
    names = set()
    for record in to_prime_rl(rows, env_name="sums", temperature=0.7):
        names.add((record["trace_id"], record["branch_index"]))
        lists = [record[name] for name in ("token_ids", "mask", "logprobs", "temperatures", "advantages")]  # type: ignore[literal-required]
        assert len({len(values) for values in lists}) == 1
        assert set(record["temperatures"]) == {0.7}
        for at, trained in enumerate(record["mask"]):
            assert trained or (record["advantages"][at], record["logprobs"][at]) == (0.0, 0.0)
            if trained:
                ids = tuple(record["token_ids"][: at + 1])
                facts[
                    record["trace_id"], ids, record["logprobs"][at], round(record["advantages"][at], 5)
                ] += 1
    assert facts == facts_of(rows)
    assert len(names) == len(trainable(groups))


@some
@given(groups(), st.integers(0, 9))
def test_slime_counts_the_response_from_the_end(groups: list[Group], first: int) -> None:
    made = to_slime(groups, first_index=first)
    records = [record for group in made.samples for record in group]
    facts: Counter[Fact] = Counter()
    for record in records:
        size = record["response_length"]
        assert len(record["loss_mask"]) == len(record["rollout_log_probs"]) == size
        assert record["loss_mask"][0] == 1
        start = len(record["tokens"]) - size
        for at, trained in enumerate(record["loss_mask"]):
            if trained:
                ids = tuple(record["tokens"][: start + at + 1])
                advantage = round(record["metadata"]["advantage"], 5)
                facts[record["metadata"]["rollout_id"], ids, record["rollout_log_probs"][at], advantage] += 1
    assert facts == facts_of(all_rows(groups))
    assert [record["index"] for record in records] == list(range(first, first + len(records)))
    assert all(
        group and {record["group_index"] for record in group} == {at} for at, group in enumerate(made.samples)
    )
    left_out = sum(not rollout.ok for group in groups for rollout in group.rollouts)
    rollouts = {record["metadata"]["rollout_id"] for record in records}
    assert made.metrics == {
        "rollouts/left_out": left_out,
        "rollouts/extra_rows": len(records) - len(rollouts),
    }


@some
@given(groups())
def test_verl_pads_prompts_left_and_responses_right(groups: list[Group]) -> None:
    rows = trainable(groups)
    if not rows:
        with pytest.raises(ConfigurationError, match="none of 2 groups has a row"):
            to_verl(groups)
        return
    batch = to_verl(groups, pad_token_id=99, prompt_length=40, response_length=50)
    tensors: dict[str, Any] = dict(batch["tensors"])
    wide = {"input_ids", "attention_mask", "position_ids"}
    for name, tensor in tensors.items():
        width = 90 if name in wide else 40 if name == "prompts" else 50
        assert tensor.shape == (len(rows), width), name
    assert torch.equal(tensors["input_ids"], torch.cat([tensors["prompts"], tensors["responses"]], 1))
    reward_of = {rollout.id: rollout.reward for group in groups for rollout in group.rollouts}
    facts: Counter[Fact] = Counter()
    for number, row in enumerate(rows):
        real = tensors["attention_mask"][number].bool()
        assert tensors["input_ids"][number][real].tolist() == row.token_ids
        assert tensors["position_ids"][number][real].tolist() == list(range(len(row)))
        assert (tensors["input_ids"][number][~real] == 99).all()
        scores = tensors["rm_scores"][number]
        rollout_id = batch["non_tensors"]["rollout_id"][number]
        assert scores[real[40:].sum() - 1] == scores.sum() == reward_of[rollout_id]
        for at in range(50):
            if tensors["response_mask"][number, at]:
                ids = tuple(tensors["input_ids"][number, : 40 + at + 1][real[: 40 + at + 1]].tolist())
                log_prob = tensors["rollout_log_probs"][number, at].item()
                facts[rollout_id, ids, log_prob, round(tensors["advantages"][number, at].item(), 5)] += 1
            else:
                assert tensors["advantages"][number, at] == tensors["rollout_log_probs"][number, at] == 0
    assert facts == facts_of(rows)
    assert torch.equal(tensors["returns"], tensors["advantages"])
    assert set(batch["non_tensors"]["uid"]) == {f"{row.task_id}@0" for row in rows}
    assert batch["meta_info"]["extra_rows"] == len(rows) - len({row.rollout_id for row in rows})
    assert batch["meta_info"]["rollouts_left_out"] == sum(
        not rollout.ok for group in groups for rollout in group.rollouts
    )


@some
@given(call_lists())
def test_trl_trains_the_longest_row_and_counts_the_rest(calls: list[CallTokens]) -> None:
    rollout = make_rollout([call for call in calls if call.prompt_length])
    other = make_rollout([CallTokens([1], [2], [-0.5], (WeightSpan("v", 0, 1),))], index=1)
    fields = trl_fields([rollout, other], filler=9)
    sizes = [row.trained_tokens for row in rollout.sequences()]
    mask, log_probs = fields["env_mask"][0], fields["logprobs"][0]
    assert sum(mask) == max(sizes, default=0)
    assert fields["untrained_tokens"] == [sum(sizes) - sum(mask), 0]
    assert len(mask) == len(log_probs) == len(fields["completion_ids"][0]) > 0
    ids = fields["prompt_ids"][0] + fields["completion_ids"][0]
    if any(sizes):
        row = next(row for row in rollout.sequences() if row.trained_tokens == max(sizes))
        start = len(fields["prompt_ids"][0])
        assert ids == row.token_ids
        assert [0] * start + mask == row.loss_mask
        assert [0.0] * start + log_probs == row.log_probs
    else:
        assert (ids, mask, log_probs) == ([9, 9], [0], [0.0])
    assert fields["weight_versions"][1] == ["v"]


def test_trl_masks_a_failed_rollout_and_gives_it_no_reward() -> None:
    good = make_rollout([CallTokens([1], [2, 3], [-0.5, -0.25])], reward=0.5)
    unscored = make_rollout([CallTokens([1], [2], [-0.5])], reward=None, index=2)
    fields = trl_fields([good, failed(index=1), unscored], filler=9)
    assert fields["completion_ids"] == [[2, 3], [9], [2]]
    assert fields["env_mask"] == [[1, 1], [0], [1]]  # a rollout that nobody scored may be scored by TRL
    logged: dict[str, float] = {}
    extra = {name: fields[name] for name in ("rollout_reward", "rollout_outcome", "untrained_tokens")}
    rewards = reward_from_rollout(**extra, log_metric=logged.__setitem__, prompts=[], completions=[])
    assert rewards == [0.5, None, None]
    assert logged == {"rollouts/failed": 1 / 3, "rollouts/untrained_tokens": 0.0}
    with pytest.raises(GymError, match=r"none of 2 rollouts.*TimeoutError: too slow"):
        trl_fields([failed(), failed(index=1)], filler=9)


def test_slime_gets_our_advantages_and_statuses() -> None:
    span = (WeightSpan("3", 0, 1), WeightSpan("4", 1, 2))
    good = make_rollout([CallTokens([1], [2, 3], [-0.5, -0.25], span)], reward=1.0)
    cut = make_rollout([CallTokens([1], [2], [-1.0])], reward=0.0, index=1, outcome=Outcome.TRUNCATED)
    lost = Group(task=Task("x", id="lost"), rollouts=[failed(task="lost")])
    made = to_slime([lost, Group(task=good.task, rollouts=[good, failed(index=2), cut])])
    [records] = made.samples
    assert [record["status"] for record in records] == ["completed", "truncated"]
    assert records[0]["weight_versions"] == ["3", "4"]
    assert (records[0]["prompt"], records[0]["label"]) == ("question t", "7")
    samples = [
        SimpleNamespace(
            get_reward_value=lambda args, record=record: record["reward"], metadata=record["metadata"]
        )
        for record in records
    ]
    raw, advantages = slime_advantages(None, samples)
    assert raw == [1.0, 0.0]
    assert advantages == pytest.approx([1.0, -1.0], abs=1e-5)
    assert made.metrics == {"rollouts/left_out": 2, "rollouts/extra_rows": 0}


def test_rows_that_cannot_be_converted_are_refused() -> None:
    row = TokenSequence([1, 2], [0, 1], [0.0, -1.0], rollout_id="r")
    with pytest.raises(ConfigurationError, match="rollout 'r' has no advantage"):
        to_tinker([row])
    with pytest.raises(ConfigurationError, match="rollout 'r' has no advantage"):
        to_prime_rl([row], env_name="sums")
    with pytest.raises(ConfigurationError, match="temperature must be positive"):
        to_prime_rl([], env_name="sums", temperature=0.0)
    with pytest.raises(TokenContractError, match="starts with a sampled token"):
        split_row(dataclasses.replace(row, loss_mask=[1, 1]))
    with pytest.raises(TokenContractError, match="2 tokens, 1 mask entries and 2 log-probs"):
        split_row(dataclasses.replace(row, loss_mask=[1]))
    group = Group(task=Task("x", id="t"), rollouts=[make_rollout([CallTokens([1, 2], [3], [-1.0])])])
    with pytest.raises(ConfigurationError, match=r"a prompt has 2 tokens, prompt_length is 1; .*never cut"):
        to_verl([group], prompt_length=1)
    with pytest.raises(ConfigurationError, match=r"a response has 1 tokens, response_length is 0"):
        to_verl([group], response_length=0)


def test_tinkers_own_classes_take_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("tinker") is None:
        monkeypatch.syspath_prepend(Path(sys.prefix) / "trl")  # where `make` puts it
    tinker = pytest.importorskip("tinker", reason="the package tinker is not installed")
    rows = [TokenSequence([5, 6, 7, 8], [0, 1, 0, 1], [0.0, -1.0, 0.0, -0.5], advantage=2.0)]
    [record] = to_tinker(rows)
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(record["model_input"]),
        loss_fn_inputs=record["loss_fn_inputs"],
    )
    assert datum.model_input.to_ints() == [5, 6, 7]
    inputs = {name: (data.dtype, list(data.data)) for name, data in datum.loss_fn_inputs.items()}
    assert inputs == {
        "target_tokens": ("int64", [6, 7, 8]),
        "logprobs": ("float32", [-1.0, 0.0, -0.5]),
        "advantages": ("float32", [2.0, 0.0, 2.0]),
    }
