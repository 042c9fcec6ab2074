"""A policy from a model folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backends.hub import model_folder
from backends.memory import CallMemory
from backends.policy import Policy
from backends.renderers import RenderingConfig, load_renderer
from gym_sdk.errors import ConfigurationError

__all__ = ["PolicyConfig", "load_policy"]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Which model to load, and how."""

    model: str
    """Folder of the model in the Hugging Face layout, or its name on the hub."""
    backend: Literal["transformers"] = "transformers"
    """What generates."""
    name: str = "policy"
    """The model's name on the wire."""
    device: str | None = None
    """Where the model runs; a GPU if there is one, by default."""
    dtype: str | None = None
    """Number type of the weights, e.g. `bfloat16`; by default float32 on CPU, bfloat16 on a GPU."""
    context_length: int | None = None
    """Most tokens of prompt and generation; the model's own limit by default."""
    threads: int | None = None
    """CPU threads for the model; torch's own choice by default."""
    rendering: RenderingConfig = field(default_factory=RenderingConfig)
    """How conversations become tokens, and generations items."""
    memory_tokens: int = 8_000_000
    """How many tokens of past model calls to remember."""


def load_policy(config: PolicyConfig) -> Policy:
    """Load the engine and the renderer of a model folder. Blocks while it reads.

    Raises:
        CheckpointError: there is no usable model in the folder.
        ConfigurationError: there is no such model, no usable tokenizer, or the model, backend or dtype cannot
            be served.
    """
    if config.backend != "transformers":
        raise ConfigurationError(f"the backend {config.backend!r} is not known; use `transformers`")
    import torch

    from backends.transformers import EngineConfig, TransformersEngine

    dtype = None if config.dtype is None else getattr(torch, config.dtype, None)
    if config.dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"there is no dtype {config.dtype!r}; use float32, bfloat16 or float16")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = model_folder(config.model)
    name = None if Path(config.model).exists() else config.model
    renderer = load_renderer(folder, config.rendering, name=name)
    engine = TransformersEngine.from_folder(
        folder,
        device=config.device,
        dtype=dtype,
        config=EngineConfig(context_length=config.context_length),
    )
    memory = CallMemory(config.memory_tokens)
    return Policy(engine, renderer, name=config.name, memory=memory, thinking=config.rendering.thinking)
