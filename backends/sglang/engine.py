"""The engine over a running SGLang: the protocol on one side, SGLang's native HTTP API on the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self

from backends.engine import (
    EngineInfo,
    FinishReason,
    FolderWeights,
    Generation,
    GenerationChunk,
    GenerationRequest,
    PauseMode,
    WeightSource,
)
from backends.sglang.answer import Answer, read_answer
from backends.sglang.client import SGLangClient
from backends.sglang.config import SGLangConfig
from backends.sglang.control import Control
from backends.sglang.facts import Facts, check_log_probs, learn
from backends.sglang.flight import Flight, Flights, chunks
from backends.sglang.request import check_prompt, check_sampling, generate_body
from gym_sdk.errors import ConfigurationError, GymError, TransportError

__all__ = ["SGLangEngine"]

_CLOSE_S = 5.0


class SGLangEngine:
    """Generates from the policy that a running SGLang serves, exact to the token.

    Make it by `connect`, in the event loop that uses it; use it as `async with`, or call `aclose`, which
    leaves SGLang running. Other clients may use the same server; only their pauses and weight updates concern
    this engine's requests. What SGLang would ignore or answer otherwise is refused by name: a seed, unless it
    runs with `--enable-deterministic-inference`, and temperatures between 0 and 1e-6.

    Lost connections raise `TransportError(retryable=True)`: the request may be sent again. The engine itself
    sends again only what reached nobody.
    """

    def __init__(self, client: SGLangClient, facts: Facts) -> None:
        self.facts = facts
        self._client = client
        self._flights = Flights(client)
        self._control = Control(client, facts, self._flights)
        self._closed = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        model: str | Path | None = None,
        api_key: str | None = None,
        config: SGLangConfig | None = None,
        diagnose: Callable[[], str | None] | None = None,
    ) -> Self:
        """Connect to a running SGLang, and see that it keeps the token contract.

        Args:
            url: the server's root.
            model: folder of the model, for the vocabulary's size; by default the one that SGLang names, which
                must then be visible from here.
            api_key: the server's `--admin-api-key` or `--api-key`.
            config: deadlines.
            diagnose: says why the server is gone, if the caller knows (`SGLangProcess.diagnosis`).

        Raises:
            ConfigurationError: it is no SGLang, of an unsupported version, or started with options under
                which its tokens or log-probs are not the policy's.
            TransportError: it does not answer.
            DeadlineError: it does not answer in time; it may be paused.
        """
        client = SGLangClient(url, api_key=api_key, config=config, diagnose=diagnose)
        try:
            facts = await learn(client, model=model)
            await check_log_probs(client, facts.vocab_size - 1)
        except BaseException:
            await client.aclose()
            raise
        return cls(client, facts)

    @property
    def info(self) -> EngineInfo:
        """Sizes, the current weight version, and this engine's own load."""
        waiting = sum(flight.gated for flight in self._flights)
        return EngineInfo(
            vocab_size=self.facts.vocab_size,
            context_length=self.facts.context_length,
            weight_version=self._control.version,
            running=len(self._flights) - waiting,
            waiting=waiting,
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate to the end; cancelling the call aborts the request.

        Raises:
            ContextOverflowError: the prompt leaves no room for a token.
            ConfigurationError: an id is outside the vocabulary, or the request id is in use.
            PolicyError: SGLang cannot do what the request asks for.
            TransportError: SGLang is gone, or cannot take the request now.
            TokenContractError: its answer contradicts itself.
            DeadlineError: it did not answer within `SGLangConfig.generate_s`.
        """
        flight = self._admit(request)
        try:
            while flight.finish_reason is None:
                answer = await flight.wait(self._answer(flight))
                if answer is not None:
                    self._take(flight, answer)
            return flight.generation()
        finally:
            self._flights.remove(flight)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Generate and yield chunks as they are sampled; raises as `generate` does.

        SGLang tells which weights sampled which token at the end of a request only. From an update of the
        weights on, a stream therefore yields nothing before its end, and likewise where SGLang was started
        with `--incremental-streaming-output`.
        """
        flight = self._admit(request)
        sent = 0
        try:
            while flight.finish_reason is None:
                before = len(flight.token_ids)
                async with aclosing(self._answers(flight)) as answers:
                    while (answer := await flight.wait(anext(answers, None))) is not None:
                        if answer.finish_reason is not None:
                            self._take(flight, answer)
                            break
                        new, scores = answer.token_ids[sent - before :], answer.log_probs[sent - before :]
                        if new and answer.version == flight.version:
                            sent += len(new)
                            yield GenerationChunk(new, scores, answer.version)
                for chunk in chunks(flight, sent):
                    sent += len(chunk.token_ids)
                    yield chunk
        finally:
            self._flights.remove(flight)

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all of this engine; return how many. They end with `FinishReason.ABORT`.

        One that SGLang has paused `in_place` ends when it continues.
        """
        return self._flights.abort(request_id)

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop sampling when this returns; new requests wait until `continue_generation`.

        Other clients of the same SGLang are paused, too; `abort` ends this engine's requests alone.

        Raises:
            ConfigurationError: there is no such mode.
            TransportError: SGLang does not answer.
        """
        await self._control.pause(mode)

    async def continue_generation(self) -> None:
        """Resume after `pause`; without effect if not paused."""
        await self._control.resume()

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        """Replace the weights between two sampling steps, and flush every cache of the old ones.

        Generation stands still while SGLang reads the folder, which both sides must see under the same path.
        Whatever happens, it continues afterwards, unless it was paused before.

        Raises:
            CheckpointError: the folder is damaged or of another model; the old weights keep serving.
            ConfigurationError: the source is no folder.
            TransportError: SGLang does not answer.
            GymError: the old weights could not be brought back.
        """
        if not isinstance(source, FolderWeights):
            raise ConfigurationError(
                "this engine takes weights from a folder that SGLang sees (FolderSync), not tensors"
            )
        await self._control.update(source.path.absolute(), version)

    async def aclose(self) -> None:
        """Abort this engine's requests and close its connections; SGLang keeps running."""
        self._closed = True
        self._flights.abort(None)
        await self._flights.ended(list(self._flights), _CLOSE_S)
        for flight in self._flights:
            flight.end_here()
        await self._flights.aclose()
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _admit(self, request: GenerationRequest) -> Flight:
        if self._closed:
            raise GymError("the engine is closed")
        length, sampling = self.facts.context_length, request.sampling
        prompt = check_prompt(request, vocab_size=self.facts.vocab_size, context_length=length)
        check_sampling(sampling, seeded=self.facts.seeded)
        limit = length - len(prompt)
        if sampling.max_new_tokens is not None:
            limit = min(limit, sampling.max_new_tokens)
        flight = Flight(
            request,
            prompt,
            limit=limit,
            version=self._control.version,
            epoch=self._control.epoch,
            gated=self._control.closed,
        )
        self._flights.add(flight)
        return flight

    def _body(self, flight: Flight, *, stream: bool) -> dict[str, object]:
        prompt = flight.begin_round()
        return generate_body(
            prompt,
            flight.request.sampling,
            rid=flight.rid,
            max_new_tokens=flight.room,
            seeded=self.facts.seeded,
            stream=stream,
        )

    async def _answer(self, flight: Flight) -> Answer:
        """Have one round generated."""
        body = self._body(flight, stream=False)
        with flight.settling():
            answer = await self._client.post("/generate", body, within_s=self._client.config.generate_s)
        flight.settled = True
        return read_answer(answer, vocab_size=self.facts.vocab_size)

    async def _answers(self, flight: Flight) -> AsyncGenerator[Answer, None]:
        """Yield the answers of one round, the last of which has a finish reason."""
        if self.facts.incremental:
            yield await self._answer(flight)
            return
        body = self._body(flight, stream=True)
        with flight.settling():
            async with aclosing(self._client.events("/generate", body)) as events:
                async for event in events:
                    yield read_answer(event, vocab_size=self.facts.vocab_size)
            raise TransportError("SGLang's stream ended before the generation did", retryable=True)

    def _take(self, flight: Flight, answer: Answer) -> None:
        flight.add(answer)
        if flight.epoch == self._control.epoch and answer.finish_reason is not FinishReason.ABORT:
            # somebody else may have replaced the weights
            self._control.version = answer.version
