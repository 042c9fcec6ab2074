"""Which rows of a step are trained: groups to rows with advantages, everything left out counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.versions import WeightHistory
from gym_sdk.schema import Group, Outcome, Rollout
from gym_sdk.tokens import TokenSequence, group_advantages

__all__ = ["Selection", "select_rows"]


@dataclass(slots=True)
class Selection:
    """What a step trains on, and what it leaves out.

    Attributes:
        groups: the rows of each kept group, with their advantages.
        no_variance: groups dropped because their rewards are all equal.
        too_few: groups dropped because too few of their rollouts have a reward.
        bad_log_probs: rollouts with a reward, but with a log-prob that is not finite. They are treated as if
            they had failed.
        empty: rollouts with a reward, but without a sampled token. They count in the baseline.
        too_long: rows left out because they are longer than `GRPOConfig.max_row_tokens`.
        overlong: truncated rollouts whose rows were left out (`GRPOConfig.overlong`). They count in the
            baseline.
        stale_tokens: tokens left out because older weights than `GRPOConfig.max_staleness` allows sampled
            them.
        rows: rows of all rollouts with a reward, dropped groups included.
        extra_rows: rows beyond one per rollout.
        generated: sampled tokens of each rollout with a reward.
        prompt_tokens: tokens in all rows that were not sampled.
    """

    groups: list[list[TokenSequence]] = field(default_factory=list)
    no_variance: int = 0
    too_few: int = 0
    bad_log_probs: int = 0
    empty: int = 0
    too_long: int = 0
    overlong: int = 0
    stale_tokens: int = 0
    rows: int = 0
    extra_rows: int = 0
    generated: list[int] = field(default_factory=list)
    prompt_tokens: int = 0

    @property
    def trained_rows(self) -> list[TokenSequence]:
        """The rows of all kept groups."""
        return [row for rows in self.groups for row in rows]

    @property
    def trainable(self) -> bool:
        """Whether any token would move the weights: it carries loss, and its advantage is not 0."""
        return any(row.advantage != 0.0 for row in self.trained_rows)


@dataclass(slots=True)
class _Sample:
    """A rollout that has a reward and tokens."""

    rollout: Rollout
    reward: float
    rows: list[TokenSequence]


def select_rows(
    groups: Sequence[Group],
    config: GRPOConfig,
    *,
    vocab_size: int,
    history: WeightHistory | None = None,
) -> Selection:
    """Turn a step's groups into training rows.

    Rollouts without reward (failed, cancelled) have no rows and are outside baseline and deviation. A
    group is dropped if fewer than `config.min_valid_per_group` of its rollouts have a reward, or, with
    `config.drop_zero_variance`, if all its rewards are equal. Rows without a token to train are left out.

    Args:
        groups: a group for each task.
        config: what is kept, and how advantages are computed.
        vocab_size: of the model being trained.
        history: tells how old tokens are; None: all are taken for new.

    Raises:
        TokenContractError: a rollout with a reward has no tokens, or tokens that the model does not have.
        ConfigurationError: a reward is not finite.
    """
    selection = Selection()
    kept: list[list[_Sample]] = []
    for group in groups:
        samples = [
            sample
            for rollout in group.rollouts
            if (sample := _sample(rollout, vocab_size, selection)) is not None
        ]
        rewards = [sample.reward for sample in samples]
        if len(samples) < config.min_valid_per_group:
            selection.too_few += 1
        elif config.drop_zero_variance and min(rewards) == max(rewards):
            selection.no_variance += 1
        else:
            kept.append(samples)
    advantages = group_advantages(
        [sample.reward for samples in kept for sample in samples],
        [number for number, samples in enumerate(kept) for _ in samples],
        baseline=config.baseline,
        scale=config.scale,
    )
    values = iter(advantages)
    for samples in kept:
        rows = [row for sample in samples for row in _rows(sample, next(values), config, selection, history)]
        if rows:
            selection.groups.append(rows)
    return selection


def _sample(rollout: Rollout, vocab_size: int, selection: Selection) -> _Sample | None:
    """Return what can be trained or compared with, None for a rollout without a reward or tokens of worth."""
    reward = rollout.reward
    if reward is None:
        return None
    if not math.isfinite(reward):
        raise ConfigurationError(
            f"the reward of rollout {rollout.id} is {reward}; a verifier must return a finite number, or "
            "raise if it has none (the rollout then stays out of baseline and loss)"
        )
    rows = rollout.sequences()
    for row in rows:
        _check_tokens(row, vocab_size)
    if not all(math.isfinite(value) for row in rows for value in row.log_probs):
        selection.bad_log_probs += 1
        return None
    generated = sum(row.trained_tokens for row in rows)
    selection.rows += len(rows)
    selection.extra_rows += max(0, len(rows) - 1)
    selection.generated.append(generated)
    selection.prompt_tokens += sum(len(row) for row in rows) - generated
    selection.empty += not generated
    return _Sample(rollout, reward, rows)


def _rows(
    sample: _Sample,
    advantage: float | None,
    config: GRPOConfig,
    selection: Selection,
    history: WeightHistory | None,
) -> list[TokenSequence]:
    """Return the rows of a sample that are trained, with its advantage."""
    if config.overlong == "mask" and sample.rollout.outcome is Outcome.TRUNCATED:
        selection.overlong += 1
        return []
    rows = []
    for row in sample.rows:
        if config.max_row_tokens is not None and len(row) > config.max_row_tokens:
            selection.too_long += 1
            continue
        if history is not None:
            selection.stale_tokens += _leave_out_stale(row, history, config.max_staleness)
        if row.trained_tokens:
            row.advantage = advantage
            rows.append(row)
    return rows


def _leave_out_stale(row: TokenSequence, history: WeightHistory, most: int) -> int:
    """Take the loss from tokens that are too old; return how many they were."""
    left_out = 0
    for span in row.weight_versions:
        age = history.age_of(span.version)
        if age is not None and age > most:
            length = span.end - span.start
            row.loss_mask[span.start : span.end] = [0] * length
            row.log_probs[span.start : span.end] = [0.0] * length
            left_out += length
    return left_out


def _check_tokens(row: TokenSequence, vocab_size: int) -> None:
    if row.token_ids and max(row.token_ids) >= vocab_size:
        raise TokenContractError(
            f"rollout {row.rollout_id}: token id {max(row.token_ids)} is outside the model's vocabulary of "
            f"{vocab_size}; the policy that sampled it has another tokenizer than the model being trained"
        )
