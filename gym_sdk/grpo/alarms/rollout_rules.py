"""What the rollouts tell: a function for each alarm, all of them pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gym_sdk.grpo.alarms.alarm import AlarmName
from gym_sdk.grpo.alarms.view import Finding, Rule, StepView

__all__ = ["ROLLOUT_RULES", "SUSTAINED"]

# Fewer pieces of markup that does not parse are a policy's slips, not a parser's fault.
_LEAST_MARKUP = 8


def _flat_groups(view: StepView) -> Finding | None:
    value, limit = view.metrics.get("groups_flat_share"), view.config.max_flat_share
    if value is None or limit is None or not value >= limit:
        return None
    zero = view.metrics.get("groups_all_zero_share", 0.0)
    one = view.metrics.get("groups_all_one_share", 0.0)
    if 2.0 * zero > value:
        cause = (
            "their rewards are 0: the tasks are too hard for the policy, or the verifier accepts nothing. "
            "Give the verifier a known right answer, read a few rollouts, start with easier tasks"
        )
    elif 2.0 * one > value:
        cause = (
            "their rewards are 1: the tasks are too easy, or the verifier accepts anything. Give the "
            "verifier a known wrong answer, and take harder tasks; if neither, the task is learned"
        )
    else:
        cause = (
            "their rewards are equal: the verifier may not look at the answer, or all rollouts of a task are "
            "the same (temperature 0, or one seed for all)"
        )
    return Finding(
        value, f"nothing to learn from {value:.0%} of the groups, step after step; in most of them {cause}"
    )


def _dropped_groups(view: StepView) -> Finding | None:
    metrics, limit = view.metrics, view.config.max_dropped_share
    dropped = metrics.get("groups_dropped", 0.0) - metrics.get("groups_no_variance", 0.0)
    value = dropped / max(1.0, metrics.get("groups", 0.0))
    if limit is None or not value > limit:
        return None
    return Finding(
        value,
        f"{value:.0%} of the groups are left out for another reason than equal rewards (at most "
        f"{limit:.0%}): {metrics.get('groups_too_few', 0.0):.0f} of {dropped:.0f} have too few rollouts "
        "with a reward. Look at the failures and cancellations of the rollouts, or lower "
        "min_valid_per_group",
    )


def _failed_rollouts(view: StepView) -> Finding | None:
    value = view.above("failed_share", view.config.max_failed_share)
    if value is None:
        return None
    return Finding(
        value,
        f"{value:.0%} of the rollouts failed (at most {view.config.max_failed_share:.0%}). They are not "
        "trained on, but if hard tasks fail more often, training sees only the easy ones. "
        "`rollout.failure` says what failed: the server, a tool's environment, the verifier, or a "
        "deadline that is too short",
    )


def _no_tool_calls(view: StepView) -> Finding | None:
    metrics = view.metrics
    offered = metrics.get("tool_rollouts", 0.0)
    if not view.config.no_tool_calls or not offered or metrics.get("tool_calls", 0.0):
        return None
    unparsed = metrics.get("unparsed_calls", 0.0)
    if unparsed:
        cause = (
            f"{unparsed:.0f} pieces of tool-call markup stayed text: the server's parser is not the one of "
            "the chat template"
        )
    else:
        cause = "does the chat template show the tools, and does the prompt say when to use them?"
    return Finding(
        0.0,
        f"{offered:.0f} rollouts had tools on offer and none was called, step after step; {cause} "
        "(`gym-sdk check MODEL`)",
    )


def _unparsed_calls(view: StepView) -> Finding | None:
    unparsed, limit = view.metrics.get("unparsed_calls", 0.0), view.config.max_unparsed_share
    if limit is None or unparsed < _LEAST_MARKUP:
        return None
    value = unparsed / (unparsed + view.metrics.get("tool_calls", 0.0))
    if not value > limit:
        return None
    return Finding(
        value,
        f"{value:.0%} of the tool-call markup does not parse and stays text ({unparsed:.0f} pieces): the "
        "server's parser is not the one of the chat template (`gym-sdk check MODEL`), or the policy "
        "writes broken calls",
    )


def _length_explosion(view: StepView) -> Finding | None:
    usual, ratio = view.medians.get("generated_tokens_mean"), view.config.max_length_ratio
    value = None if usual is None or ratio is None else view.above("generated_tokens_mean", ratio * usual)
    if value is None:
        return None
    return Finding(
        value,
        f"rollouts generate {value:.0f} tokens, their median was {usual:.0f}. Read some of the longest: if "
        "they repeat themselves or never stop, check the stop tokens and entropy, lower the learning "
        "rate, and add a penalty for overlong answers; if reward rises with them, allow it "
        "(max_length_ratio)",
    )


def _length_collapse(view: StepView) -> Finding | None:
    usual, ratio = view.medians.get("generated_tokens_mean"), view.config.min_length_ratio
    value = view.metrics.get("generated_tokens_mean")
    if usual is None or ratio is None or value is None or not value < ratio * usual:
        return None
    return Finding(
        value,
        f"rollouts generate {value:.0f} tokens, their median was {usual:.0f}. If the reward fell with "
        "them, the policy has unlearned to work (turns_mean, tool_calls_mean): lower the learning rate; "
        "if it did not, the verifier may accept answers without work",
    )


def _truncated(view: StepView) -> Finding | None:
    value = view.above("truncated_share", view.config.max_truncated_share)
    if value is None:
        return None
    return Finding(
        value,
        f"{value:.0%} of the rollouts are cut by a limit (at most {view.config.max_truncated_share:.0%}), "
        "and are scored without their end. `rollout.truncation` says by which: raise max_output_tokens, "
        "the context or max_turns, or penalise overlong answers softly",
    )


def _forks(view: StepView) -> Finding | None:
    value, limit = view.per_rollout("forks"), view.config.max_forks
    if limit is None or not value > limit:
        return None
    return Finding(
        value,
        f"{value:.2g} forks per rollout (at most {limit}): prompts do not extend what was sampled before, "
        "and each is trained as a row of its own, which costs time. Usual causes: a template that strips "
        "reasoning from earlier turns, or an agent that edits its history (`rollout.token_report()`)",
    )


def _unreported_forks(view: StepView) -> Finding | None:
    value, limit = view.per_rollout("unreported_forks"), view.config.max_unreported_forks
    if limit is None or not value > limit:
        return None
    return Finding(
        value,
        f"{value:.2g} forks per rollout that the server did not report (at most {limit}): something between "
        "trainer and engine renders or tokenizes histories anew. See `rollout.token_report()`, which shows "
        "where; train on a server that keeps sampled tokens (`gym-sdk serve`)",
    )


ROLLOUT_RULES: Final[Mapping[AlarmName, Rule]] = {
    AlarmName.FLAT_GROUPS: _flat_groups,
    AlarmName.DROPPED_GROUPS: _dropped_groups,
    AlarmName.FAILED_ROLLOUTS: _failed_rollouts,
    AlarmName.NO_TOOL_CALLS: _no_tool_calls,
    AlarmName.UNPARSED_CALLS: _unparsed_calls,
    AlarmName.LENGTH_EXPLOSION: _length_explosion,
    AlarmName.LENGTH_COLLAPSE: _length_collapse,
    AlarmName.TRUNCATED: _truncated,
    AlarmName.FORKS: _forks,
    AlarmName.UNREPORTED_FORKS: _unreported_forks,
}
"""In the order in which alarms are raised: what may be the cause of others comes first."""

SUSTAINED: Final = frozenset(
    {
        AlarmName.FLAT_GROUPS,
        AlarmName.DROPPED_GROUPS,
        AlarmName.NO_TOOL_CALLS,
        AlarmName.UNPARSED_CALLS,
        AlarmName.TRUNCATED,
    }
)
"""Alarms that need `AlarmConfig.patience` steps in a row, because chance alone can bring one such step."""
