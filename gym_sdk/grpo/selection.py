"""Which rows of a step are trained: groups to rows with advantages, everything left out counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gym_sdk.errors import TokenContractError
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.schema import Group
from gym_sdk.tokens import TokenSequence, group_advantages

__all__ = ["Selection", "select_rows"]


@dataclass(slots=True)
class Selection:
    """What a step trains on, and what it leaves out.

    Attributes:
        groups: the rows of each kept group, with their advantages.
        no_variance: groups dropped because their rewards are all equal.
        too_few: groups dropped because too few of their rollouts have a reward.
        rows: rows of all rollouts with a reward, dropped groups included.
        extra_rows: rows beyond one per rollout.
        generated: sampled tokens of each rollout with a reward.
        prompt_tokens: tokens in all rows that were not sampled.
    """

    groups: list[list[TokenSequence]] = field(default_factory=list)
    no_variance: int = 0
    too_few: int = 0
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


def select_rows(groups: Sequence[Group], config: GRPOConfig, *, vocab_size: int) -> Selection:
    """Turn a step's groups into training rows.

    Rollouts without reward (failed, cancelled) have no rows and are outside baseline and deviation. A
    group is dropped if fewer than `config.min_valid_per_group` of its rollouts have a reward, or, with
    `config.drop_zero_variance`, if all its rewards are equal. Rows without a sampled token are left out.

    Raises:
        TokenContractError: a rollout with a reward has no tokens, or tokens that the model does not have.
        ConfigurationError: a reward is not finite.
    """
    selection = Selection()
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        advantages = group_advantages(rewards, baseline=config.baseline, scale=config.scale)
        rows: list[TokenSequence] = []
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            if advantage is None:
                continue
            sequences = rollout.sequences()
            selection.rows += len(sequences)
            selection.extra_rows += max(0, len(sequences) - 1)
            selection.generated.append(sum(row.trained_tokens for row in sequences))
            selection.prompt_tokens += sum(len(row) - row.trained_tokens for row in sequences)
            for row in sequences:
                row.advantage = advantage
                _check_tokens(row, vocab_size)
            rows += [row for row in sequences if row.trained_tokens]
        valid = group.rewards
        if len(valid) < config.min_valid_per_group:
            selection.too_few += 1
        elif config.drop_zero_variance and min(valid) == max(valid):
            selection.no_variance += 1
        elif rows:
            selection.groups.append(rows)
    return selection


def _check_tokens(row: TokenSequence, vocab_size: int) -> None:
    if row.token_ids and max(row.token_ids) >= vocab_size:
        raise TokenContractError(
            f"rollout {row.rollout_id}: token id {max(row.token_ids)} is outside the model's vocabulary of "
            f"{vocab_size}; the policy that sampled it has another tokenizer than the model being trained"
        )
