"""Groups as slime's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from gym_sdk.adapters.split import SplitRow, split_row
from gym_sdk.schema import Group, Outcome, Rollout
from gym_sdk.tokens import TokenSequence

__all__ = ["SlimeRecord", "SlimeSamples", "slime_advantages", "to_slime"]


class SlimeRecord(TypedDict):
    """The fields of slime's `Sample` for one row of L tokens whose last C are the response."""

    group_index: int
    """Position of the row's group."""
    index: int
    """Position of the row among all."""
    prompt: str
    """The task's input, if it is text; for slime's logs."""
    tokens: list[int]
    """Prompt, sampled and tool tokens; length L."""
    response: str
    """The policy's final answer; for slime's logs."""
    response_length: int
    """C: everything from the first trained token on."""
    label: str | None
    """The task's answer as text; for slime's logs."""
    reward: float
    """The rollout's reward."""
    loss_mask: list[int]
    """1 where the response's token was sampled and is trained in this row; length C."""
    weight_versions: list[str]
    """The versions that sampled trained tokens, in order."""
    rollout_log_probs: list[float]
    """The sampler's log-prob where `loss_mask` is 1, else 0.0; length C."""
    status: str
    """`completed` or `truncated`: the value of a `Sample.Status`."""
    metadata: dict[str, Any]
    """`advantage`, `rollout_id` and `task_id`."""


@dataclass(frozen=True, slots=True)
class SlimeSamples:
    """What a rollout function of slime returns: the two fields of its `RolloutFnTrainOutput`.

    Attributes:
        samples: the records of each group; a group of which nothing is left is not there.
        metrics: `rollouts/left_out` counts the rollouts without reward, `rollouts/extra_rows` the rows beyond
            one for each rollout.
    """

    samples: list[list[SlimeRecord]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def to_slime(groups: Sequence[Group], *, first_index: int = 0) -> SlimeSamples:
    """Turn groups into what slime's `Sample.from_dict(record)` takes.

    A rollout without reward is left out and counted: slime has statuses for it, but would take its reward
    into the mean of its group. What is left out makes groups unequal, and so do forks, which slime's own
    normalisation cannot take (it reshapes the rewards to groups of one size): start slime with
    `--custom-reward-post-process-path gym_sdk.adapters.slime.slime_advantages`, which uses the advantages
    that come with the records, and with `--use-dynamic-global-batch-size`.

    Checked against THUDM/slime, `slime/utils/types.py` at commit 7985bf23 and `slime/ray/rollout.py` at
    commit a51f0714 (2026).

    Args:
        groups: finished groups.
        first_index: `index` of the first record; indices go on from it.

    Raises:
        TokenContractError: a rollout with a reward has no tokens.
    """
    samples: list[list[SlimeRecord]] = []
    index, extra_rows = first_index, 0
    for group in groups:
        by_id = {rollout.id: rollout for rollout in group.valid}
        records: list[SlimeRecord] = []
        seen: set[str] = set()
        for row in group.sequences():
            split = split_row(row)
            if split is None:
                continue
            records.append(_record(by_id[row.rollout_id], row, split, index=index, group_index=len(samples)))
            index += 1
            extra_rows += row.rollout_id in seen
            seen.add(row.rollout_id)
        if records:
            samples.append(records)
    left_out = sum(len(group.rollouts) - len(group.valid) for group in groups)
    return SlimeSamples(samples, {"rollouts/left_out": left_out, "rollouts/extra_rows": extra_rows})


def slime_advantages(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return raw rewards and advantages of `to_slime`'s samples: slime's custom reward post-processing.

    Args:
        args: slime's arguments.
        samples: slime's `Sample` objects.
    """
    raw = [sample.get_reward_value(args) for sample in samples]
    return raw, [sample.metadata["advantage"] for sample in samples]


def _record(
    rollout: Rollout, row: TokenSequence, split: SplitRow, *, index: int, group_index: int
) -> SlimeRecord:
    assert rollout.reward is not None  # rows are of valid rollouts
    answer = rollout.task.answer
    truncated = rollout.outcome is Outcome.TRUNCATED
    return SlimeRecord(
        group_index=group_index,
        index=index,
        prompt=rollout.task.input if isinstance(rollout.task.input, str) else "",
        tokens=row.token_ids,
        response=rollout.output_text,
        response_length=len(split.completion_ids),
        label=None if answer is None else str(answer),
        reward=rollout.reward,
        loss_mask=split.completion_mask,
        weight_versions=list(dict.fromkeys(span.version for span in row.weight_versions)),
        rollout_log_probs=split.completion_log_probs,
        status="truncated" if truncated else "completed",
        metadata={"advantage": row.advantage, "rollout_id": row.rollout_id, "task_id": row.task_id},
    )
