"""Model calls to training rows: pure Python arithmetic on token ids, no torch."""

from gym_sdk.tokens.advantages import group_advantages
from gym_sdk.tokens.bundle import WeightSpan, check_token_bundle
from gym_sdk.tokens.calls import CallTokens
from gym_sdk.tokens.chains import chained
from gym_sdk.tokens.packing import pack_by_budget
from gym_sdk.tokens.report import Fork, TokenReport
from gym_sdk.tokens.sequences import TokenSequence, merge_calls
from gym_sdk.tokens.tree import CallNode, TokenTree

__all__ = [
    "CallNode",
    "CallTokens",
    "Fork",
    "TokenReport",
    "TokenSequence",
    "TokenTree",
    "WeightSpan",
    "chained",
    "check_token_bundle",
    "group_advantages",
    "merge_calls",
    "pack_by_budget",
]
