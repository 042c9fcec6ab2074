"""One request in flight, as the step thread sees it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from llguidance import LLMatcher

from backends.engine import (
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationRequest,
    SamplingParams,
    TopLogProbs,
    check_room,
)
from backends.transformers.sampling import mix_seed
from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import WeightSpan

__all__ = ["Item", "Output", "RequestState", "Sink", "checked_prompt"]

Item: TypeAlias = Generation | GenerationChunk | Exception
"""What a caller receives: the whole generation, a piece of a stream, or why there is none."""


class Sink(Protocol):
    """Where a request's items go."""

    @property
    def streaming(self) -> bool:
        """Whether it takes chunks as they come, or one generation at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Output:
    """An item on its way to the caller."""

    sink: Sink
    item: Item


class RequestState:
    """A request's progress. Only the step thread touches it.

    Attributes:
        prompt: int64, length P.
        limit: most tokens of prompt and generation together.
        key: seeds the request's uniform numbers.
        matcher: says which tokens the request's grammar allows next; None if it has no grammar.
        row: its slot; None while it waits.
        cached_tokens: prompt tokens reused when it was first admitted; None before that.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: np.ndarray,
        limit: int,
        sink: Sink,
        matcher: LLMatcher | None = None,
    ) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.sampling: SamplingParams = sampling
        self.prompt = prompt
        self.limit = limit
        self.sink = sink
        self.key = mix_seed(secrets.randbits(64) if sampling.seed is None else sampling.seed)
        self.matcher = matcher
        self.row: int | None = None
        self.cached_tokens: int | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: TopLogProbs | None = [] if sampling.top_log_probs else None
        self._versions: list[tuple[str, int]] = []
        self._sent = 0

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and what is generated so far, int64."""
        return np.concatenate([self.prompt, np.array(self.token_ids, dtype=np.int64)])

    def continues(self, token_id: int) -> bool:
        """Take the grammar one token on; False if its matcher refuses the token, and has failed."""
        return self.matcher is None or self.matcher.consume_token(token_id)

    def append(
        self, token_id: int, log_prob: float, version: str, top: list[tuple[int, float]] | None = None
    ) -> FinishReason | None:
        """Record a sampled token; say whether it ends the generation."""
        if not self._versions or self._versions[-1][0] != version:
            self._versions.append((version, len(self.token_ids)))
        self.token_ids.append(token_id)
        self.log_probs.append(log_prob)
        if self.top_log_probs is not None:
            self.top_log_probs.append(top or [])
        if token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(self.prompt) + len(self.token_ids) >= self.limit:
            return FinishReason.LENGTH
        return None

    def output(self, version: str, finish_reason: FinishReason | None = None) -> Output | None:
        """What the caller should get now, if anything.

        Called after each token of a stream and at the end, so a chunk never spans two weight versions.
        """
        if self.sink.streaming:
            start, self._sent = self._sent, len(self.token_ids)
            top = self.top_log_probs
            chunk = GenerationChunk(
                self.token_ids[start:],
                self.log_probs[start:],
                version,
                finish_reason,
                top_log_probs=None if top is None else top[start:],
                cached_tokens=self.cached_tokens or 0,
            )
            return Output(self.sink, chunk)
        if finish_reason is None:
            return None
        # a request that was aborted while it waited has sampled nothing, and no version
        ends = [start for _, start in self._versions[1:]] + [len(self.token_ids)] * bool(self._versions)
        spans = tuple(
            WeightSpan(name, start, end) for (name, start), end in zip(self._versions, ends, strict=True)
        )
        return Output(
            self.sink,
            Generation(
                self.token_ids,
                self.log_probs,
                finish_reason,
                spans,
                self.cached_tokens or 0,
                self.top_log_probs,
            ),
        )


def checked_prompt(request: GenerationRequest, vocab_size: int, context_length: int) -> np.ndarray:
    """Turn a request's prompt into int64 ids.

    Raises:
        ContextOverflowError: it leaves no room for a token.
        ConfigurationError: it is empty, or something in it is no id of the vocabulary.
    """
    check_room(request, context_length)
    ids = request.prompt_token_ids
    try:
        prompt = np.asarray(ids)
    except ValueError:  # nested, with ragged lengths
        prompt = np.zeros(0)
    if prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer):
        wrong = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
        where = int(wrong[0]) if len(wrong) else None
    else:  # integers beyond 64 bits end up here, too
        where = next((place for place, value in enumerate(ids) if not _is_id(value, vocab_size)), None)
    if where is not None:
        raise ConfigurationError(
            f"prompt_token_ids[{where}] is {ids[where]!r}; "
            f"an id must be an integer from 0 to {vocab_size - 1}"
        )
    return prompt.astype(np.int64)


def _is_id(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
