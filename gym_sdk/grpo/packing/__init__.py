"""Training rows to batches: packed into one stream with common prefixes once, or padded."""

from gym_sdk.grpo.packing.backbone import hidden_before
from gym_sdk.grpo.packing.check import check_packing
from gym_sdk.grpo.packing.flat import FlatBatch, to_flat_tensors
from gym_sdk.grpo.packing.layout import ForestLayout
from gym_sdk.grpo.packing.packed import PackedBatch, pack_rows
from gym_sdk.grpo.packing.padded import TokenBatch, to_tensors
from gym_sdk.grpo.packing.planning import plan_micro_batches

__all__ = [
    "FlatBatch",
    "ForestLayout",
    "PackedBatch",
    "TokenBatch",
    "check_packing",
    "hidden_before",
    "pack_rows",
    "plan_micro_batches",
    "to_flat_tensors",
    "to_tensors",
]
