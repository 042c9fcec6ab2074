"""Groups as a batch of verl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeVar

from gym_sdk.adapters.split import SplitRow, split_row
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Group

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VerlBatch", "VerlTensors", "to_verl"]

Value = TypeVar("Value", int, float)


class VerlTensors(TypedDict):
    """The tensors; rows have a prompt of P tokens, padded on the left, and a response of R, on the right."""

    input_ids: Tensor
    """Prompt and response; [rows, P + R]."""
    attention_mask: Tensor
    """1 for a token, 0 for padding; [rows, P + R]."""
    position_ids: Tensor
    """0, 1, 2, ... from each row's first token on; [rows, P + R]."""
    prompts: Tensor
    """[rows, P]."""
    responses: Tensor
    """Everything from the first trained token on; [rows, R]."""
    response_mask: Tensor
    """1 where the token was sampled and is trained in this row; [rows, R]."""
    rollout_log_probs: Tensor
    """The sampler's log-prob where `response_mask` is 1, else 0; float32 [rows, R]."""
    rm_scores: Tensor
    """The rollout's reward at the row's last token, else 0; float32 [rows, R]."""
    advantages: Tensor
    """The row's advantage where `response_mask` is 1, else 0; float32 [rows, R]."""
    returns: Tensor
    """The same: with outcome rewards and no critic, verl takes the one for the other."""


class VerlBatch(TypedDict):
    """The arguments of verl's `DataProto.from_dict`."""

    tensors: VerlTensors
    """What is trained."""
    non_tensors: dict[str, list[str]]
    """`uid` names a row's group, `rollout_id` its rollout."""
    meta_info: dict[str, int]
    """`rollouts_left_out` counts the rollouts without reward, `extra_rows` the rows beyond one for each
    rollout."""


def to_verl(
    groups: Sequence[Group],
    *,
    pad_token_id: int = 0,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> VerlBatch:
    """Turn groups into what `DataProto.from_dict(**batch)` takes. Needs torch.

    verl computes advantages from `rm_scores` by `uid`. There a rollout that forked would count once for each
    of its rows; `advantages` counts it once, so skip verl's estimator if `meta_info["extra_rows"]` is not 0.

    Checked against the package verl 0.9.1 (`verl/protocol.py`; `verl/experimental/agent_loop/agent_loop.py`,
    `_postprocess`; `verl/trainer/ppo/ray_trainer.py`).

    Args:
        groups: finished groups. Rollouts without reward are left out and counted.
        pad_token_id: fills up prompts and responses.
        prompt_length: P; the longest prompt by default.
        response_length: R; the longest response by default.

    Raises:
        ConfigurationError: no row is left, or one is longer than asked for; rows are never cut.
        TokenContractError: a rollout with a reward has no tokens.
    """
    rows = [row for group in groups for row in _rows(group)]
    if not rows:
        raise ConfigurationError(f"none of {len(groups)} groups has a row to train on")
    prompt_width = _width("prompt", [len(row.split.prompt_ids) for row in rows], prompt_length)
    response_width = _width("response", [len(row.split.completion_ids) for row in rows], response_length)
    return VerlBatch(
        tensors=_tensors(rows, prompt_width, response_width, pad_token_id),
        non_tensors={"uid": [row.uid for row in rows], "rollout_id": [row.rollout_id for row in rows]},
        meta_info={
            "rollouts_left_out": sum(len(group.rollouts) - len(group.valid) for group in groups),
            "extra_rows": sum(row.extra for row in rows),
        },
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with what verl wants to know of its rollout."""

    split: SplitRow
    reward: float
    advantage: float
    uid: str
    rollout_id: str
    extra: bool


def _rows(group: Group) -> Iterator[_Row]:
    rewards = {rollout.id: rollout.reward for rollout in group.rollouts}
    seen: set[str] = set()
    for row in group.sequences():
        split, reward = split_row(row), rewards[row.rollout_id]
        if split is None:
            continue
        assert reward is not None
        assert row.advantage is not None  # `sequences` sets it, for the rollouts with a reward
        extra = row.rollout_id in seen
        seen.add(row.rollout_id)
        yield _Row(split, reward, row.advantage, f"{row.task_id}@{group.epoch}", row.rollout_id, extra)


def _tensors(rows: Sequence[_Row], prompt_width: int, width: int, pad_token_id: int) -> VerlTensors:
    import torch

    splits = [row.split for row in rows]
    prompts = torch.tensor([_left(split.prompt_ids, prompt_width, pad_token_id) for split in splits])
    responses = torch.tensor([_right(split.completion_ids, width, pad_token_id) for split in splits])
    mask = torch.tensor([_right(split.completion_mask, width, 0) for split in splits])
    attention = torch.tensor(
        [
            _left([1] * len(split.prompt_ids), prompt_width, 0)
            + _right([1] * len(split.completion_ids), width, 0)
            for split in splits
        ]
    )
    scores = torch.zeros(len(rows), width)
    for score, row in zip(scores, rows, strict=True):
        score[len(row.split.completion_ids) - 1] = row.reward
    advantages = torch.tensor([row.advantage for row in rows])[:, None] * mask
    return VerlTensors(
        input_ids=torch.cat([prompts, responses], dim=1),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        prompts=prompts,
        responses=responses,
        response_mask=mask,
        rollout_log_probs=torch.tensor([_right(split.completion_log_probs, width, 0.0) for split in splits]),
        rm_scores=scores,
        advantages=advantages,
        returns=advantages.clone(),
    )


def _width(part: str, lengths: list[int], wanted: int | None) -> int:
    longest = max(lengths)
    if wanted is not None and longest > wanted:
        raise ConfigurationError(
            f"a {part} has {longest} tokens, {part}_length is {wanted}; rows are never cut: raise it, or "
            "limit what is sampled (`Sampling.max_output_tokens`, `Limits.max_turns`)"
        )
    return longest if wanted is None else wanted


def _left(values: list[int], width: int, fill: int) -> list[int]:
    return [fill] * (width - len(values)) + values


def _right(values: list[Value], width: int, fill: Value) -> list[Value]:
    return values + [fill] * (width - len(values))
