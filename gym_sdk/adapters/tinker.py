"""Rows as the data of tinker's `forward_backward`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from gym_sdk.adapters.split import split_row
from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import TokenSequence

__all__ = ["TinkerInputs", "TinkerRecord", "to_tinker"]


class TinkerInputs(TypedDict):
    """`Datum.loss_fn_inputs` of tinker's policy losses; all lists have length L - 1 for a row of L tokens."""

    target_tokens: list[int]
    """The row's tokens from the second on: entry t is what the model shall predict after input t."""
    logprobs: list[float]
    """The sampler's log-prob of the target where it is trained, else 0.0."""
    advantages: list[float]
    """The row's advantage where the target is trained, else 0.0, which is how tinker masks."""


class TinkerRecord(TypedDict):
    """One datum as plain lists."""

    model_input: list[int]
    """The row's tokens without the last one, for `tinker.ModelInput.from_ints`; length L - 1."""
    loss_fn_inputs: TinkerInputs
    """What the loss gets."""


def to_tinker(rows: Iterable[TokenSequence]) -> list[TinkerRecord]:
    """Turn rows into tinker's data: inputs without their last token, targets without their first.

    ```python
    data = [
        tinker.Datum(model_input=tinker.ModelInput.from_ints(record["model_input"]),
                     loss_fn_inputs=record["loss_fn_inputs"])
        for record in to_tinker(group.sequences())
    ]
    await training_client.forward_backward_async(data, loss_fn="importance_sampling")
    ```

    Checked against the package tinker 0.38.0 (`tinker/types/datum.py`) and tinker-cookbook 0.6.1
    (`rl/data_processing.py`, `trajectory_to_data`).

    Args:
        rows: with their advantages set, e.g. by `Group.sequences`.

    Returns:
        A record for each row that trains a token, in order; the others are left out.

    Raises:
        ConfigurationError: a row has no advantage.
        TokenContractError: a row starts with a trained token, or its lists differ in length.
    """
    records: list[TinkerRecord] = []
    for row in rows:
        if split_row(row) is None:
            continue
        if row.advantage is None:
            raise ConfigurationError(f"a row of rollout {row.rollout_id!r} has no advantage; set it first")
        advantage = row.advantage
        inputs = TinkerInputs(
            target_tokens=row.token_ids[1:],
            logprobs=row.log_probs[1:],
            advantages=[advantage if trained else 0.0 for trained in row.loss_mask[1:]],
        )
        records.append(TinkerRecord(model_input=row.token_ids[:-1], loss_fn_inputs=inputs))
    return records
