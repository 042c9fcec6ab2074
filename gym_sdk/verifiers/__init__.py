"""Verifiers: coroutines or functions that score a rollout."""

from gym_sdk.verifiers.compose import weighted
from gym_sdk.verifiers.equivalence import math_equivalent
from gym_sdk.verifiers.numbers import last_number, numeric
from gym_sdk.verifiers.procedural import reasoning_gym
from gym_sdk.verifiers.protocol import Verifier, VerifierResult, run_verifier, verifier_name
from gym_sdk.verifiers.structure import json_schema
from gym_sdk.verifiers.text import contains, exact, regex

__all__ = [
    "Verifier",
    "VerifierResult",
    "contains",
    "exact",
    "json_schema",
    "last_number",
    "math_equivalent",
    "numeric",
    "reasoning_gym",
    "regex",
    "run_verifier",
    "verifier_name",
    "weighted",
]
