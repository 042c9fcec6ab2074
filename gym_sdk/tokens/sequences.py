"""Model calls merged into training rows: one row while each prompt extends the last, more after a fork."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gym_sdk.tokens.calls import CallTokens, WeightSpan

__all__ = ["TokenSequence", "merge_calls"]


@dataclass(slots=True)
class TokenSequence:
    """One training row. All lists have the row's length L.

    Attributes:
        token_ids: prompt, generated and tool tokens, exactly as the policy saw them.
        loss_mask: 1 where this row's token was sampled by the policy and is trained here, else 0.
        log_probs: the sampler's log-prob where `loss_mask` is 1, else 0.0.
        weight_versions: spans over the row's positions that carry loss.
        advantage: set by the trainer's advantage function; None before that.
        rollout_id: the rollout this row comes from.
        task_id: the task of that rollout, which names its group.
        forked: whether an earlier row of the same rollout exists that this one does not extend.
    """

    token_ids: list[int]
    loss_mask: list[int]
    log_probs: list[float]
    weight_versions: list[WeightSpan] = field(default_factory=list)
    advantage: float | None = None
    rollout_id: str = ""
    task_id: str = ""
    forked: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)

    def _extend(self, call: CallTokens) -> None:
        new_prompt = call.prompt_token_ids[len(self.token_ids) :]
        self.token_ids += new_prompt
        self.loss_mask += [0] * len(new_prompt)
        self.log_probs += [0.0] * len(new_prompt)
        offset = len(self.token_ids)
        self.token_ids += call.generation_token_ids
        self.loss_mask += [1] * len(call.generation_token_ids)
        self.log_probs += call.generation_log_probs
        self.weight_versions += [
            WeightSpan(span.version, span.start + offset, span.end + offset) for span in call.weight_versions
        ]


def merge_calls(calls: Iterable[CallTokens]) -> list[TokenSequence]:
    """Merge the model calls of one rollout into as few rows as is exact.

    A call extends the longest row whose tokens are a prefix of the call's prompt; if there is none, it
    starts a row of its own (a fork). Each sampled token carries loss in exactly one row: where a forked
    prompt repeats tokens of an earlier row, they are context there.

    Args:
        calls: the rollout's model calls, in order.

    Returns:
        The rows, in order of their first call.
    """
    rows: list[TokenSequence] = []
    for call in calls:
        prompt = call.prompt_token_ids
        best: TokenSequence | None = None
        for row in reversed(rows):
            size = len(row)
            if (best is None or size > len(best)) and prompt[:size] == row.token_ids:
                best = row
        if best is None:
            best = TokenSequence([], [], [], forked=bool(rows))
            rows.append(best)
        best._extend(call)
    return rows
