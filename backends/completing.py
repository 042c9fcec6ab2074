"""Completions: a prompt of text or ids, continued as it stands. No chat template, no items, no HTTP."""

from __future__ import annotations

import asyncio
import codecs
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

from backends.answers import answered, begun
from backends.engine import Generation, GenerationRequest, check_room
from backends.ids import new_id
from backends.log_probs import log_prob_entries
from backends.plan import MANY_CHARACTERS, sampling_params
from backends.policy import Policy
from backends.rendering.token_text import TokenText
from backends.requests import check_model, check_supported, invalid, stop_strings, wants_log_probs
from backends.sampled import Sampled, sample
from backends.snapshots import Snapshot
from backends.watches import StopWatch
from gym_sdk.schema import Message, OutputText, Response, ResponseRequest
from gym_sdk.tokens import CallTokens

__all__ = ["TEXT_OFFSET", "Completer", "CompletionRequest"]

TEXT_OFFSET = "text_offset"
"""The field of a log-prob entry that says after how many characters of the text its token stands."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One prompt to continue.

    Attributes:
        prompt: the prompt.
        settings: how to sample; its input is not looked at.
        echo: whether the text begins with the prompt.
        hides_special: whether special tokens are left out of the text.
        adds_special: whether a prompt of text gets the special tokens with which the tokenizer begins texts.
    """

    prompt: str | Sequence[int]
    settings: ResponseRequest
    echo: bool = False
    hides_special: bool = True
    adds_special: bool = True


class Completer:
    """Continues texts with a policy's engine. A completion is a response whose output is one message.

    Args:
        policy: whose engine generates, and whose figures count what it does.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._engine = policy.engine

    @property
    def _tokenizer(self) -> Any:
        return self._policy.renderer.tokenizer

    @cached_property
    def _token_text(self) -> TokenText:
        return TokenText(self._tokenizer)

    async def respond(self, request: CompletionRequest) -> Response:
        """Continue one prompt.

        Raises:
            PolicyError: it asks for something that cannot be done; `param` names the field, in the words of
                the Responses API.
            ContextOverflowError: the prompt leaves no room for a token.
            GymError: the engine failed.
        """
        run = await self._begin(request)
        if run.watch is None:
            generation = await self._engine.generate(run.asked)
        else:
            async with aclosing(sample(self._engine, run.asked, [run.watch])) as steps:
                generation = [sampled async for sampled in steps][-1].generation()
        return self._finish(run, generation)

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Snapshot, None]:
        """Continue one prompt as it is generated; errors are those of `respond`.

        Yields:
            A snapshot when the request was accepted, more while tokens come, and one with the whole response.
        """
        run = await self._begin(request)
        yield Snapshot(run.response)
        with self._policy.pacer.stream() as pace:
            watches = [] if run.watch is None else [run.watch]
            async with aclosing(sample(self._engine, run.asked, watches)) as steps:
                async for sampled in steps:
                    if sampled.finish_reason is None and pace.is_due:
                        with pace.look():
                            snapshot = Snapshot(run.response, [run.look(sampled)], open=True)
                        yield snapshot
        done = self._finish(run, sampled.generation())
        yield Snapshot(done, done.output, done=True)

    async def _begin(self, request: CompletionRequest) -> _Run:
        settings = request.settings
        check_model(settings.model, self._policy.name)
        check_supported(settings)
        ids = await self._encode(request)
        eos = self._tokenizer.eos_token_id
        stop_ids = self._policy.renderer.stop_token_ids if eos is None else frozenset({eos})
        asked = GenerationRequest(
            new_id("gen"),
            ids,
            sampling_params(settings, stop_token_ids=stop_ids),
            blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest(),
        )
        check_room(asked, self._engine.info.context_length)
        stops = stop_strings(settings)
        hidden = frozenset(self._tokenizer.all_special_ids) if request.hides_special else frozenset()
        text = _Text(self._token_text, hidden)
        prompt = request.prompt if isinstance(request.prompt, str) else text.of(ids)
        return _Run(
            asked=asked,
            response=begun(settings, model=self._policy.name),
            text=text,
            echo=prompt if request.echo else "",
            watch=StopWatch(stops, self._token_text) if stops else None,
            log_probs=wants_log_probs(settings),
        )

    async def _encode(self, request: CompletionRequest) -> list[int]:
        prompt, size = request.prompt, self._engine.info.vocab_size
        if isinstance(prompt, str):
            encode = partial(self._tokenizer.encode, prompt, add_special_tokens=request.adds_special)
            ids: list[int] = await asyncio.to_thread(encode) if len(prompt) > MANY_CHARACTERS else encode()
        else:
            ids = list(prompt)
            wrong = next((token_id for token_id in ids if not 0 <= token_id < size), None)
            if wrong is not None:
                raise invalid("input", f"holds an id that is none of this model's {size} ids")
        if not ids:
            raise invalid("input", "must have at least one token")
        return ids

    def _finish(self, run: _Run, generation: Generation) -> Response:
        ids = generation.token_ids
        tokens = CallTokens(
            list(run.asked.prompt_token_ids), ids, generation.log_probs, generation.weight_versions
        )
        item = run.whole(generation)
        response = answered(run.response, generation, [item], tokens).carrying(tokens)
        if run.watch is not None and (stop := run.watch.stop_of(len(ids))) is not None:
            response.stop_sequence = stop
        stats = self._policy.stats
        stats.responses += 1
        stats.prompt_tokens += tokens.prompt_length
        stats.cached_tokens += generation.cached_tokens
        stats.generated_tokens += len(ids)
        return response


@dataclass(frozen=True, slots=True)
class _Run:
    """One prompt that is being continued.

    Attributes:
        asked: what the engine is asked for.
        response: the response that was begun.
        text: reads the generation.
        echo: what the text begins with.
        watch: looks for stop strings, if there are any.
        log_probs: whether the text carries its tokens' log-probs.
    """

    asked: GenerationRequest
    response: Response
    text: _Text
    echo: str
    watch: StopWatch | None
    log_probs: bool

    def look(self, sampled: Sampled) -> Message:
        """Return what is certain of the text so far."""
        held = 0 if self.watch is None else self.watch.held_bytes
        size = self.text.size(sampled.token_ids) - held
        count = self.text.tokens_within(sampled.token_ids, size)
        text = self.text.of(sampled.token_ids, size, final=False)
        return self._message(
            text, sampled.token_ids[:count], sampled.log_probs[:count], sampled.top_log_probs[:count]
        )

    def whole(self, generation: Generation) -> Message:
        """Return the text of the whole generation, without the stop string."""
        match = None if self.watch is None else self.watch.match
        text = self.text.of(generation.token_ids, None if match is None else match.text_bytes)
        return self._message(text, generation.token_ids, generation.log_probs, generation.top_log_probs or [])

    def _message(
        self,
        text: str,
        ids: Sequence[int],
        log_probs: Sequence[float],
        top: Sequence[Sequence[tuple[int, float]]],
    ) -> Message:
        part = OutputText(text=self.echo + text)
        if self.log_probs:
            entries = log_prob_entries(self.text.token_text, ids, log_probs, top)
            offsets = self.text.offsets(ids)
            part.logprobs = [
                {**entry, TEXT_OFFSET: len(self.echo) + min(offset, len(text))}
                for entry, offset in zip(entries, offsets, strict=True)
            ]
        return Message(role="assistant", content=[part], id=self.response.id)


@dataclass(frozen=True, slots=True)
class _Text:
    """Reads ids as text, with some tokens hidden.

    Attributes:
        token_text: what the ids spell.
        hidden: the tokens that the text leaves out.
    """

    token_text: TokenText
    hidden: frozenset[int]

    def size(self, ids: Sequence[int]) -> int:
        """Return how many bytes the ids spell, hidden tokens included."""
        return sum([len(self.token_text.bytes_of(token_id)) for token_id in ids])

    def tokens_within(self, ids: Sequence[int], size: int) -> int:
        """Return how many of the tokens lie in the first `size` bytes."""
        for count, token_id in enumerate(ids):
            size -= len(self.token_text.bytes_of(token_id))
            if size < 0:
                return count
        return len(ids)

    def of(self, ids: Sequence[int], size: int | None = None, *, final: bool = True) -> str:
        """Return the text of the first `size` bytes, or of all.

        Args:
            ids: the tokens.
            size: in bytes, hidden tokens included.
            final: whether nothing follows; else the beginning of a character is left out.
        """
        pieces: list[bytes] = []
        for token_id in ids:
            piece = self.token_text.bytes_of(token_id)
            if size is not None:
                piece = piece[:size]
                size -= len(piece)
            if token_id not in self.hidden:
                pieces.append(piece)
        return _decoder().decode(b"".join(pieces), final)

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Return after how many whole characters of the text each token stands."""
        decoder, offset = _decoder(), 0
        offsets: list[int] = []
        for token_id in ids:
            offsets.append(offset)
            if token_id not in self.hidden:
                offset += len(decoder.decode(self.token_text.bytes_of(token_id)))
        return offsets


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
