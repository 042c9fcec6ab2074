"""Rows as prime-rl's training samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from gym_sdk.adapters.split import split_row
from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import TokenSequence

__all__ = ["PrimeRLRecord", "to_prime_rl"]


class PrimeRLRecord(TypedDict):
    """The fields of prime-rl's `TrainingSample` for a text policy; all lists have the row's length L."""

    token_ids: list[int]
    """Prompt, sampled and tool tokens; prime-rl makes no cut between prompt and completion."""
    mask: list[bool]
    """Whether the token was sampled and is trained in this row."""
    logprobs: list[float]
    """The sampler's log-prob where `mask`, else 0.0."""
    temperatures: list[float]
    """The temperature of each token; prime-rl divides the logits by it."""
    env_name: str
    """Names the environment in metrics."""
    advantages: list[float]
    """The row's advantage where `mask`, else 0.0."""
    trace_id: str
    """The rollout's id."""
    branch_index: int
    """Which of its rollout's rows this is, from 0."""


def to_prime_rl(
    rows: Iterable[TokenSequence], *, env_name: str, temperature: float = 1.0
) -> list[PrimeRLRecord]:
    """Turn rows into what `TrainingSample(**record)` takes.

    Checked against PrimeIntellect-ai/prime-rl, `src/prime_rl/transports/batch/types.py` at commit 0f59b241
    (2026); older versions have the fields `prompt_ids`, `completion_ids` and so on instead.

    Args:
        rows: with their advantages set, e.g. by `Group.sequences`.
        env_name: names the environment in prime-rl's metrics.
        temperature: what the rollouts were sampled at; 1.0 for greedy ones, as in their log-probs.

    Returns:
        A record for each row that trains a token, in order; the others are left out.

    Raises:
        ConfigurationError: a row has no advantage, or the temperature is not positive.
        TokenContractError: a row starts with a trained token, or its lists differ in length.
    """
    if not temperature > 0.0:
        raise ConfigurationError(f"temperature must be positive, not {temperature}; greedy ones count as 1.0")
    records: list[PrimeRLRecord] = []
    branches: dict[str, int] = {}
    for row in rows:
        branch = branches.get(row.rollout_id, 0)
        branches[row.rollout_id] = branch + 1
        if split_row(row) is None:
            continue
        if row.advantage is None:
            raise ConfigurationError(f"a row of rollout {row.rollout_id!r} has no advantage; set it first")
        advantage = row.advantage
        records.append(
            PrimeRLRecord(
                token_ids=row.token_ids,
                mask=[bool(trained) for trained in row.loss_mask],
                logprobs=row.log_probs,
                temperatures=[temperature] * len(row),
                env_name=env_name,
                advantages=[advantage if trained else 0.0 for trained in row.loss_mask],
                trace_id=row.rollout_id,
                branch_index=branch,
            )
        )
    return records
