"""Bad input in a step: what is refused, and what is left out and counted, by the names of the docs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import same_tensors, tensors
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, GymError, TokenContractError
from gym_sdk.grpo import GRPOConfig, GRPOTrainer, OptimizerConfig, TrainStep
from gym_sdk.grpo.metrics import rollout_metrics
from gym_sdk.grpo.selection import select_rows
from gym_sdk.schema import Failure, Group, Outcome, Rollout, Task
from gym_sdk.tokens import CallTokens, WeightSpan

Models = Callable[..., PreTrainedModel]
Make = Callable[..., Rollout]
CONFIG = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=8)
FAILURE = Failure(error="TransportError", message="gone", where="model_call")


def call(seed: int, *, prompt: int = 2, size: int = 4, versions: tuple[WeightSpan, ...] = ()) -> CallTokens:
    """Made-up tokens of a vocabulary of 16."""
    ids = [(7 * seed + 3 * place) % 16 for place in range(prompt + size)]
    return CallTokens(ids[:prompt], ids[prompt:], [-2.5] * size, versions)


class Lab:
    """Trains one step on given groups, from the same weights each time."""

    def __init__(self, make_model: Models, make_rollout: Make, make_source: Any, tasks: list[Task]) -> None:
        self.make_model, self.make_rollout, self.make_source = make_model, make_rollout, make_source
        self.tasks = tasks

    def group(self, number: int, *rewards: float | None, **fields: Any) -> Group:
        """Rollouts with rewards and tokens; None is one that failed."""
        task = self.tasks[number]
        rollouts = []
        for index, reward in enumerate(rewards):
            ended = {"outcome": Outcome.FAILED, "failure": FAILURE} if reward is None else {}
            calls = [call(number * 8 + index)]
            settings = {"calls": calls, "reward": reward} | ended | fields
            rollouts.append(self.make_rollout(task, index, **settings))
        return Group(task=task, rollouts=rollouts)

    async def step(self, *groups: Group, **changes: Any) -> tuple[TrainStep, list[torch.Tensor]]:
        """Return the step and the weights after it."""
        model = self.make_model()
        config = GRPOConfig(**({"optimizer": CONFIG.optimizer, "tasks_per_step": 8} | changes))
        async with GRPOTrainer(
            model, rollouts=self.make_source(groups), tasks=self.tasks, config=config
        ) as trainer:
            step = await anext(trainer)
        return step, tensors(model.state_dict())

    async def refused(self, error: type[Exception], says: str, *groups: Group) -> None:
        model = self.make_model()
        before = tensors(model.state_dict())
        async with GRPOTrainer(
            model, rollouts=self.make_source(groups), tasks=self.tasks, config=CONFIG
        ) as trainer:
            with pytest.raises(error, match=says):
                await anext(trainer)
            assert trainer.step == 0
        assert same_tensors(before, tensors(model.state_dict()))


@pytest.fixture
def lab(make_model: Models, make_rollout: Make, make_source: Any, tasks: list[Task]) -> Lab:
    return Lab(make_model, make_rollout, make_source, tasks)


@pytest.fixture
def good(lab: Lab) -> list[Group]:
    return [lab.group(0, 1.0, 0.0, 0.5), lab.group(1, 0.0, 0.25)]


# refused


@pytest.mark.asyncio
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
async def test_a_reward_that_is_not_finite_is_refused_by_name(
    lab: Lab, good: list[Group], reward: float
) -> None:
    await lab.refused(
        ConfigurationError, rf"reward of rollout t2/1 .*{reward}", *good, lab.group(2, 0.0, reward)
    )


@pytest.mark.asyncio
async def test_tokens_of_another_vocabulary_are_refused(lab: Lab, good: list[Group]) -> None:
    stranger = lab.group(2, 1.0, 0.0, calls=[CallTokens([1], [15, 16], [-0.1, -0.1])])
    says = "rollout t2/0: token id 16 is outside the model's vocabulary of 16; .* another tokenizer"
    await lab.refused(TokenContractError, says, *good, stranger)


@pytest.mark.asyncio
async def test_rollouts_without_token_ids_are_refused(lab: Lab, good: list[Group]) -> None:
    await lab.refused(TokenContractError, "t2/0.* no token ids", *good, lab.group(2, 1.0, calls=[None]))


@pytest.mark.asyncio
async def test_a_step_in_which_everything_failed_is_refused_with_the_reason(lab: Lab) -> None:
    await lab.refused(
        GymError, r"\(2 times\): TransportError in model_call: gone", lab.group(0, None), lab.group(1, None)
    )


# left out and counted: the step is the one without them


@pytest.mark.asyncio
async def test_failed_and_cancelled_rollouts_are_outside_the_baseline(lab: Lab, good: list[Group]) -> None:
    _, clean = await lab.step(*good)
    good[0].rollouts += [
        lab.make_rollout(lab.tasks[0], 3, calls=[call(90)], outcome=Outcome.FAILED, failure=FAILURE),
        lab.make_rollout(lab.tasks[0], 4, calls=[call(91)], outcome=Outcome.CANCELLED),
    ]
    step, weights = await lab.step(*good)
    assert same_tensors(clean, weights)
    assert (step.metrics["failed"], step.metrics["cancelled"], step.metrics["valid"]) == (1, 1, 5)


@pytest.mark.asyncio
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
async def test_a_log_prob_that_is_not_finite_makes_the_rollout_a_failed_one(
    lab: Lab, good: list[Group], value: float
) -> None:
    """CallTokens refuses them, but its lists belong to whoever made them."""
    _, clean = await lab.step(*good)
    broken = call(90)
    broken.generation_log_probs[-1] = value
    good[0].rollouts.append(lab.make_rollout(lab.tasks[0], 3, calls=[broken], reward=1.0))
    step, weights = await lab.step(*good)
    assert step.metrics["bad_log_probs"] == 1
    assert same_tensors(clean, weights)


@pytest.mark.asyncio
async def test_a_generation_without_tokens_counts_in_the_baseline_alone(lab: Lab, good: list[Group]) -> None:
    _, clean = await lab.step(*good)
    good[0].rollouts.append(lab.make_rollout(lab.tasks[0], 3, calls=[CallTokens([1, 2], [], [])], reward=0.0))
    step, weights = await lab.step(*good)
    assert step.metrics["empty_rollouts"] == 1
    assert step.metrics["trained_tokens"] == 5 * 4
    assert step.metrics["valid"] == 6
    assert not same_tensors(clean, weights)  # the baseline of its group moved


@pytest.mark.asyncio
async def test_groups_without_comparison_or_variance_are_dropped(lab: Lab, good: list[Group]) -> None:
    _, clean = await lab.step(*good)
    step, weights = await lab.step(
        *good,
        lab.group(2, 1.0),  # a group of one
        lab.group(3, 1.0, None, None),
        lab.group(4, None, None),
        lab.group(5, 0.5, 0.5, 0.5),
    )
    assert same_tensors(clean, weights)
    names = ("groups", "groups_kept", "groups_dropped", "groups_too_few", "groups_no_variance")
    assert [step.metrics[name] for name in names] == [6, 2, 4, 3, 1]


@pytest.mark.asyncio
@pytest.mark.parametrize("nothing", ["one", "flat", "empty"])
async def test_a_step_without_anything_to_learn_changes_nothing(lab: Lab, nothing: str) -> None:
    group = {
        "one": lab.group(0, 1.0),
        "flat": lab.group(0, 1.0, 1.0),
        "empty": lab.group(0, 1.0, 0.0, calls=[CallTokens([1], [], [])]),
    }[nothing]
    before = tensors(lab.make_model().state_dict())
    step, weights = await lab.step(group)
    assert (step.index, step.metrics["updates"], step.metrics["trained_tokens"]) == (1, 0, 0)
    assert step.weight_version == "step-000000"
    assert same_tensors(before, weights)


@pytest.mark.asyncio
async def test_rows_that_are_too_long_count_in_the_baseline_alone(lab: Lab, good: list[Group]) -> None:
    long = lab.make_rollout(lab.tasks[0], 3, calls=[call(90, size=9)], reward=0.0)
    good[0].rollouts.append(long)
    step, weights = await lab.step(*good, max_row_tokens=10)
    assert step.metrics["too_long_rows"] == 1
    assert step.metrics["trained_tokens"] == 5 * 4
    whole, other = await lab.step(*good, max_row_tokens=11)
    assert whole.metrics["too_long_rows"] == 0
    assert whole.metrics["trained_tokens"] == 5 * 4 + 9
    assert not same_tensors(weights, other)


@pytest.mark.asyncio
async def test_truncated_rollouts_can_be_masked(lab: Lab, good: list[Group]) -> None:
    good[0].rollouts[1].outcome = Outcome.TRUNCATED
    kept, _ = await lab.step(*good)
    assert (kept.metrics["overlong_rollouts"], kept.metrics["trained_tokens"]) == (0, 5 * 4)
    masked, _ = await lab.step(*good, overlong="mask")
    assert (masked.metrics["overlong_rollouts"], masked.metrics["trained_tokens"]) == (1, 4 * 4)
    assert masked.metrics["truncated"] == 1
    # It stays in the baseline: the others of its group have the advantages that they had.
    rows = select_rows(good, GRPOConfig(overlong="mask"), vocab_size=16).groups
    with_all = select_rows(good, GRPOConfig(), vocab_size=16).groups
    assert [row.advantage for row in rows[0]] == [with_all[0][0].advantage, with_all[0][2].advantage]


@pytest.mark.asyncio
async def test_tokens_of_weights_that_are_too_old_carry_no_loss(
    make_model: Models, make_rollout: Make, make_source: Any, tasks: list[Task]
) -> None:
    """Half of each generation is of the weights at the start, which are one step old in step 2."""
    versions = (WeightSpan("step-000000", 0, 2), WeightSpan("step-000001", 2, 4))
    groups = [
        Group(
            task=task,
            rollouts=[
                make_rollout(task, index, calls=[call(index, versions=versions)], reward=float(index))
                for index in range(3)
            ],
        )
        for task in tasks[:2]
    ]
    async with GRPOTrainer(
        make_model(), rollouts=make_source(groups), tasks=tasks[:2], config=CONFIG
    ) as trainer:
        first, second = await anext(trainer), await anext(trainer)
    # In step 1 all is new: versions of the future have no age.
    assert (first.metrics["too_old_tokens"], first.metrics["trained_tokens"]) == (0, 6 * 4)
    assert (second.metrics["too_old_tokens"], second.metrics["trained_tokens"]) == (6 * 2, 6 * 2)
    assert second.metrics["staleness_max"] == 0


@pytest.mark.asyncio
async def test_scaling_by_the_batch_keeps_the_weight_between_groups(lab: Lab) -> None:
    groups = [lab.group(0, 0.0, 1.0), lab.group(1, 0.5, 0.5 + 1e-3), lab.group(2, 3.0, 3.0)]
    step, _ = await lab.step(*groups, scale="batch")
    assert step.metrics["groups_no_variance"] == 1
    for drops, rewards in ((True, [0.0, 1.0, 0.5, 0.501]), (False, [0.0, 1.0, 0.5, 0.501, 3.0, 3.0])):
        selection = select_rows(groups, GRPOConfig(scale="batch", drop_zero_variance=drops), vocab_size=16)
        deviation = float(torch.tensor(rewards, dtype=torch.float64).std(correction=0))
        found = [row.advantage for row in selection.trained_rows]
        expected = [-0.5, 0.5, -0.0005, 0.0005, *([] if drops else [0.0, 0.0])]
        assert found == pytest.approx([value / (deviation + 1e-6) for value in expected])


def test_the_docs_name_the_counts_as_they_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("| what is left out |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    metrics = rollout_metrics([], select_rows([], CONFIG, vocab_size=16))
    assert len(named) == 9
    assert named <= metrics.keys()
