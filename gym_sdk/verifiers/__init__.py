"""Verifiers: coroutines or functions that score a rollout, or the rollouts of a group."""

from gym_sdk.verifiers.caching import CachedVerifier, cached
from gym_sdk.verifiers.compose import gated, mapped, weighted
from gym_sdk.verifiers.equivalence import math_equivalent
from gym_sdk.verifiers.group import GroupVerifier, run_group_verifier
from gym_sdk.verifiers.judge import Judge, JudgeOptions, Rubric
from gym_sdk.verifiers.length import overlong
from gym_sdk.verifiers.numbers import last_number, numeric
from gym_sdk.verifiers.procedural import reasoning_gym
from gym_sdk.verifiers.protocol import Verifier, VerifierResult, run_verifier, verifier_name
from gym_sdk.verifiers.relative import Pairing, pairwise, ranking
from gym_sdk.verifiers.structure import json_schema
from gym_sdk.verifiers.text import contains, exact, regex

__all__ = [
    "CachedVerifier",
    "GroupVerifier",
    "Judge",
    "JudgeOptions",
    "Pairing",
    "Rubric",
    "Verifier",
    "VerifierResult",
    "cached",
    "contains",
    "exact",
    "gated",
    "json_schema",
    "last_number",
    "mapped",
    "math_equivalent",
    "numeric",
    "overlong",
    "pairwise",
    "ranking",
    "reasoning_gym",
    "regex",
    "run_group_verifier",
    "run_verifier",
    "verifier_name",
    "weighted",
]
