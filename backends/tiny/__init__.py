"""A tiny policy made on this machine: tokenizer, chat template, weights, warm start."""

from backends.tiny.build import build_tiny_policy, cached_tiny_policy
from backends.tiny.families import ArithmeticMix, LockersMix, SpellingMix, TraceMix
from backends.tiny.recipe import RECIPES, ModelSizes, TinyRecipe

__all__ = [
    "RECIPES",
    "ArithmeticMix",
    "LockersMix",
    "ModelSizes",
    "SpellingMix",
    "TinyRecipe",
    "TraceMix",
    "build_tiny_policy",
    "cached_tiny_policy",
]
