"""Random models with peaked distributions, requests, and what a plain forward pass says about them."""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from backends.engine import Generation, GenerationRequest, SamplingParams
from backends.transformers import TransformersEngine

VOCAB = 97
CONTEXT = 256


def build_model(architecture: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    sizes |= changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)).eval()


class MakeRequest(Protocol):
    def __call__(
        self, prompt: Sequence[int], new: int | None = 8, *, name: str | None = None, **sampling: object
    ) -> GenerationRequest: ...


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, and far slower where other processes hold a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models() -> dict[str, PreTrainedModel]:
    return {name: build_model(name) for name in ("qwen3", "llama")}


@pytest.fixture(params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest, models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """A model of each architecture, the test's own."""
    return copy.deepcopy(models[request.param])


@pytest.fixture
def qwen3(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return copy.deepcopy(models["qwen3"])


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture
def make_request() -> MakeRequest:
    numbers = itertools.count()

    def make(
        prompt: Sequence[int], new: int | None = 8, *, name: str | None = None, **sampling: object
    ) -> GenerationRequest:
        params = SamplingParams(max_new_tokens=new, **sampling)  # type: ignore[arg-type]
        return GenerationRequest(name or f"request-{next(numbers)}", list(prompt), params)

    return make


def throttle(engine: TransformersEngine) -> None:
    """Make steps slow enough that a test sees generations in progress, on a busy machine too."""
    engine._scheduler.module.register_forward_pre_hook(lambda *_: time.sleep(0.004))


async def begun(engine: TransformersEngine, count: int, tokens: int) -> None:
    """Wait until so many requests have sampled so many tokens."""
    async with asyncio.timeout(30):
        while sum(len(state.token_ids) >= tokens for state in list(engine._requests.values())) < count:
            await asyncio.sleep(0.001)


class InProgress(Protocol):
    async def __call__(self, engine: TransformersEngine, count: int, tokens: int) -> None: ...


@pytest.fixture
def in_progress() -> InProgress:
    return begun


@pytest.fixture
def slow() -> Callable[[TransformersEngine], None]:
    return throttle


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., list[int]]:
    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        return ids

    return make


@pytest.fixture(scope="session")
def forward_log_probs() -> Callable[..., torch.Tensor]:
    """Log-probs of the tokens after a prompt, by one forward pass of the plain model."""

    def compute(
        model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int], temperature: float = 1.0
    ) -> torch.Tensor:
        ids = torch.tensor([*prompt, *generated])
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits.float() / temperature).log_softmax(-1)
        return log_probs.gather(1, ids[len(prompt) :, None])[:, 0]

    return compute


@pytest.fixture(scope="session")
def worst_difference(
    forward_log_probs: Callable[..., torch.Tensor],
) -> Callable[..., float]:
    """How far a generation's log-probs are from the forward pass."""

    def compute(
        model: PreTrainedModel, prompt: Sequence[int], generation: Generation, temperature: float = 1.0
    ) -> float:
        expected = forward_log_probs(model, prompt, generation.token_ids, temperature)
        return float((expected - torch.tensor(generation.log_probs)).abs().max())

    return compute
