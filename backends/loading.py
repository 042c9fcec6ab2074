"""A policy from a model folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from backends.hub import model_folder
from backends.memory import CallMemory
from backends.policy import Policy
from backends.renderers import RenderingConfig, load_renderer
from backends.rendering import Renderer
from backends.rendering.parsing import SGLANG
from backends.sglang import CPU_ARGUMENTS, SGLangOptions, open_sglang
from backends.sglang.parsing.reader import sglang_reader
from gym_sdk.errors import ConfigurationError

__all__ = ["PolicyConfig", "load_policy", "open_policy"]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Which model to load, and how."""

    model: str
    """Folder of the model in the Hugging Face layout, or its name on the hub."""
    backend: Literal["transformers", "sglang"] = "transformers"
    """What generates: the embedded engine, or SGLang in a process of its own."""
    name: str = "policy"
    """The model's name on the wire."""
    device: str | None = None
    """Where the model runs; a GPU if there is one, by default."""
    dtype: str | None = None
    """Number type of the weights, e.g. `bfloat16`; by default float32 on CPU, bfloat16 on a GPU."""
    context_length: int | None = None
    """Most tokens of prompt and generation; the model's own limit by default."""
    threads: int | None = None
    """CPU threads for the embedded engine's model; torch's own choice by default."""
    sglang: SGLangOptions = field(default_factory=SGLangOptions)
    """Which SGLang, for that backend."""
    rendering: RenderingConfig = field(default_factory=RenderingConfig)
    """How conversations become tokens, and generations items."""
    memory_tokens: int = 8_000_000
    """How many tokens of past model calls to remember."""
    strict_tools: bool = False
    """Whether calls are held to the schemas of tools that are `strict`, by constrained decoding."""


@asynccontextmanager
async def open_policy(config: PolicyConfig) -> AsyncIterator[Policy]:
    """Load a policy for as long as the context lasts; SGLang is launched, or connected to.

    Raises:
        CheckpointError: there is no usable model in the folder.
        ConfigurationError: there is no such model, no usable tokenizer, or the model, backend or dtype cannot
            be served.
        TransportError: SGLang does not answer.
        DeadlineError: SGLang did not start in time.
    """
    if config.backend != "sglang":
        policy = await asyncio.to_thread(load_policy, config)
        try:
            yield policy
        finally:
            await policy.aclose()
        return
    options, parser = _sglang_options(config), config.rendering.parser
    folder, renderer = await asyncio.to_thread(_load_renderer, config)
    async with open_sglang(folder, options) as engine:
        reader = await sglang_reader(engine, engine.facts, renderer, parser)
        yield Policy(
            engine,
            renderer,
            name=config.name,
            memory=CallMemory(config.memory_tokens),
            thinking=config.rendering.thinking,
            reader=reader,
            strict_tools=config.strict_tools,
        )


def load_policy(config: PolicyConfig) -> Policy:
    """Load the embedded engine and the renderer of a model folder. Blocks while it reads.

    Raises:
        CheckpointError: there is no usable model in the folder.
        ConfigurationError: there is no such model, no usable tokenizer, or the model, backend or dtype cannot
            be served.
    """
    if config.backend == "sglang":
        raise ConfigurationError("SGLang runs beside an event loop: use `open_policy` or `gym-sdk serve`")
    if config.backend != "transformers":
        raise ConfigurationError(
            f"the backend {config.backend!r} is not known; use `transformers` or `sglang`"
        )
    parser = config.rendering.parser
    if parser is not None and parser.startswith(SGLANG):
        raise ConfigurationError(f"the parser {parser!r} is SGLang's: only the backend `sglang` reads by it")
    import torch

    from backends.transformers import EngineConfig, TransformersEngine

    dtype = None if config.dtype is None else getattr(torch, config.dtype, None)
    if config.dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"there is no dtype {config.dtype!r}; use float32, bfloat16 or float16")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder, renderer = _load_renderer(config)
    engine = TransformersEngine.from_folder(
        folder,
        device=config.device,
        dtype=dtype,
        config=EngineConfig(context_length=config.context_length),
    )
    memory = CallMemory(config.memory_tokens)
    return Policy(
        engine,
        renderer,
        name=config.name,
        memory=memory,
        thinking=config.rendering.thinking,
        strict_tools=config.strict_tools,
    )


def _load_renderer(config: PolicyConfig) -> tuple[Path, Renderer]:
    folder = model_folder(config.model)
    name = None if Path(config.model).exists() else config.model
    return folder, load_renderer(folder, config.rendering, name=name)


def _sglang_options(config: PolicyConfig) -> SGLangOptions:
    """Return the options with what the policy says about the model, in SGLang's words."""
    if config.threads is not None:
        raise ConfigurationError("threads are the embedded engine's; set OMP_NUM_THREADS for SGLang")
    said = {
        "--device": config.device,
        "--dtype": config.dtype,
        "--context-length": config.context_length,
    }
    arguments = [str(part) for name, value in said.items() if value is not None for part in (name, value)]
    cpu = config.device == "cpu" or (config.device is None and not _sees_gpu())
    usual = CPU_ARGUMENTS if cpu and not config.sglang.urls else ()
    return replace(config.sglang, arguments=(*usual, *arguments, *config.sglang.arguments))


def _sees_gpu() -> bool:
    """Whether the kernel has a GPU's device file; this environment's torch may not be SGLang's."""
    return Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
