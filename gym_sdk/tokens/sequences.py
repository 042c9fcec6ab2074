"""Model calls merged into training rows: one for each leaf of their prefix tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gym_sdk.tokens.bundle import WeightSpan
from gym_sdk.tokens.calls import CallTokens
from gym_sdk.tokens.tree import CallNode, TokenTree

__all__ = ["TokenSequence", "merge_calls", "tree_rows"]


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
        forked: whether this row is not the first of its rollout.
        abandoned: whether the rollout did not go on from this row's generation but from another one of the
            same prompt. Then it is the only generation that this row trains.
        calls: indices of the model calls whose generations are trained in this row, in the row's order.
    """

    token_ids: list[int]
    loss_mask: list[int]
    log_probs: list[float]
    weight_versions: list[WeightSpan] = field(default_factory=list)
    advantage: float | None = None
    rollout_id: str = ""
    task_id: str = ""
    forked: bool = False
    abandoned: bool = False
    calls: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)

    def _train(self, node: CallNode) -> None:
        tokens = node.tokens
        start, end = tokens.prompt_length, tokens.total_tokens
        self.loss_mask[start:end] = [1] * (end - start)
        self.log_probs[start:end] = tokens.generation_log_probs
        self.weight_versions += [
            WeightSpan(span.version, span.start + start, span.end + start) for span in tokens.weight_versions
        ]
        self.calls.append(node.call)


def merge_calls(calls: Iterable[CallTokens], *, abandoned: bool = True) -> list[TokenSequence]:
    """Merge the model calls of one rollout into as few rows as is exact.

    There is a row for each leaf of the calls' `TokenTree`: its tokens are the prompt and generation of the
    leaf. Each generation carries loss in exactly one row; in the others it is context. What several rows
    share is trained in the one that is not abandoned and longest (of equally long ones, the one whose ids are
    the smallest as a list). Duplicates are trained once.

    The rows do not depend on the order of the calls, up to the tie that `TokenTree` names; the order of the
    rows does.

    Args:
        calls: the rollout's model calls, in order of arrival.
        abandoned: whether to return abandoned rows. They are kept by default, because the policy did sample
            them, and a trainer that drops the attempts that were not continued selects among samples. The
            other rows are the same either way.

    Returns:
        The rows in order of the first call that they train, abandoned ones last.
    """
    rows = tree_rows(TokenTree(calls))
    return rows if abandoned else [row for row in rows if not row.abandoned]


def tree_rows(tree: TokenTree) -> list[TokenSequence]:
    """Return the rows of a tree, abandoned ones included (see `merge_calls`)."""
    leaves = [(node, node.tokens.token_ids) for node in tree.leaves]
    leaves.sort(key=lambda leaf: (leaf[0].abandoned, -len(leaf[1]), leaf[1], leaf[0].tokens.prompt_length))
    taken: set[int] = set()
    rows: list[TokenSequence] = []
    for leaf, token_ids in leaves:
        length = len(token_ids)
        row = TokenSequence(token_ids, [0] * length, [0.0] * length, abandoned=leaf.abandoned)
        for node in _untaken(tree, leaf, taken):
            row._train(node)
        rows.append(row)
    rows.sort(key=lambda row: (row.abandoned, min(row.calls)))
    for row in rows[1:]:
        row.forked = True
    return rows


def _untaken(tree: TokenTree, leaf: CallNode, taken: set[int]) -> list[CallNode]:
    """Take the nodes from a leaf up to the first one that another row has, and return them from the top."""
    line: list[CallNode] = []
    node: CallNode | None = leaf
    while node is not None and node.call not in taken:
        taken.add(node.call)
        line.append(node)
        node = None if node.parent is None else tree.nodes[node.parent]
    line.reverse()
    return line
