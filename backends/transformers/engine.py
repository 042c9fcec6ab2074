"""The embedded engine: the asyncio face of continuous batching in this process."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from llguidance import LLMatcher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backends.engine import (
    EngineInfo,
    Generation,
    GenerationChunk,
    GenerationRequest,
    PauseMode,
    WeightSource,
)
from backends.grammars import Grammars
from backends.transformers.aside import aside
from backends.transformers.config import EngineConfig
from backends.transformers.delivery import ChunkSink, LoopSink, ResultSink, deliver
from backends.transformers.loading import load_model
from backends.transformers.masks import Masks
from backends.transformers.request import Output, RequestState, checked_prompt
from backends.transformers.scheduler import Scheduler
from backends.transformers.support import check_context_length, supported_module, vocabulary
from backends.transformers.weights import WeightStage
from backends.transformers.worker import Worker
from gym_sdk.errors import ConfigurationError, GymError

__all__ = ["TransformersEngine"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class TransformersEngine:
    """Generates from a transformers causal language model in this process, on CPU or CUDA.

    Requests join and leave the batch at any step. The forward passes run in a thread of the engine's own,
    which starts with the first request; any number of engines may live in one process and in one event
    loop, a notebook's included. Use it as `async with`, or call `aclose`.

    The engine runs a second module over *the same parameters* as `model`: nothing is copied, and a trainer
    that changes `model` in place changes what the engine samples from. That is safe between `pause` and
    `continue_generation`, followed by an update that carries no tensors::

        await engine.pause()
        optimizer.step()
        await engine.update_weights(TensorWeights({}), version="7")
        await engine.continue_generation()

    `model`'s mode, gradients and configuration stay the trainer's own. An update that does carry tensors
    writes them into the shared parameters; give the engine `copy.deepcopy(model)` where that is not wanted.
    Replacing `model`'s parameter objects (`model.to(...)`, sharding) ends the sharing.

    A seeded request repeats its samples whatever runs beside it, as far as the hardware computes the same
    logits in batches of different sizes: a token changes only where its uniform number falls within
    rounding of a boundary.

    Args:
        model: a causal language model with standard attention.
        config: limits.
        weight_version: the label of the model's present weights.
        tokenizer: the model's, or its folder, to read grammars by; None: requests with a grammar are refused.

    Raises:
        ConfigurationError: the model's architecture or context cannot be served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: EngineConfig | None = None,
        weight_version: str = "0",
        tokenizer: PreTrainedTokenizerBase | Path | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._context_length = check_context_length(model, self.config)
        self._vocab_size = vocabulary(model)
        self._grammars = Grammars(tokenizer, self._vocab_size)
        self._scheduler = Scheduler(
            aside(lambda: supported_module(model)),
            self.config,
            Masks(self._grammars, self._vocab_size),
            context_length=self._context_length,
            version=weight_version,
        )
        self._requests: dict[str, RequestState] = {}
        self._worker = Worker(self._scheduler, deliver=deliver, broken=_Breaker(self._requests))
        self._update_lock = asyncio.Lock()
        # an engine that is dropped without `aclose` must not leave a thread running at exit
        self._finalizer = weakref.finalize(self, _stop, self._worker)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        weight_version: str = "0",
    ) -> Self:
        """Load a model from a folder in the Hugging Face layout.

        It blocks while it reads; in an event loop, call it by `asyncio.to_thread`.

        Args:
            path: the folder, with `config.json` and safetensors; its tokenizer reads grammars.
            device: None: CUDA if there is one, else the CPU.
            dtype: None: float32 on the CPU, bfloat16 on CUDA.
            config: limits.
            weight_version: the label of these weights.

        Raises:
            CheckpointError: there is no usable model in the folder.
            ConfigurationError: the model's architecture or context cannot be served.
        """
        folder = Path(path)
        model = aside(lambda: load_model(folder, device=device, dtype=dtype))
        return cls(model, config=config, weight_version=weight_version, tokenizer=folder)

    @property
    def info(self) -> EngineInfo:
        """Sizes, the current weight version and the load."""
        running, error = len(self._scheduler.running), self._worker.error
        return EngineInfo(
            vocab_size=self._vocab_size,
            context_length=self._context_length,
            weight_version=self._scheduler.version,
            running=running,
            waiting=max(0, len(self._requests) - running),
            problem=None if error is None else f"the engine broke: {type(error).__name__}: {error}",
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate to the end; cancelling the call aborts the request.

        Raises:
            ContextOverflowError: the prompt leaves no room for a token.
            ConfigurationError: an id is outside the vocabulary, or the request id is in use.
            PolicyError: the grammar is invalid, allows no further token, or there is no tokenizer to read it.
            GymError: the engine is closed or broke.
        """
        matcher = await self._matcher(request.sampling.grammar)
        sink = ResultSink()
        state = self._submit(request, sink, matcher)
        try:
            return await sink.future
        finally:
            self._forget(state, ended=sink.future.done() and not sink.future.cancelled())

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Generate and yield chunks as they are sampled; raises as `generate` does."""
        matcher = await self._matcher(request.sampling.grammar)
        sink = ChunkSink()
        state = self._submit(request, sink, matcher)
        ended = False
        try:
            while not ended:
                chunk = await sink.next()
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self._forget(state, ended=ended)

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many. They end with `FinishReason.ABORT`."""
        names = list(self._requests) if request_id is None else [request_id]
        states = [self._requests[name] for name in names if name in self._requests]
        if not states:
            return 0

        def command() -> int:
            ended = [output for state in states for output in self._scheduler.abort(state)]
            deliver(ended)
            return len(ended)

        return await self._call(command)

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop sampling when this returns; new requests wait until `continue_generation`.

        Args:
            mode: `abort` ends what runs; `retract` frees its cache and recomputes it afterwards; `in_place`
                keeps the cache.

        Raises:
            ConfigurationError: there is no such mode.
        """
        if mode not in ("abort", "retract", "in_place"):
            raise ConfigurationError(f"pause mode must be abort, retract or in_place, not {mode!r}")

        def command() -> None:
            self._worker.paused = True
            deliver(self._scheduler.pause(mode))

        await self._call(command)

    async def continue_generation(self) -> None:
        """Resume after `pause`; without effect if not paused."""

        def command() -> None:
            self._worker.paused = False

        await self._call(command)

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        """Replace the weights between two sampling steps, and flush every cache of the old ones.

        The source is read and checked while generation goes on; nothing is touched before it is known to
        fit. `TensorWeights({})` says that the shared parameters have been changed in place.

        Raises:
            CheckpointError: the source is damaged or of another model.
            GymError: the engine is closed or broke.
        """
        scheduler = self._scheduler
        async with self._update_lock:
            stage = await asyncio.to_thread(aside, lambda: WeightStage(scheduler.module, source))

            def command() -> None:
                stage.apply()
                scheduler.version = version
                scheduler.retract()

            await self._call(command)
        logger.debug("weights are now of version %s", version)

    async def aclose(self) -> None:
        """Abort everything and free the engine; its requests end with `FinishReason.ABORT`.

        Raises:
            GymError: the step in progress did not end within `EngineConfig.close_timeout_s`.
        """
        self._worker.close()
        seconds = self.config.close_timeout_s
        if not await asyncio.to_thread(self._worker.join, seconds):
            error = GymError(f"the engine's step thread did not end within {seconds:g} s")
            _Breaker(self._requests)(error)
            raise error
        self._finalizer.detach()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _matcher(self, grammar: str | None) -> LLMatcher | None:
        return None if grammar is None else await self._grammars.matcher(grammar)

    def _submit(self, request: GenerationRequest, sink: LoopSink, matcher: LLMatcher | None) -> RequestState:
        prompt = checked_prompt(request, self._vocab_size, self._context_length)
        if request.request_id in self._requests:
            raise ConfigurationError(f"request id {request.request_id!r} is in use")
        limit = self._context_length
        if request.sampling.max_new_tokens is not None:
            limit = min(limit, len(prompt) + request.sampling.max_new_tokens)
        state = RequestState(request, prompt, limit, sink, matcher)
        # known before it is posted: if the step thread breaks in between, it is failed with the others
        self._requests[request.request_id] = state
        try:
            self._worker.post(lambda: self._scheduler.add(state))
        except GymError:
            del self._requests[request.request_id]
            raise
        return state

    def _forget(self, state: RequestState, *, ended: bool) -> None:
        if self._requests.get(state.request_id) is state:
            del self._requests[state.request_id]
        if not ended:
            try:
                self._worker.post(lambda: self._scheduler.abort(state))
            except GymError:
                logger.debug("request %s ended with the engine", state.request_id)

    async def _call(self, command: Callable[[], _T]) -> _T:
        return await asyncio.wrap_future(self._worker.call(command))


class _Breaker:
    """Fails every request in flight when the step thread breaks, so that nobody waits for ever."""

    def __init__(self, requests: dict[str, RequestState]) -> None:
        self._requests = requests

    def __call__(self, error: BaseException) -> None:
        outputs = []
        for state in list(self._requests.values()):
            failure = GymError(f"the engine broke: {type(error).__name__}: {error}")
            failure.__cause__ = error
            outputs.append(Output(state.sink, failure))
        deliver(outputs)


def _stop(worker: Worker) -> None:
    worker.close()
    worker.join(5.0)
