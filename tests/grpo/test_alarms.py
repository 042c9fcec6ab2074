"""Alarms: each fires for its cause, not for a near miss, once, and goes on after a resume."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo import GRPOConfig, GRPOTrainer
from gym_sdk.grpo.alarms import Alarm, AlarmConfig, AlarmName, AlarmWatch
from gym_sdk.schema import Group, Rollout, Task
from gym_sdk.tokens import CallTokens

Models = Callable[..., PreTrainedModel]

WELL: Mapping[str, float] = {
    "rollouts": 64,
    "groups": 8,
    "groups_dropped": 1,
    "groups_no_variance": 1,
    "groups_too_few": 0,
    "groups_flat_share": 0.125,
    "groups_all_zero_share": 0.125,
    "groups_all_one_share": 0.0,
    "failed_share": 0.0,
    "truncated_share": 0.0,
    "forks": 0,
    "unreported_forks": 0,
    "tool_rollouts": 64,
    "tool_calls": 100,
    "unparsed_calls": 0,
    "generated_tokens_mean": 200.0,
    "grad_norm_max": 0.5,
    "entropy": 0.4,
    "approx_kl": 0.001,
    "clip_low_fraction": 0.001,
    "clip_high_fraction": 0.001,
    "token_mult_prob_error": 1.01,
    "mismatched_tokens_share": 0.02,
    "max_logprob_diff": 0.2,
    "staleness_max": 1,
}
"""The metrics of a step in which nothing is wrong."""


def raised(steps: Sequence[Mapping[str, float]], config: AlarmConfig | None = None) -> list[Alarm]:
    """Return the alarms of some steps that follow on ten good ones."""
    watch = AlarmWatch(config)
    history = [WELL] * 10 + [{**WELL, **step} for step in steps]
    return [alarm for step, metrics in enumerate(history, 1) for alarm in watch.check(step, metrics)]


# The alarm, a step that shows it, a step that nearly does, the alarm's value, and words of the message.
CASES: list[tuple[str, dict[str, float], dict[str, float], float, str]] = [
    ("not_finite", {"loss": math.inf}, {"loss": 1e30}, math.inf, "loss is inf. Look at"),
    (
        "mismatch",
        {"token_mult_prob_error": 1.06, "mismatched_tokens_share": 0.6},
        {"token_mult_prob_error": 1.05, "mismatched_tokens_share": 0.6},
        1.06,
        "60.0% of the tokens are off, by 0.20 at most.*serves the weights of this step.*temperature",
    ),
    (
        "mismatch",
        {"token_mult_prob_error": 90.0, "mismatched_tokens_share": 0.05, "max_logprob_diff": 9.0},
        {"max_logprob_diff": 9.0},
        90.0,
        "Few tokens are off, and far: likely some prompts were tokenized or rendered anew",
    ),
    (
        "mismatch",
        {"token_mult_prob_error": 1.06, "mismatched_tokens_share": 0.05, "max_logprob_diff": 2.9},
        {"mismatched_tokens_share": 1.0},
        1.06,
        "temperature",
    ),
    ("policy_drift", {"approx_kl": 0.11}, {"approx_kl": 0.1}, 0.11, "Lower the learning rate"),
    (
        "clipped",
        {"clip_low_fraction": 0.2, "clip_high_fraction": 0.2},
        {"clip_low_fraction": 0.1, "clip_high_fraction": 0.19},
        0.4,
        "40.0% of the tokens are clipped",
    ),
    ("grad_norm_spike", {"grad_norm_max": 5.1}, {"grad_norm_max": 5.0}, 5.1, "its median 0.5"),
    ("entropy_collapse", {"entropy": 0.019}, {"entropy": 0.02}, 0.019, "raise clip_high"),
    (
        "entropy_collapse",
        {"entropy": 0.019, "groups_all_one_share": 0.4},
        {"groups_all_one_share": 0.5},
        0.019,
        "raise clip_high",
    ),
    (
        "flat_groups",
        {"groups_flat_share": 0.9, "groups_all_zero_share": 0.8},
        {"groups_flat_share": 0.89, "groups_all_zero_share": 0.8},
        0.9,
        "90% of the groups.*too hard.*known right answer",
    ),
    (
        "flat_groups",
        {"groups_flat_share": 1.0, "groups_all_zero_share": 0.0, "groups_all_one_share": 1.0},
        {"groups_flat_share": 0.5, "groups_all_zero_share": 0.0, "groups_all_one_share": 0.5},
        1.0,
        "too easy.*known wrong answer",
    ),
    (
        "flat_groups",
        {"groups_flat_share": 1.0, "groups_all_zero_share": 0.5, "groups_all_one_share": 0.5},
        {"groups_flat_share": 0.8, "groups_all_zero_share": 0.4, "groups_all_one_share": 0.4},
        1.0,
        "temperature 0",
    ),
    (
        "dropped_groups",
        {"groups_dropped": 6, "groups_no_variance": 3, "groups_too_few": 2},
        {"groups_dropped": 8, "groups_no_variance": 6, "groups_too_few": 2},
        0.375,
        "38% of the groups .* 2 of 3 have too few rollouts with a reward",
    ),
    ("failed_rollouts", {"failed_share": 0.11}, {"failed_share": 0.1}, 0.11, "`rollout.failure` says what"),
    ("no_tool_calls", {"tool_calls": 0}, {"tool_calls": 1}, 0.0, "64 rollouts had tools .* template show"),
    (
        "no_tool_calls",
        {"tool_calls": 0, "unparsed_calls": 7},
        {"tool_calls": 0, "tool_rollouts": 0},
        0.0,
        "7 pieces of tool-call markup stayed text",
    ),
    (
        "unparsed_calls",
        {"tool_calls": 7, "unparsed_calls": 8},
        {"tool_calls": 8, "unparsed_calls": 8},
        8 / 15,
        r"53% of the tool-call markup does not parse .*\(8 pieces\)",
    ),
    (
        "length_explosion",
        {"generated_tokens_mean": 401.0},
        {"generated_tokens_mean": 400.0},
        401.0,
        "generate 401 tokens, their median was 200",
    ),
    (
        "length_collapse",
        {"generated_tokens_mean": 66.0},
        {"generated_tokens_mean": 67.0},
        66.0,
        "generate 66 tokens, their median was 200",
    ),
    ("truncated", {"truncated_share": 0.51}, {"truncated_share": 0.5}, 0.51, "raise max_output_tokens"),
    ("forks", {"forks": 33}, {"forks": 32}, 33 / 64, "0.52 forks per rollout"),
    (
        "unreported_forks",
        {"unreported_forks": 1},
        {"unreported_forks": 0},
        1 / 64,
        "something between trainer and engine",
    ),
]
SUSTAINED = {"flat_groups", "dropped_groups", "no_tool_calls", "unparsed_calls", "truncated"}
SWITCHES: dict[str, dict[str, Any]] = {
    "not_finite": {"not_finite": False},
    "mismatch": {"max_mismatch": None},
    "policy_drift": {"max_approx_kl": None},
    "clipped": {"max_clip_fraction": None},
    "grad_norm_spike": {"max_grad_norm_ratio": None},
    "entropy_collapse": {"min_entropy": None},
    "flat_groups": {"max_flat_share": None},
    "dropped_groups": {"max_dropped_share": None},
    "failed_rollouts": {"max_failed_share": None},
    "no_tool_calls": {"no_tool_calls": False},
    "unparsed_calls": {"max_unparsed_share": None},
    "length_explosion": {"max_length_ratio": None},
    "length_collapse": {"min_length_ratio": None},
    "truncated": {"max_truncated_share": None},
    "forks": {"max_forks": None},
    "unreported_forks": {"max_unreported_forks": None},
    "stale": {"max_staleness": None},
}


@pytest.mark.parametrize(("name", "wrong", "near", "value", "words"), CASES)
def test_an_alarm_has_its_cause(
    name: str, wrong: dict[str, float], near: dict[str, float], value: float, words: str
) -> None:
    assert raised([near] * 4) == []
    alarms = raised([wrong] * 4)
    assert [alarm.name for alarm in alarms] == [AlarmName(name)]
    assert alarms[0].value == pytest.approx(value)
    assert alarms[0].step == (13 if name in SUSTAINED else 11)
    assert re.search(words, alarms[0].message)
    assert raised([wrong] * 4, AlarmConfig(**SWITCHES[name])) == []


def test_every_alarm_is_tested_and_can_be_switched_off() -> None:
    assert {case[0] for case in CASES} | {"stale"} == set(SWITCHES) == set(AlarmName)


def test_staleness_has_a_bound_only_if_it_is_given() -> None:
    assert raised([{"staleness_max": 9}]) == []
    assert raised([{"staleness_max": 2}], AlarmConfig(max_staleness=2)) == []
    (alarm,) = raised([{"staleness_max": 3}], AlarmConfig(max_staleness=2))
    assert str(alarm).startswith("step 11: stale: tokens are up to 3 versions old (at most 2)")


def test_steps_without_metrics_raise_nothing() -> None:
    watch = AlarmWatch(AlarmConfig(max_staleness=0))
    assert [watch.check(step, {}) for step in range(5)] == [[]] * 5


def test_what_is_not_finite_raises_one_alarm_and_stays_out_of_the_medians() -> None:
    alarms = raised([{"generated_tokens_mean": math.nan, "approx_kl": math.nan}] * 60 + [WELL])
    assert [alarm.name for alarm in alarms] == ["not_finite"]
    assert "generated_tokens_mean is nan, approx_kl is nan" in alarms[0].message
    alarms = raised([{"generated_tokens_mean": math.nan}] * 60 + [{"generated_tokens_mean": 900.0}])
    assert [alarm.name for alarm in alarms] == ["not_finite", "length_explosion"]


def test_an_alarm_that_lasts_is_repeated_now_and_then() -> None:
    alarms = raised([{"failed_share": 0.5}] * 25, AlarmConfig(repeat_every=10))
    assert [alarm.step for alarm in alarms] == [11, 21, 31]


def test_an_alarm_that_flickers_is_not_over() -> None:
    bad, good = {"approx_kl": 1.0}, {}
    alarms = raised([bad, good, good, bad, bad], AlarmConfig(quiet_steps=3))
    assert [alarm.step for alarm in alarms] == [11]
    alarms = raised([bad, good, good, good, bad], AlarmConfig(quiet_steps=3))
    assert [alarm.step for alarm in alarms] == [11, 15]


def test_shares_have_to_be_bad_in_a_row() -> None:
    bad, good = {"truncated_share": 0.9}, {}
    assert raised([bad, bad, good, bad, bad, good]) == []
    assert [alarm.step for alarm in raised([bad, bad, good, bad, bad, bad])] == [16]
    assert [alarm.step for alarm in raised([bad], AlarmConfig(patience=1))] == [11]


def test_a_new_length_becomes_the_usual_one() -> None:
    longer = {"generated_tokens_mean": 600.0}
    alarms = raised([longer] * 30, AlarmConfig(window=10, repeat_every=1))
    assert [alarm.step for alarm in alarms] == [11, 12, 13, 14, 15]  # then half of the window is longer
    assert raised([longer] * 3, AlarmConfig(window=20, least_history=11)) != []
    watch = AlarmWatch(AlarmConfig(least_history=11))
    assert [watch.check(step, WELL) for step in range(1, 11)] == [[]] * 10
    assert watch.check(11, {**WELL, **longer}) == []  # ten steps are not enough


def test_a_resumed_watch_goes_on_exactly() -> None:
    bad: dict[str, float] = {"truncated_share": 0.9, "approx_kl": 1.0}
    spike = {"grad_norm_max": 50.0, "generated_tokens_mean": 900.0}
    history = [
        {**WELL, **step} for step in [{}] * 8 + [bad, bad, spike, bad, bad, bad, {}, spike] + [bad] * 9
    ]
    config = AlarmConfig(repeat_every=6, window=9, quiet_steps=2)
    whole = AlarmWatch(config)
    expected = [whole.check(step, metrics) for step, metrics in enumerate(history)]
    assert len([alarm for alarms in expected for alarm in alarms]) > 5
    for cut in range(len(history)):
        first, second = AlarmWatch(config), AlarmWatch(config)
        found = [first.check(step, metrics) for step, metrics in enumerate(history[:cut])]
        second.restore(json.loads(json.dumps(first.state())))
        found += [second.check(step, metrics) for step, metrics in enumerate(history[cut:], cut)]
        assert found == expected
        assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_mismatch", 0.0),
        ("max_length_ratio", math.inf),
        ("max_flat_share", 1.1),
        ("max_failed_share", -0.1),
        ("min_entropy", math.nan),
        ("max_forks", -1.0),
        ("max_staleness", -1),
        ("patience", 0),
        ("window", 4),
        ("repeat_every", 0),
    ],
)
def test_bad_thresholds_are_refused(field: str, value: Any) -> None:
    name = "least_history" if field == "window" else field
    with pytest.raises(ConfigurationError, match=rf"AlarmConfig\.{name} must be "):
        AlarmConfig(**{field: value})


async def alarms_of(trainer: GRPOTrainer, steps: int) -> list[Alarm]:
    watch = AlarmWatch()
    found = []
    async with trainer:
        for _ in range(steps):
            step = await anext(trainer)
            found += watch.check(step.index, step.metrics)
    return found


class Tempered:
    """A source whose engine samples at another temperature than the trainer is told."""

    def __init__(self, sampler: Any, temperature: float) -> None:
        self.sampler = sampler
        self.temperature = temperature

    @asynccontextmanager
    async def __call__(self, tasks: Sequence[Task], /) -> Any:
        head = self.sampler.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _module, _inputs, logits: logits / self.temperature)

        async def groups() -> Any:
            for task in tasks:
                yield self.sampler.group(task)

        try:
            yield groups()
        finally:
            hook.remove()


def total(tokens: list[int]) -> float:
    return float(sum(tokens))


@pytest.mark.asyncio
@pytest.mark.parametrize(("temperature", "expected"), [(1.0, []), (1.3, ["mismatch"])])
async def test_a_run_at_another_temperature_raises_the_mismatch(
    make_model: Models, make_sampler: Any, tasks: list[Task], temperature: float, expected: list[str]
) -> None:
    model = make_model()
    source = Tempered(make_sampler(model, total), temperature)
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, config=GRPOConfig(tasks_per_step=4))
    alarms = await alarms_of(trainer, 2)
    assert [alarm.name for alarm in alarms] == expected
    assert all("sampled at GRPOConfig.temperature" in alarm.message for alarm in alarms)


@pytest.mark.asyncio
async def test_a_run_that_reads_other_tokens_in_a_few_places_says_so(
    make_model: Models, make_sampler: Any, make_source: Any, make_rollout: Any, tasks: list[Task]
) -> None:
    """One token of many was re-tokenized: the trainer scores another id than was sampled."""
    model = make_model()
    sampler = make_sampler(model, total, new_tokens=20)
    groups = [sampler.group(task) for task in tasks[:4]]
    for group in groups:
        call = group.rollouts[0].model_calls[0].tokens
        log_probs = [*call.generation_log_probs]
        log_probs[3] = -1e-4  # the engine was certain of what it sampled
        ids = [*call.generation_token_ids]
        ids[3] = (ids[3] + 7) % 16
        group.rollouts[0].model_calls[0].tokens = CallTokens(call.prompt_token_ids, ids[:4], log_probs[:4])
    trainer = GRPOTrainer(
        model, rollouts=make_source(groups), tasks=tasks[:4], config=GRPOConfig(tasks_per_step=4)
    )
    (alarm,) = [alarm for alarm in await alarms_of(trainer, 1) if alarm.name == "mismatch"]
    assert "Few tokens are off, and far" in alarm.message


@pytest.mark.asyncio
@pytest.mark.parametrize(("reward", "cause"), [(0.0, "too hard"), (1.0, "too easy"), (0.5, "temperature 0")])
async def test_a_run_whose_verifier_is_constant_raises_flat_groups(
    make_model: Models, make_sampler: Any, tasks: list[Task], reward: float, cause: str
) -> None:
    model = make_model()
    source = make_sampler(model, lambda _tokens: reward)
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, config=GRPOConfig(tasks_per_step=4))
    (alarm,) = await alarms_of(trainer, 4)
    assert (alarm.name, alarm.step, alarm.value) == ("flat_groups", 3, 1.0)
    assert cause in alarm.message


@pytest.mark.asyncio
async def test_a_run_that_never_calls_its_tools_and_fails_a_lot_says_both(
    make_model: Models,
    make_sampler: Any,
    make_source: Any,
    make_rollout: Callable[..., Rollout],
    tasks: list[Task],
) -> None:
    model = make_model()
    sampler = make_sampler(model, total)
    groups: list[Group] = [sampler.group(task) for task in tasks[:4]]
    for group in groups:
        for rollout in group.rollouts:
            rollout.metrics |= {"tools_offered": 2.0, "unparsed_calls": 1.0}
        group.rollouts.append(make_rollout(group.task, 4, outcome="failed"))
    config = GRPOConfig(tasks_per_step=4)
    alarms = await alarms_of(
        GRPOTrainer(model, rollouts=make_source(groups), tasks=tasks[:4], config=config), 3
    )
    assert [(alarm.name, alarm.step) for alarm in alarms] == [
        ("failed_rollouts", 1),
        ("no_tool_calls", 3),
        ("unparsed_calls", 3),
    ]
