"""Training rows to one packed stream of tokens in which common prefixes exist once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gym_sdk.grpo.packing.forest import Forest, build_forest
from gym_sdk.grpo.packing.layout import ForestLayout, make_layout
from gym_sdk.grpo.packing.rows import check_rows, pad_rows, to_row_values
from gym_sdk.tokens import TokenSequence

__all__ = ["PackedBatch", "context_tokens", "pack_rows"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows as one stream of tokens, without padding, and what to score in it.

    The stream holds what the backbone has to compute, and no more: tokens that rows begin with alike are in
    it once (see `build_forest`), and a row's tokens from its last trained one on are not in it, because no
    trained token comes after them.

    A *pair* is one prediction to score: a target token and the position before it. Rows that train the same
    token in the same context share the pair. Entry [r, s] of a matrix belongs to the s-th trained token of
    row r; `seq` is the largest number of trained tokens in a row, at least 1.

    Attributes:
        input_ids: the stream's token ids.
        position_ids: each token's position in its rows.
        layout: which tokens see which.
        targets: the token to score, of each pair.
        predecessors: the place in the stream before it.
        pair_index: the pair of each trained token; 0 where `loss_mask` is not set.
        loss_mask: whether the row has an s-th trained token.
        behaviour_log_probs: the sampler's log-prob where `loss_mask`, else 0.
        advantages: the row's advantage where `loss_mask`, else 0.
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    layout: ForestLayout
    targets: Int[Tensor, " pairs"]
    predecessors: Int[Tensor, " pairs"]
    pair_index: Int[Tensor, "rows seq"]
    loss_mask: Bool[Tensor, "rows seq"]
    behaviour_log_probs: Float[Tensor, "rows seq"]
    advantages: Float[Tensor, "rows seq"]


def pack_rows(
    rows: Sequence[TokenSequence], device: torch.device | str = "cpu", *, share_prefixes: bool = True
) -> PackedBatch:
    """Pack rows into one stream of tokens.

    A row without trained tokens costs nothing: its tokens are not in the stream, its matrix rows are empty.

    Args:
        rows: at least one; each with its advantage set.
        device: where the tensors go.
        share_prefixes: whether common prefixes are in the stream once. The result is the same either way, up
            to rounding.

    Returns:
        Integers are int64, the rest is float32.

    Raises:
        ConfigurationError: there is no row, or a row has no advantage.
        TokenContractError: a row's first token carries loss (nothing precedes it, so it was not sampled), a
            row is empty, or its lists differ in length.
    """
    check_rows(rows)
    ids, masks, log_probs = to_row_values(rows)
    contexts = [row.token_ids[: context_tokens(row)] for row in rows]
    if not any(contexts):  # keeps the stream, and with it the graph of the loss, from being empty
        contexts[0] = rows[0].token_ids[:1]
    forest = build_forest(contexts, share_prefixes=share_prefixes)
    layout = make_layout(forest, device)
    targets, predecessors, inverse = _pairs(forest, layout, ids, masks)

    counts = [int(mask.sum()) for mask in masks]
    width = max(1, *counts)
    loss_mask = torch.arange(width) < torch.tensor(counts)[:, None]
    pair_index = torch.zeros(loss_mask.shape, dtype=torch.long)
    pair_index[loss_mask] = inverse
    behaviour = [values[mask] for values, mask in zip(log_probs, masks, strict=True)]
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    return PackedBatch(
        input_ids=torch.cat([ids[part.row][part.start : part.stop] for part in forest.segments]).to(device),
        position_ids=torch.cat([torch.arange(part.start, part.stop) for part in forest.segments]).to(device),
        layout=layout,
        targets=targets.to(device),
        predecessors=predecessors.to(device),
        pair_index=pair_index.to(device),
        loss_mask=loss_mask.to(device),
        behaviour_log_probs=pad_rows(behaviour, width).to(device),
        advantages=(advantages[:, None] * loss_mask).to(device),
    )


def context_tokens(row: TokenSequence) -> int:
    """Return how many of a row's first tokens its trained tokens depend on: those before the last of them."""
    return next((place for place in range(len(row) - 1, 0, -1) if row.loss_mask[place]), 0)


def _pairs(
    forest: Forest, layout: ForestLayout, ids: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets and predecessors of the distinct pairs, and the pair of each trained token."""
    places, targets = [], []
    for path, row_ids, mask in zip(forest.paths, ids, masks, strict=True):
        trained = mask.nonzero()[:, 0]
        spans = [layout.spans[number] for number in path]
        stream = [torch.arange(span.start, span.stop) for span in spans] or [trained]
        places.append(torch.cat(stream)[trained - 1] if len(trained) else trained)
        targets.append(row_ids[trained])
    # One number for each (predecessor, target), sorted by predecessor, so that reading them is in order.
    base = 1 + max(int(row_ids.max()) for row_ids in ids)
    pairs, inverse = (torch.cat(places) * base + torch.cat(targets)).unique(return_inverse=True)
    return pairs % base, pairs // base, inverse
