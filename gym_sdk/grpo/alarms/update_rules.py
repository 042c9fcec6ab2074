"""What the updates tell: a function for each alarm, all of them pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from gym_sdk.grpo.alarms.alarm import AlarmName
from gym_sdk.grpo.alarms.view import Finding, Rule, StepView

__all__ = ["UPDATE_RULES"]

# Few tokens that are far off have other causes than many that are a little off. Other weights or another
# temperature move every token of which the policy is not certain.
_FEW_TOKENS = 0.1
_FAR_OFF = 3.0


def _not_finite(view: StepView) -> Finding | None:
    broken = [name for name, value in view.metrics.items() if not math.isfinite(value)]
    if not broken or not view.config.not_finite:
        return None
    return Finding(
        view.metrics[broken[0]],
        f"{', '.join(f'{name} is {view.metrics[name]}' for name in broken)}. Look at this step's rewards and "
        "log-probs for the first value that is not finite; lower the learning rate, or train in float32",
    )


def _mismatch(view: StepView) -> Finding | None:
    value = view.above("token_mult_prob_error", view.config.max_mismatch)
    if value is None:
        return None
    share = view.metrics.get("mismatched_tokens_share", 1.0)
    worst = view.metrics.get("max_logprob_diff", math.nan)
    found = (
        f"token_mult_prob_error is {value:.3f} (at most {view.config.max_mismatch}; {share:.1%} of the "
        f"tokens are off, by {worst:.2f} at most): the trainer's log-probs are not the engine's. "
    )
    if share <= _FEW_TOKENS and worst >= _FAR_OFF:
        cause = (
            "Few tokens are off, and far: likely some prompts were tokenized or rendered anew, so that the "
            "trainer reads other tokens than the engine did (`rollout.token_report()`), or the engine "
            "truncates the distribution that it reports (top-p, top-k, penalties, logit bias)"
        )
    else:
        cause = (
            "Check that the engine serves the weights of this step (`weight_version`), that rollouts are "
            "sampled at GRPOConfig.temperature, that both sides have the same tokenizer and chat template, "
            "and that the precision is the same (bf16 or quantised weights, KV cache)"
        )
    return Finding(value, found + cause)


def _policy_drift(view: StepView) -> Finding | None:
    value = view.above("approx_kl", view.config.max_approx_kl)
    if value is None:
        return None
    return Finding(
        value,
        f"approx_kl is {value:.3g} nats per token (at most {view.config.max_approx_kl}): the policy is far "
        "from the one that sampled. Lower the learning rate, epochs or minibatches; if "
        "token_mult_prob_error or staleness_max is high as well, that comes first",
    )


def _clipped(view: StepView) -> Finding | None:
    limit = view.config.max_clip_fraction
    value = view.metrics.get("clip_low_fraction", 0.0) + view.metrics.get("clip_high_fraction", 0.0)
    if limit is None or not value > limit:
        return None
    return Finding(
        value,
        f"{value:.1%} of the tokens are clipped and teach nothing (at most {limit:.0%}): updates are too "
        "large, or rollouts too old. Lower the learning rate, epochs or minibatches, or the allowed "
        "staleness",
    )


def _grad_norm_spike(view: StepView) -> Finding | None:
    usual, ratio = view.medians.get("grad_norm_max"), view.config.max_grad_norm_ratio
    value = None if usual is None or ratio is None else view.above("grad_norm_max", ratio * usual)
    if value is None:
        return None
    return Finding(
        value,
        f"grad_norm_max is {value:.3g}, its median {usual:.3g}: one update was driven by few tokens. It was "
        "scaled down to max_grad_norm; if it comes back, look at ratio_max and the longest rollouts of the "
        "step, or lower the learning rate",
    )


_SOLVED = 0.5


def _entropy_collapse(view: StepView) -> Finding | None:
    value, limit = view.metrics.get("entropy"), view.config.min_entropy
    if value is None or limit is None or not value < limit:
        return None
    if view.metrics.get("groups_all_one_share", 0.0) >= _SOLVED:
        return None  # who solves most tasks every time has no doubts
    return Finding(
        value,
        f"entropy is {value:.3g} nats per token (at least {limit}): rollouts of one task hardly differ. "
        "That is well when the reward is at its maximum; otherwise raise clip_high or add an entropy "
        "bonus, lower the learning rate, and go on from an earlier checkpoint",
    )


def _stale(view: StepView) -> Finding | None:
    if view.config.max_staleness is not None and (count := view.metrics.get("too_old_tokens")):
        return Finding(
            count,
            f"{count:.0f} tokens are not trained on, because weights sampled them that are more than "
            f"{view.config.max_staleness} versions old: does the engine take the weights that are pushed, "
            "and name the version that samples?",
        )
    value = view.above("staleness_max", view.config.max_staleness)
    if value is None:
        return None
    return Finding(
        value,
        f"tokens are up to {value:.0f} versions old (at most {view.config.max_staleness}): rollouts take "
        "longer than steps do, or weights reach the engine late (`seconds_sync`). Generate on more "
        "engines, take fewer rollouts ahead, or correct for it (`LossConfig.decoupled`)",
    )


UPDATE_RULES: Final[Mapping[AlarmName, Rule]] = {
    AlarmName.NOT_FINITE: _not_finite,
    AlarmName.MISMATCH: _mismatch,
    AlarmName.POLICY_DRIFT: _policy_drift,
    AlarmName.CLIPPED: _clipped,
    AlarmName.GRAD_NORM_SPIKE: _grad_norm_spike,
    AlarmName.ENTROPY_COLLAPSE: _entropy_collapse,
    AlarmName.STALE: _stale,
}
"""In the order in which alarms are raised: what may be the cause of others comes first."""
