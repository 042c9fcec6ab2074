"""What decides how a tiny policy comes out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from backends.tiny.families import ArithmeticMix, LockersMix, SpellingMix, TraceMix
from backends.tiny.vocabulary import CHAT_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS
from gym_sdk.errors import ConfigurationError

__all__ = ["FORMAT_VERSION", "RECIPES", "ModelSizes", "TinyRecipe"]

FORMAT_VERSION = 1
"""Raised when the code changes what comes out of an unchanged recipe."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of the Qwen3 architecture.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_hidden_layers: how many layers.
        num_attention_heads: query heads per layer.
        num_key_value_heads: key and value heads per layer.
        head_dim: width of a head.
        max_position_embeddings: the context length, in tokens.

    Raises:
        ConfigurationError: a size is out of range.
    """

    hidden_size: int = 128
    intermediate_size: int = 576
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        if any(size < 1 for size in asdict(self).values()):
            raise ConfigurationError(f"every size must be at least 1: {self}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigurationError(f"num_attention_heads must be a multiple of num_key_value_heads: {self}")


@dataclass(frozen=True, slots=True)
class TinyRecipe:
    """Everything that decides how a tiny policy comes out.

    The same recipe gives the same weights on the same machine and number of threads.

    Attributes:
        sizes: of the model.
        mix: of the traces; its type is the family of tasks.
        copy_steps: optimizer steps on the mix's exercise, which comes first.
        trace_steps: optimizer steps on traces.
        batch_size: rows per step.
        matrix_learning_rate: peak learning rate of the matrices (Muon).
        learning_rate: peak learning rate of everything else (Adam).
        seed: of the initial weights and of the data.

    Raises:
        ConfigurationError: a number is out of range.
    """

    sizes: ModelSizes = field(default_factory=ModelSizes)
    mix: TraceMix = field(default_factory=ArithmeticMix)
    copy_steps: int = 320
    trace_steps: int = 300
    batch_size: int = 32
    matrix_learning_rate: float = 0.02
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copy_steps < 0 or self.trace_steps < 0:
            raise ConfigurationError("copy_steps and trace_steps must be 0 or more")
        if self.batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, not {self.batch_size}")
        for rate in (self.matrix_learning_rate, self.learning_rate):
            if not 0.0 < rate < math.inf:
                raise ConfigurationError(f"learning rates must be positive and finite, not {rate}")

    @classmethod
    def untrained(cls, seed: int = 0) -> TinyRecipe:
        """Make a recipe without warm start: a policy in a second or two, for tests."""
        return cls(copy_steps=0, trace_steps=0, seed=seed)

    def fingerprint(self) -> str:
        """Hash everything that decides how the policy comes out, the code's constants included."""
        vocabulary = self.mix.vocabulary
        content = {
            "format": FORMAT_VERSION,
            "recipe": asdict(self),
            "tokenizer": [SPECIAL_TOKENS, MARKUP_TOKENS, vocabulary.pieces, vocabulary.texts],
            "chat_template": CHAT_TEMPLATE,
            "tool": self.mix.tool,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


RECIPES: Mapping[str, TinyRecipe] = {
    "arithmetic": TinyRecipe(),
    "lockers": TinyRecipe(mix=LockersMix(), copy_steps=320, trace_steps=240),
    "spelling": TinyRecipe(mix=SpellingMix(), copy_steps=400, trace_steps=300),
}
"""A recipe for each family of tasks."""
