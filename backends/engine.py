"""The engine protocol: token ids in, token ids and log-probs out. Nothing here knows of text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from gym_sdk.errors import ConfigurationError, ContextOverflowError
from gym_sdk.schema.weights import AdapterWeights, BroadcastWeights, TensorSpec, WeightsGroup
from gym_sdk.tokens import WeightSpan

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterWeights",
    "BroadcastWeights",
    "Engine",
    "EngineInfo",
    "FinishReason",
    "FolderWeights",
    "Generation",
    "GenerationChunk",
    "GenerationRequest",
    "PauseMode",
    "RemoteEngine",
    "ReplicaInfo",
    "SamplingParams",
    "TensorSpec",
    "TensorWeights",
    "TopLogProbs",
    "WeightSource",
    "WeightsGroup",
    "check_room",
]


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The policy sampled a stop token, which is the last generated token."""
    LENGTH = "length"
    """It reached `max_new_tokens` or the engine's context length."""
    ABORT = "abort"
    """It was aborted; the tokens up to then are valid."""


PauseMode: TypeAlias = Literal["abort", "retract", "in_place"]
"""What happens to running generations at a pause: end them; recompute their cache after it; keep it."""

TopLogProbs: TypeAlias = list[list[tuple[int, float]]]
"""For each place the likeliest tokens and their natural-log probabilities, likeliest first."""

_MOST_TOP_LOG_PROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1; None: as many as the context holds.
        temperature: 0 is greedy.
        top_p: nucleus: the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: only the k likeliest tokens; 0 turns it off.
        seed: makes this request's samples repeatable, whatever runs beside it.
        stop_token_ids: a sampled token of this set ends the generation, and is part of it.
        grammar: what the generation must spell, in llguidance's dialect of Lark; None: anything. It covers
            the whole generation, the stop token at its end included: special tokens are written by id, such
            as `<[151645]>`.
        top_log_probs: how many of the likeliest tokens to report at each place, 0 to 20.

    Raises:
        ConfigurationError: a value is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    grammar: str | None = None
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigurationError(f"temperature must be in [0, 100], not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigurationError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ConfigurationError(f"top_k must be 0 (off) or positive, below 2**31, not {self.top_k}")
        if self.grammar is not None and not self.grammar.strip():
            raise ConfigurationError("grammar must not be empty; None allows anything")
        if self.grammar is not None and not self.stop_token_ids:
            raise ConfigurationError("a grammar spells a stop token at its end: name those in stop_token_ids")
        if not 0 <= self.top_log_probs <= _MOST_TOP_LOG_PROBS:
            raise ConfigurationError(
                f"top_log_probs must be in [0, {_MOST_TOP_LOG_PROBS}], not {self.top_log_probs}"
            )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        request_id: names the request for `abort`; unique among those in flight.
        prompt_token_ids: length P, at least 1.
        affinity: requests that share it are likely to share a prefix, such as those of one conversation.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    affinity: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What is new since the previous chunk. The last chunk has a `finish_reason`.

    Attributes:
        token_ids: the new tokens.
        log_probs: as in `Generation`.
        weight_version: the version that sampled this chunk's tokens; a chunk never spans two.
        finish_reason: why the generation ended; None while it goes on.
        top_log_probs: as in `Generation`.
        cached_tokens: as in `Generation`.
    """

    token_ids: list[int]
    log_probs: list[float]
    weight_version: str
    finish_reason: FinishReason | None = None
    top_log_probs: TopLogProbs | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    Attributes:
        token_ids: the G sampled tokens.
        log_probs: G natural-log probabilities at the request's temperature (1 if greedy), before
            top-k/top-p truncation and the grammar's mask.
        weight_versions: spans over the G tokens.
        cached_tokens: how many prompt tokens did not need computing.
        top_log_probs: the likeliest tokens at each of the G places, scored as `log_probs` are; None if none
            were asked for. Tokens that can't be sampled at all are left out.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: tuple[WeightSpan, ...]
    cached_tokens: int = 0
    top_log_probs: TopLogProbs | None = None


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One of the servers behind an engine.

    Attributes:
        url: its address.
        serves: whether it gets requests.
        running: how many it has.
        restarts: how often it was started again, if it was started here.
        problem: why it gets no requests; None if it does.
    """

    url: str
    serves: bool
    running: int
    restarts: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a caller must know to send valid requests, and how the engine is."""

    vocab_size: int
    context_length: int
    weight_version: str
    running: int = 0
    waiting: int = 0
    replicas: tuple[ReplicaInfo, ...] = ()
    problem: str | None = None
    """Why the engine generates nothing any more; None if it does."""


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """Weights in a folder in the Hugging Face layout (safetensors)."""

    path: Path


@dataclass(frozen=True, slots=True)
class TensorWeights:
    """Weights by parameter name, copied into the engine's own module."""

    tensors: Mapping[str, torch.Tensor]


WeightSource: TypeAlias = FolderWeights | TensorWeights | BroadcastWeights | AdapterWeights
"""Every engine takes the first two; the others are for engines in processes of their own (`RemoteEngine`)."""


@runtime_checkable
class Engine(Protocol):
    """Generates from one policy.

    All methods belong to one event loop. Cancelling a `generate` or leaving a `stream` early aborts the
    request and frees its slot.
    """

    @property
    def info(self) -> EngineInfo:
        """Sizes, the current weight version and the load."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate to the end.

        Raises:
            ContextOverflowError: the prompt leaves no room for a token.
            ConfigurationError: an id is outside the vocabulary, or the request id is in use.
            PolicyError: the engine can't do what the request asks for, the grammar is invalid, or it allows
                no further token.
            GymError: the engine is closed or broke.
        """
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Generate and yield chunks as they are sampled; raises as `generate` does."""
        ...

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many. They end with `FinishReason.ABORT`."""
        ...

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop sampling when this returns; new requests wait until `continue_generation`."""
        ...

    async def continue_generation(self) -> None:
        """Resume after `pause`; without effect if not paused."""
        ...

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        """Replace the weights between two sampling steps, and flush every cache of the old ones.

        Requests in flight continue on the new weights, with their own keys and values recomputed; their
        generations report both versions. If the source cannot be used, the old weights keep serving.

        Raises:
            CheckpointError: the source is damaged or of another model.
        """
        ...

    async def aclose(self) -> None:
        """Abort everything and free the engine."""
        ...


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine in other processes than the trainer's, which may join its process groups."""

    @property
    def ranks(self) -> int:
        """How many ranks the engine takes in a group."""
        ...

    async def join_group(self, group: WeightsGroup) -> None:
        """Join a group whose rank 0 is listening already; return when all ranks are there.

        Raises:
            ConfigurationError: this engine cannot be in a group.
            PolicyError: it did not come together.
            TransportError: the engine does not answer.
            DeadlineError: it did not come together in time.
        """
        ...

    async def leave_group(self, name: str) -> None:
        """Leave a group; without effect on one that is not known (any more)."""
        ...


def check_room(request: GenerationRequest, context_length: int) -> None:
    """Check that a request has a prompt, and that the context has room for a token after it.

    Raises:
        ContextOverflowError: it leaves no room for a token.
        ConfigurationError: it is empty.
    """
    size = len(request.prompt_token_ids)
    if size == 0:
        raise ConfigurationError(f"request {request.request_id!r} has an empty prompt")
    if size >= context_length:
        raise ContextOverflowError(
            f"the prompt has {size} tokens; the context holds {context_length}, "
            "and at least one of them must be left to generate",
            prompt_tokens=size,
            context_length=context_length,
        )
