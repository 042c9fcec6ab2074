"""Whether a model computes the same for packed rows as for padded ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.packing.backbone import hidden_before
from gym_sdk.grpo.packing.forest import MIN_SHARED
from gym_sdk.grpo.packing.packed import pack_rows
from gym_sdk.grpo.packing.padded import to_tensors
from gym_sdk.tokens import TokenSequence

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["check_packing"]


def check_packing(model: PreTrainedModel | PeftModel) -> None:
    """Check that a model's packed rows give the hidden states of padded ones.

    Layers that mix tokens by other means than transformers' attention functions (state-space models, linear
    attention) or that ignore `position_ids` would let rows leak into one another: their results would be
    silently wrong. A few random rows that share prefixes go through the model both ways, without dropout.

    Args:
        model: a causal LM of transformers, or a peft model of one, on the device where it will be trained.

    Raises:
        ConfigurationError: the results differ, or packing refuses the model; `pack=False` is the way out.
    """
    backbone = model.get_decoder()
    first = next(model.parameters())
    rows = _rows(backbone.get_input_embeddings().num_embeddings)
    packed, padded = pack_rows(rows, first.device), to_tensors(rows, first.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            actual = hidden_before(backbone, packed)[packed.pair_index[packed.loss_mask]].double()
            expected = hidden_before(backbone, padded)[padded.pair_index[padded.loss_mask]].double()
    finally:
        model.train(was_training)
    difference = float((actual - expected).norm() / expected.norm())
    tolerance = max(1e-4, 8.0 * torch.finfo(first.dtype).eps)
    if not difference <= tolerance:
        raise ConfigurationError(
            f"{type(model).__name__} computes other hidden states for packed rows than for padded ones "
            f"(relative difference {difference:.1e}, rounding allows {tolerance:.1e}); use pack=False"
        )


def _rows(vocabulary: int) -> list[TokenSequence]:
    """Two rows that fork late, one that forks early, one on its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (6, 2 * MIN_SHARED), generator=generator).tolist()
    paths = [[0, 1, 2], [0, 1, 3], [0, 4], [5]]
    rows = [[token for part in path for token in ids[part]] for path in paths]
    return [
        TokenSequence(row, [0] + [1] * (len(row) - 1), [0.0] * len(row), advantage=0.0, rollout_id="check")
        for row in rows
    ]
