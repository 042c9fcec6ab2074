"""The numbers of a step, and the file they are appended to. All names are in `docs/training_metrics.md`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gym_sdk.errors import DatasetError
from gym_sdk.grpo.losses.stats import LossStats
from gym_sdk.grpo.selection import Selection
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Group, Outcome
from gym_sdk.tokens import TokenSequence

__all__ = [
    "MetricsFile",
    "learning_metrics",
    "mismatch_metrics",
    "rollout_metrics",
    "staleness_metrics",
    "token_ages",
]

# As in the loss: one absurd token gives a large number, not an infinite one.
_MAX_LOG_RATIO = 20.0

# NeMo RL's bound of the mean probability ratio, applied to a single token.
_MISMATCHED_RATIO = 1.05


def rollout_metrics(groups: Sequence[Group], selection: Selection) -> dict[str, float]:
    """Describe a step's rollouts.

    Means, deviations and percentiles (nearest rank) are over the rollouts that have a reward (`valid`), and
    absent if none has. `prompt_tokens` are all tokens of their rows that were not sampled (task, tool
    outputs). What was left out: `bad_log_probs` (rollouts whose log-probs are not finite), `empty_rollouts`,
    `overlong_rollouts`, `too_long_rows` and `too_old_tokens` (see `Selection`). `extra_rows` are rows beyond
    one per rollout; `forks` are prompts that did not extend what was sampled, of which `unreported_forks`
    came without the server's word, and `unparsed_calls` pieces of tool-call markup that stayed text.
    `tool_rollouts` had tools on offer; `tool_calls` are those of all rollouts. `groups_flat_share` is the
    share of equal rewards among the groups with two rewards or more, whether they are dropped or not; in
    `groups_all_zero_share` and `groups_all_one_share` all are 0, or 1.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    outcomes = [rollout.outcome for rollout in rollouts]
    watch = TokenWatch.of(rollouts)
    truncated, completed = outcomes.count(Outcome.TRUNCATED), outcomes.count(Outcome.COMPLETED)
    metrics: dict[str, float] = {
        "rollouts": len(rollouts),
        "valid": sum(rollout.ok for rollout in rollouts),
        "failed": outcomes.count(Outcome.FAILED),
        "cancelled": outcomes.count(Outcome.CANCELLED),
        "truncated": truncated,
        "groups": len(groups),
        "groups_kept": len(selection.groups),
        "groups_dropped": len(groups) - len(selection.groups),
        "groups_no_variance": selection.no_variance,
        "groups_too_few": selection.too_few,
        "bad_log_probs": selection.bad_log_probs,
        "empty_rollouts": selection.empty,
        "overlong_rollouts": selection.overlong,
        "too_long_rows": selection.too_long,
        "too_old_tokens": selection.stale_tokens,
        "extra_rows": selection.extra_rows,
        **watch.metrics(),
        "tool_rollouts": watch.tool_rollouts,
        "tool_calls": watch.tool_calls,
        "prompt_tokens": selection.prompt_tokens,
        "generated_tokens": sum(selection.generated),
        "trained_tokens": sum(row.trained_tokens for row in selection.trained_rows),
    }
    if rollouts:
        metrics["failed_share"] = metrics["failed"] / len(rollouts)
    if truncated + completed:
        metrics["truncated_share"] = truncated / (truncated + completed)
    return metrics | _flat_shares(groups) | _reward_metrics(groups, selection)


def _flat_shares(groups: Sequence[Group]) -> dict[str, float]:
    several = [set(group.rewards) for group in groups if len(group.rewards) > 1]
    if not several:
        return {}
    return {
        "groups_flat_share": sum(len(rewards) == 1 for rewards in several) / len(several),
        "groups_all_zero_share": several.count({0.0}) / len(several),
        "groups_all_one_share": several.count({1.0}) / len(several),
    }


def _reward_metrics(groups: Sequence[Group], selection: Selection) -> dict[str, float]:
    valid = [rollout for group in groups for rollout in group.valid]
    if not valid:
        return {}
    rewards = [rollout.reward for rollout in valid if rollout.reward is not None]
    turns = [len(rollout.model_calls) for rollout in valid]
    calls = [len(rollout.function_calls) for rollout in valid]
    metrics = {
        "reward_mean": _mean(rewards),
        "reward_std": math.sqrt(_mean([(reward - _mean(rewards)) ** 2 for reward in rewards])),
        "turns_mean": _mean(turns),
        "turns_p95": _percentile(turns, 0.95),
        "turns_p99": _percentile(turns, 0.99),
        "tool_calls_mean": _mean(calls),
    }
    if selection.generated:
        metrics |= {
            "generated_tokens_mean": _mean(selection.generated),
            "generated_tokens_p95": _percentile(selection.generated, 0.95),
            "generated_tokens_p99": _percentile(selection.generated, 0.99),
        }
    return metrics


def token_ages(
    rows: Sequence[TokenSequence], *, version: int, number_of: Callable[[str], int | None]
) -> list[Int[Tensor, " seq"]]:
    """Say how many versions older than the trainer's weights those are that sampled each token.

    Args:
        rows: what is trained; their `weight_versions` cover the tokens that carry loss.
        version: the number of the trainer's weights before the step's first update.
        number_of: numbers the versions that the engine reports; None for one that it does not know.

    Returns:
        For each row, its tokens' ages, 0 or more; -1 where the version is not known, is newer than the
        trainer's (sampled before a resume), or the token was not sampled.
    """
    ages = []
    for row in rows:
        age = torch.full((len(row),), -1)
        for span in row.weight_versions:
            number = number_of(span.version)
            if number is not None and number <= version:
                age[span.start : span.end] = version - number
        ages.append(age)
    return ages


def staleness_metrics(rows: Sequence[TokenSequence], ages: Sequence[Int[Tensor, " seq"]]) -> dict[str, float]:
    """Describe how old the trained tokens are, in versions of the weights.

    `staleness_mean` and `staleness_max` are over the tokens of a known version, and absent if there is none;
    `stale_tokens_share` is the share of those that are older than the trainer's weights.
    `unversioned_tokens` have no known version. `rollouts_spanning_versions` counts the rollouts whose
    trained tokens were sampled by more than one version.

    Args:
        rows: what is trained, at least one.
        ages: from `token_ages`.
    """
    trained = torch.cat(list(ages))[_loss_mask(rows)]
    known = trained[trained >= 0].double()
    versions: dict[str, set[str]] = {}
    for row in rows:
        versions.setdefault(row.rollout_id, set()).update(span.version for span in row.weight_versions)
    metrics: dict[str, float] = {
        "unversioned_tokens": len(trained) - len(known),
        "rollouts_spanning_versions": sum(len(names) > 1 for names in versions.values()),
    }
    if len(known):
        metrics["staleness_mean"] = float(known.mean())
        metrics["staleness_max"] = float(known.max())
        metrics["stale_tokens_share"] = float((known > 0).double().mean())
    return metrics


def mismatch_metrics(
    log_probs: Sequence[Float[Tensor, " trained"]],
    rows: Sequence[TokenSequence],
    *,
    ages: Sequence[Int[Tensor, " seq"]] | None = None,
) -> dict[str, float]:
    """Compare the trainer's log-probs with the engine's, before any update.

    With d = trainer - engine for each trained token that the present weights sampled (age 0, or unknown):

    - `max_logprob_diff` = max |d|;
    - `token_mult_prob_error` = mean exp|d|, about 1, bad above 1.05 (NeMo RL's);
    - `gen_kl` = mean (exp(d) - 1 - d), the k3 estimate of KL(engine || trainer) (NeMo RL's);
    - `sampling_importance_ratio` = mean exp(d), whose expectation is 1 (NeMo RL's);
    - `mismatched_tokens_share` = the share with exp|d| > 1.05: near 0 with a bad mean, a few tokens are
      wrong; near 1, all of them are.

    For the tokens that older weights sampled, d is what the policy moved since, and no fault:
    `stale_ratio_mean` = mean exp(d), `stale_ratio_max` = max exp(d). Wherever there is no token to compare,
    the numbers are absent. d is clamped to ±20 in exponentials, so that nothing overflows.

    Args:
        log_probs: the trainer's: for each row, those of its trained tokens in their order.
        rows: the same rows, with the engine's log-probs; at least one.
        ages: from `token_ages`; None: the present weights sampled everything.
    """
    mask = _loss_mask(rows)
    trainer = torch.cat(list(log_probs)).double()
    engine = torch.tensor([value for row in rows for value in row.log_probs], dtype=torch.float64)[mask]
    stale = torch.zeros_like(trainer, dtype=torch.bool) if ages is None else torch.cat(list(ages))[mask] > 0
    difference = trainer - engine
    ratio = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    metrics: dict[str, float] = {}
    if not bool(stale.all()):
        exact, clamped = difference[~stale].abs(), ratio[~stale]
        error = clamped.abs().exp()
        metrics |= {
            "max_logprob_diff": float(exact.max()),
            "token_mult_prob_error": float(error.mean()),
            "gen_kl": float((clamped.exp() - 1.0 - clamped).mean()),
            "sampling_importance_ratio": float(clamped.exp().mean()),
            "mismatched_tokens_share": float((error > _MISMATCHED_RATIO).double().mean()),
        }
    if bool(stale.any()):
        metrics["stale_ratio_mean"] = float(ratio[stale].exp().mean())
        metrics["stale_ratio_max"] = float(ratio[stale].exp().max())
    return metrics


def _loss_mask(rows: Sequence[TokenSequence]) -> Tensor:
    return torch.tensor([flag for row in rows for flag in row.loss_mask], dtype=torch.bool)


def learning_metrics(stats: LossStats, grad_norms: Sequence[float]) -> dict[str, float]:
    """Describe a step's updates: means over their tokens; losses and `grad_norm` over updates.

    `grad_norm` is taken before it is scaled down. `loss` is the sum of `policy_loss`, `kl_loss` and
    `entropy_loss`. `entropy` is that of the distributions which the tokens were drawn from, in nats, and
    absent if it was not computed. `approx_kl` is the mean k3 estimate of KL(behaviour || policy),
    `reference_kl` the mean of the estimate that the loss uses.

    Args:
        stats: added up over all updates, of at least one token.
        grad_norms: of each update.
    """
    updates, tokens = len(grad_norms), stats.tokens
    metrics = {
        "updates": updates,
        "loss": stats.loss / updates,
        "policy_loss": stats.policy_loss / updates,
        "kl_loss": stats.kl_loss / updates,
        "entropy_loss": stats.entropy_loss / updates,
        "grad_norm": _mean(grad_norms),
        "grad_norm_max": max(grad_norms),
        "ratio_mean": stats.ratio / tokens,
        "ratio_min": stats.ratio_min,
        "ratio_max": stats.ratio_max,
        "clip_low_fraction": stats.clipped_low / tokens,
        "clip_high_fraction": stats.clipped_high / tokens,
        "dual_clip_fraction": stats.dual_clipped / tokens,
        "approx_kl": stats.behaviour_kl / tokens,
        "reference_kl": stats.reference_kl / tokens,
        "correction_weight_mean": stats.correction_weight / tokens,
        "correction_truncated_fraction": stats.truncated_tokens / tokens,
        "correction_masked_fraction": stats.masked_tokens / tokens,
        "correction_masked_rows_fraction": stats.masked_rows / stats.rows,
    }
    return metrics | ({"entropy": stats.entropy / tokens} if stats.entropy else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percentile(values: Sequence[int], fraction: float) -> int:
    """Nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


class MetricsFile:
    """`metrics.jsonl`: one line for each step, appended as it ends.

    Args:
        path: the file; made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step's line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")

    def read(self) -> list[dict[str, float]]:
        """Return all lines; a last line that was cut off by a kill is left out.

        Raises:
            DatasetError: another line is not a JSON object with a step.
        """
        if not self.path.exists():
            return []
        records: list[dict[str, float]] = []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise DatasetError(f"not JSON: {error}", path=self.path, line=number) from error
            if not isinstance(record, dict) or "step" not in record:
                raise DatasetError("not an object with a `step`", path=self.path, line=number)
            records.append(record)
        return records

    def keep_until(self, step: int) -> None:
        """Remove the lines after a step: a resumed run writes them anew."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self.path)
