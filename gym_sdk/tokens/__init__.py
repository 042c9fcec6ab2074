"""Model calls to training rows: pure Python arithmetic on token ids, no torch."""

from gym_sdk.tokens.advantages import group_advantages
from gym_sdk.tokens.calls import CallTokens, WeightSpan, check_token_bundle
from gym_sdk.tokens.packing import pack_by_budget
from gym_sdk.tokens.sequences import TokenSequence, merge_calls

__all__ = [
    "CallTokens",
    "TokenSequence",
    "WeightSpan",
    "check_token_bundle",
    "group_advantages",
    "merge_calls",
    "pack_by_budget",
]
