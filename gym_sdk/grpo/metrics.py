"""The numbers of a step, and the file they are appended to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gym_sdk.errors import DatasetError
from gym_sdk.grpo.loss import LossStats
from gym_sdk.grpo.selection import Selection
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Group, Outcome
from gym_sdk.tokens import TokenSequence

__all__ = ["MetricsFile", "mismatch_metrics", "rollout_metrics", "update_metrics"]


def rollout_metrics(groups: Sequence[Group], selection: Selection) -> dict[str, float]:
    """Describe a step's rollouts.

    Means, deviations and percentiles are over the rollouts that have a reward (`valid`), and absent if none
    has. `prompt_tokens` are all tokens of their rows that were not sampled (task, tool outputs).
    `extra_rows` are rows beyond one per rollout; `forks` are prompts that did not extend what was sampled, of
    which `unreported_forks` came without the server's word, and `unparsed_calls` pieces of tool-call markup
    that stayed text.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    valid = [rollout for rollout in rollouts if rollout.ok]
    metrics: dict[str, float] = {
        "rollouts": len(rollouts),
        "valid": len(valid),
        "failed": sum(rollout.outcome is Outcome.FAILED for rollout in rollouts),
        "cancelled": sum(rollout.outcome is Outcome.CANCELLED for rollout in rollouts),
        "truncated": sum(rollout.outcome is Outcome.TRUNCATED for rollout in rollouts),
        "groups": len(groups),
        "groups_kept": len(selection.groups),
        "groups_dropped": len(groups) - len(selection.groups),
        "groups_no_variance": selection.no_variance,
        "groups_too_few": selection.too_few,
        "extra_rows": selection.extra_rows,
        **TokenWatch.of(rollouts).metrics(),
        "prompt_tokens": selection.prompt_tokens,
        "generated_tokens": sum(selection.generated),
        "trained_tokens": sum(row.trained_tokens for row in selection.trained_rows),
    }
    if valid:
        rewards = [rollout.reward for rollout in valid if rollout.reward is not None]
        turns = [len(rollout.model_calls) for rollout in valid]
        calls = [len(rollout.function_calls) for rollout in valid]
        metrics |= {
            "reward_mean": _mean(rewards),
            "reward_std": math.sqrt(_mean([(reward - _mean(rewards)) ** 2 for reward in rewards])),
            "generated_tokens_mean": _mean(selection.generated),
            "generated_tokens_p95": _percentile(selection.generated, 0.95),
            "turns_mean": _mean(turns),
            "tool_calls_mean": _mean(calls),
        }
    return metrics


def mismatch_metrics(log_probs: Sequence[Tensor], rows: Sequence[TokenSequence]) -> dict[str, float]:
    """Compare the trainer's log-probs with the engine's, before any update.

    With d = trainer - engine for each sampled token: `max_logprob_diff` = max |d|;
    `token_mult_prob_error` = mean exp|d|, about 1, bad above 1.05; `gen_kl` = mean (exp(d) - 1 - d), the k3
    estimate of KL(engine || trainer). The latter two are NeMo RL's.

    Args:
        log_probs: the trainer's, one tensor of the row's length for each row.
        rows: the same rows, with the engine's log-probs.
    """
    trainer = torch.cat(list(log_probs)).double()
    mask = torch.tensor([flag for row in rows for flag in row.loss_mask], dtype=torch.bool)
    engine = torch.tensor([value for row in rows for value in row.log_probs], dtype=torch.float64)
    difference = (trainer - engine)[mask]
    return {
        "max_logprob_diff": float(difference.abs().max()),
        "token_mult_prob_error": float(difference.abs().exp().mean()),
        "gen_kl": float((difference.exp() - 1.0 - difference).mean()),
    }


def update_metrics(stats: LossStats, entropy: float, grad_norms: Sequence[float]) -> dict[str, float]:
    """Describe a step's updates: means over their tokens, `grad_norm` (before clipping) over updates.

    `entropy` is the mean entropy of the distributions that the tokens were drawn from, in nats;
    `approx_kl` the mean k3 estimate of KL(behaviour || policy being updated).
    """
    return {
        "updates": len(grad_norms),
        "loss": stats.loss / len(grad_norms),
        "grad_norm": _mean(grad_norms),
        "grad_norm_max": max(grad_norms),
        "entropy": entropy / stats.tokens,
        "ratio_mean": stats.ratio / stats.tokens,
        "ratio_min": stats.ratio_min,
        "ratio_max": stats.ratio_max,
        "clip_low_fraction": stats.clipped_low / stats.tokens,
        "clip_high_fraction": stats.clipped_high / stats.tokens,
        "approx_kl": stats.kl / stats.tokens,
        "tis_weight_mean": stats.tis_weight / stats.tokens,
        "tis_capped_fraction": stats.tis_capped / stats.tokens,
    }


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
