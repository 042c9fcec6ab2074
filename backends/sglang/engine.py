"""The engine over a running SGLang: the protocol on one side, SGLang's native HTTP API on the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backends.engine import (
    AdapterWeights,
    BroadcastWeights,
    EngineInfo,
    FinishReason,
    FolderWeights,
    Generation,
    GenerationChunk,
    GenerationRequest,
    PauseMode,
    TensorWeights,
    WeightsGroup,
    WeightSource,
)
from backends.grammars import Grammars
from backends.sglang.answer import Answer, read_answer
from backends.sglang.client import SGLangClient
from backends.sglang.config import SGLangConfig
from backends.sglang.control import Control
from backends.sglang.facts import Facts, check_log_probs, learn
from backends.sglang.flight import Flight, Flights, chunks, new_chunk
from backends.sglang.request import check_prompt, check_sampling, generate_body, reports
from backends.sglang.rescoring import check_spelled, rescore
from backends.sglang.weights.adapters import Adapters
from backends.sglang.weights.carriers import BroadcastCarrier, Carrier, FolderCarrier, TensorCarrier
from backends.sglang.weights.groups import Groups
from gym_sdk.errors import GymError, PolicyError, TransportError
from gym_sdk.schema.weights import WEIGHTS_GROUP_UNKNOWN

__all__ = ["SGLangEngine"]

_CLOSE_S = 5.0


class SGLangEngine:
    """Generates from the policy that a running SGLang serves, exact to the token.

    Make it by `connect`, in the event loop that uses it; use it as `async with`, or call `aclose`, which
    leaves SGLang running. Other clients may use the same server; only their pauses and weight updates concern
    this engine's requests. What SGLang would ignore or answer otherwise is refused by name: a seed, unless it
    runs with `--enable-deterministic-inference`; temperatures between 0 and 1e-6; a grammar, unless it runs
    with `--grammar-backend llguidance` and the temperature is 0 or 1.

    New weights come as a folder, as tensors, by broadcast in a process group, or as a LoRA adapter on top of
    the present ones. If an update fails in the middle and the old weights cannot be brought back, `unfit`
    says so, and nothing is sampled until an update succeeds. An adapter belongs to the engine that loaded
    it: others on the same server go on with the base model.

    Lost connections raise `TransportError(retryable=True)`: the request may be sent again. The engine itself
    sends again only what reached nobody.
    """

    def __init__(self, client: SGLangClient, facts: Facts) -> None:
        self.facts = facts
        self._client = client
        self._flights = Flights(client)
        self._adapters = Adapters(client, facts, self._flights)
        self._control = Control(client, facts, self._flights, self._adapters)
        self._groups = Groups(client, facts)
        self._grammars = Grammars(facts.tokenizer, facts.vocab_size)
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
            problem=self.unfit,
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
            await self._complete(flight)
            return flight.generation()
        finally:
            self._leave(flight)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Generate and yield chunks as they are sampled; raises as `generate` does.

        SGLang tells which weights sampled which token at the end of a request only. From an update of the
        weights on, a stream therefore yields nothing before its end, and likewise where SGLang was started
        with `--incremental-streaming-output` or the request has a grammar.
        """
        flight = self._admit(request)
        sent = 0
        try:
            if request.sampling.grammar is not None:
                await self._complete(flight)
                for chunk in chunks(flight, sent):
                    yield chunk
            while flight.finish_reason is None:
                before = len(flight.token_ids)
                async with aclosing(self._answers(flight)) as answers:
                    while (answer := await flight.wait(anext(answers, None))) is not None:
                        if answer.finish_reason is not None:
                            self._take(flight, answer)
                            break
                        if answer.version == flight.version and len(answer.token_ids) > sent - before:
                            chunk = new_chunk(flight, answer, sent - before)
                            sent += len(chunk.token_ids)
                            yield chunk
                for chunk in chunks(flight, sent):
                    sent += len(chunk.token_ids)
                    yield chunk
        finally:
            self._leave(flight)

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

    @property
    def unfit(self) -> str | None:
        """Why SGLang's weights may not be sampled from; None if they may."""
        return self._control.unfit

    @property
    def ranks(self) -> int:
        """How many ranks SGLang takes in a process group."""
        return self.facts.ranks

    async def join_group(self, group: WeightsGroup) -> None:
        """Join a group whose rank 0 is listening already; return when all ranks are there.

        Raises:
            ConfigurationError: SGLang is divided in a way in which it takes no broadcasts, or the group has
                no room for its ranks.
            PolicyError: it did not come together.
            TransportError: SGLang does not answer.
            DeadlineError: it did not come together within `SGLangConfig.control_s`.
        """
        await self._groups.join(group)

    async def leave_group(self, name: str) -> None:
        """Leave a group; without effect on one that SGLang does not know (any more)."""
        await self._groups.leave(name)

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        """Replace the weights between two sampling steps, and flush every cache of the old ones.

        Names, types and shapes are compared with the model's before anything is touched. Generation stands
        still while full weights are on their way, and continues afterwards, whatever happens, unless it was
        paused before. Another update waits until this one is over.

        An adapter pauses nothing: new requests are sampled with it, running ones finish with what they began
        with. Full weights drop it; generations on it then end by a retryable `TransportError`.

        Args:
            source: a folder that SGLang sees under the same path; tensors; a broadcast in a group that was
                joined; or an adapter's folder, which SGLang sees, too.
            version: labels the tokens that these weights sample.

        Raises:
            CheckpointError: the source is damaged or of another model; the old weights keep serving.
            ConfigurationError: SGLang takes no such source.
            PolicyError: the group is not known (`weights_group_unknown`); nothing has happened.
            TransportError: SGLang does not answer; the message says which weights serve.
            DeadlineError: it took longer than `SGLangConfig.update_s`; likewise.
            GymError: the old weights could not be brought back; see `unfit`.
        """
        match source:
            case FolderWeights():
                carrier: Carrier = FolderCarrier(self._client, self.facts, source.path.absolute())
            case TensorWeights():
                carrier = TensorCarrier(self._client, self.facts, source)
            case BroadcastWeights():
                await self._broadcast(source, version)
                return
            case AdapterWeights():
                await self._control.adapt(source.path.absolute(), version)
                return
        await self._control.update(carrier, version)

    async def aclose(self) -> None:
        """Abort this engine's requests and close its connections; SGLang keeps running."""
        self._closed = True
        self._flights.abort(None)
        await self._flights.ended(list(self._flights), _CLOSE_S)
        for flight in self._flights:
            flight.end_here()
        await self._flights.aclose()
        await self._adapters.aclose()
        await self._client.aclose()

    async def drop(self, error: GymError) -> None:
        """Close at once, where SGLang is lost: what is in flight ends with this error."""
        self._closed = True
        self._flights.fail(error)
        await self._flights.ended(list(self._flights), _CLOSE_S)
        await self._client.aclose()
        await self._flights.aclose()
        await self._adapters.aclose()

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
        self._control.check_fit()
        length, sampling = self.facts.context_length, request.sampling
        prompt = check_prompt(request, vocab_size=self.facts.vocab_size, context_length=length)
        check_sampling(sampling, seeded=self.facts.seeded, grammar_backend=self.facts.grammar_backend)
        limit = length - len(prompt)
        if sampling.max_new_tokens is not None:
            limit = min(limit, sampling.max_new_tokens)
        flight = Flight(
            request,
            prompt,
            limit=limit,
            version=self._control.version,
            epoch=self._control.epoch,
            adapter=self._adapters.current,
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
            adapter=None if flight.adapter is None else flight.adapter.name,
        )

    def _read(self, flight: Flight, body: Mapping[str, Any]) -> Answer:
        sampling = flight.request.sampling
        answer = read_answer(body, vocab_size=self.facts.vocab_size, reported=reports(sampling))
        return answer if flight.adapter is None else flight.adapter.relabelled(answer)

    async def _answer(self, flight: Flight) -> Answer:
        """Have one round generated."""
        await flight.opened(self._client.config.generate_s)
        body = self._body(flight, stream=False)
        with flight.settling():
            answer = await self._client.post("/generate", body, within_s=self._client.config.generate_s)
        flight.settled = True
        return self._read(flight, answer)

    async def _complete(self, flight: Flight) -> None:
        """Have a generation made to its end."""
        grammar, matcher = flight.request.sampling.grammar, None
        if grammar is not None and self.facts.tokenizer is not None:
            matcher = await self._grammars.matcher(grammar)
        while flight.finish_reason is None:
            answer = await flight.wait(self._answer(flight))
            if answer is not None:
                self._take(flight, answer)
        if matcher is not None:
            check_spelled(flight, matcher)
        if grammar is not None:
            await rescore(self._client, flight, self._read)

    async def _answers(self, flight: Flight) -> AsyncGenerator[Answer, None]:
        """Yield the answers of one round, the last of which has a finish reason."""
        if self.facts.incremental:
            yield await self._answer(flight)
            return
        await flight.opened(self._client.config.generate_s)
        body = self._body(flight, stream=True)
        with flight.settling():
            async with aclosing(self._client.events("/generate", body)) as events:
                async for event in events:
                    yield self._read(flight, event)
            raise TransportError("SGLang's stream ended before the generation did", retryable=True)

    def _take(self, flight: Flight, answer: Answer) -> None:
        flight.add(answer)
        if answer.finish_reason is not FinishReason.ABORT:
            self._control.noticed(flight, answer)

    def _leave(self, flight: Flight) -> None:
        self._flights.remove(flight)
        self._adapters.sweep()

    async def _broadcast(self, source: BroadcastWeights, version: str) -> None:
        self._groups.check(source.group)
        try:
            await self._control.update(BroadcastCarrier(self._client, self.facts, source), version)
        except PolicyError as error:
            if error.code == WEIGHTS_GROUP_UNKNOWN:
                self._groups.forget(source.group)
            raise
