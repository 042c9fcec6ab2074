"""A tiny policy made on this machine: tokenizer, chat template, weights, warm start."""

from backends.tiny.build import build_tiny_policy, cached_tiny_policy
from backends.tiny.calculator import CALCULATOR_TOOL
from backends.tiny.recipe import ModelSizes, TinyRecipe, TraceMix

__all__ = [
    "CALCULATOR_TOOL",
    "ModelSizes",
    "TinyRecipe",
    "TraceMix",
    "build_tiny_policy",
    "cached_tiny_policy",
]
