"""A language model that scores rollouts, or compares two."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import TracebackType
from typing import Any, Self, TypeAlias

import anyio
from pydantic import ValidationError
from pydantic_core import to_json

from gym_sdk.errors import ConfigurationError, PolicyError, TransportError, VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.schema.items import as_items
from gym_sdk.transport import Retry, with_retries
from gym_sdk.verifiers.concurrent import run_together
from gym_sdk.verifiers.judge.endpoint import Endpoint
from gym_sdk.verifiers.judge.prompts import Prompt, Rubric
from gym_sdk.verifiers.judge.reading import Parse, choice, score
from gym_sdk.verifiers.judge.wire import Answer, Api, JudgeUsage, body_of, path_of, read_answer
from gym_sdk.verifiers.protocol import Verifier, named
from gym_sdk.verifiers.results import as_reward

__all__ = ["Judge", "JudgeOptions"]

_AnyRubric: TypeAlias = "str | Rubric | Callable[[Rollout], Prompt]"


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Limits of a judge, and what is sent with its requests.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    concurrency: int = 32
    """Judgements in flight, in one event loop. One that pauses before a retry keeps its place, so a server
    that is overloaded is left alone."""
    deadline_s: float = 60.0
    """One try of one request. Running out of it is retried like a lost connection."""
    retry: Retry = field(default_factory=Retry)
    """For requests that fail: connection, 408, 429, 5xx, no answer in time, an answer that is none."""
    asks: int = 3
    """How often the judge is asked, at most, until its answer can be read."""
    max_output_tokens: int | None = None
    """Most tokens of an answer; one that is cut there cannot be read."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further request fields, e.g. `{"temperature": 0.0}`; they win over the judge's own."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "deadline_s", "asks"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"JudgeOptions.{name} must be positive, not {getattr(self, name)}")


class Judge:
    """A language model that scores rollouts, behind any OpenAI-compatible endpoint.

    ```python
    async with Judge("http://localhost:8001/v1", "judge-model") as judge:
        helpful = judge.verifier("Is the answer correct and short?")
        async with client.rollouts(tasks, verifier=helpful, group_size=8) as stream: ...
    ```

    Without `async with` a judge works, too: its connections are open while at least one judgement is in
    flight in an event loop. `async with` keeps them open in between, which saves a handshake per judgement
    where judgements are rare.

    A judgement that fails is a `VerifierError`, which fails the rollout; it is never a low reward.

    Args:
        base_url: the API's root, ending in `/v1`.
        model: the judge's name there.
        api: which route to ask: `/responses`, or `/chat/completions`.
        api_key: sent as a bearer token.
        options: limits, retries, further fields.

    Raises:
        ConfigurationError: `base_url` is not an HTTP address, or there is no such API.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: Api = "responses",
        api_key: str | None = None,
        options: JudgeOptions | None = None,
    ) -> None:
        if api not in ("responses", "chat"):
            raise ConfigurationError(f'Judge: api must be "responses" or "chat", not {api!r}')
        self._options = options or JudgeOptions()
        self._model = model
        self._api: Api = api
        self._name = f"judge({model})"
        self._endpoint = Endpoint(
            base_url,
            api_key=api_key,
            headers=self._options.headers,
            concurrency=self._options.concurrency,
        )
        self._usage = JudgeUsage()

    @property
    def usage(self) -> JudgeUsage:
        """Totals so far, over all verifiers of this judge."""
        return replace(self._usage)

    async def __aenter__(self) -> Self:
        await self._endpoint.acquire()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._endpoint.release()

    def verifier(self, rubric: _AnyRubric, *, parse: Parse | None = None, votes: int = 1) -> Verifier:
        """Make a verifier.

        Args:
            rubric: what makes an answer good, in words; or a `Rubric`, which also says what the judge sees;
                or a function from the rollout to the whole prompt, which has to quote what the policy wrote
                (see `quote`) and to say how the judge shall answer. It runs on the event loop.
            parse: how the judge answers: `score(low, high)` (the default, 0 to 10), `choice`, `json_field`,
                or a function from its text to a reward. None or a `ValueError` says that a text cannot be
                read.
            votes: judgements of one rollout, made at the same time. The reward is their mean; the component
                `vote_spread` is the difference of the largest and the smallest.

        Raises:
            ConfigurationError: `votes` is less than 1.
        """
        if votes < 1:
            raise ConfigurationError(f"Judge.verifier: votes must be at least 1, not {votes}")
        reads = score() if parse is None else parse
        asks = str(getattr(reads, "asks", ""))
        rubric = Rubric(rubric) if isinstance(rubric, str) else rubric

        async def verify(rollout: Rollout) -> Reward:
            prompt = rubric.prompt(rollout, asks) if isinstance(rubric, Rubric) else rubric(rollout)
            vote = functools.partial(self._judge, prompt, reads, f"rollout {rollout.id}")
            return _mean(await run_together([vote] * votes))

        verifier = named(self._name, verify)
        # what `cached` adds to its key: two rubrics of one judge must not share an entry
        verifier.fingerprint = self._fingerprint(rubric, asks, votes)  # type: ignore[attr-defined]
        return verifier

    def compare(
        self, rubric: str | Rubric, *, parse: Parse | None = None
    ) -> Callable[[Rollout, Rollout], Awaitable[float]]:
        """Make a function that compares two rollouts of one task, for `pairwise`.

        It returns 1.0 if the first is better, 0.0 if the second is, 0.5 for a tie. Judges favour a place:
        `Pairing(both_orders=True)` evens that out.

        Args:
            rubric: what makes an answer better.
            parse: how the judge answers; by default `choice({"A": 1.0, "B": 0.0, "tie": 0.5})`.
        """
        reads = choice({"A": 1.0, "B": 0.0, "tie": 0.5}) if parse is None else parse
        asks = str(getattr(reads, "asks", ""))
        chosen = Rubric(rubric) if isinstance(rubric, str) else rubric

        async def compare(a: Rollout, b: Rollout) -> float:
            prompt = chosen.comparison(a, b, asks)
            return (await self._judge(prompt, reads, f"rollouts {a.id} and {b.id}")).value

        compare.__name__ = compare.__qualname__ = self._name
        return compare

    async def _judge(self, prompt: Prompt, parse: Parse, what: str) -> Reward:
        """Ask until an answer can be read.

        Raises:
            VerifierError: the judge cannot be reached, refuses, or does not answer as it was asked to.
        """
        try:
            items = as_items(prompt)
        except ValidationError as error:
            raise self._error(what, f"the prompt holds something that is no item: {error}") from error
        body = to_json(
            body_of(self._api, self._model, items, self._options.max_output_tokens, self._options.fields)
        )
        reason = ""
        for _ in range(self._options.asks):
            answer = await self._ask(body, what)
            try:
                reward = self._read(answer, parse)
            except ValueError as error:
                self._usage.unreadable += 1
                reason = f"{error}; it ended in {answer.text[-200:]!r}"
            else:
                self._usage.judgements += 1
                return reward
        raise self._error(what, f"no answer of {self._options.asks} could be read: {reason}")

    def _read(self, answer: Answer, parse: Parse) -> Reward:
        if answer.cut:
            raise ValueError("the answer was cut")
        result = parse(answer.text)
        if result is None:
            raise ValueError("the answer is not of the form that was asked for")
        return as_reward(result, self._name)

    async def _ask(self, body: bytes, what: str) -> Answer:
        """Send one request, as often as `Retry` allows, and return the answer."""
        limit_s, path = self._options.deadline_s, path_of(self._api)
        url = f"{self._endpoint.base_url}{path}"
        tries = 0
        async with self._endpoint.slot() as transport:

            async def once() -> Answer:
                nonlocal tries
                tries += 1
                with anyio.move_on_after(limit_s):
                    return read_answer(self._api, url, await transport.post(path, body))
                raise TransportError(f"no answer from {url} within {limit_s:g} s", retryable=True)

            try:
                answer, _ = await with_retries(once, self._options.retry)
            except (TransportError, PolicyError) as error:
                raise self._error(what, f"{error} (tries: {tries})") from error
            finally:
                self._usage.retries += max(0, tries - 1)
        self._usage.input_tokens += answer.input_tokens
        self._usage.output_tokens += answer.output_tokens
        return answer

    def _error(self, what: str, reason: str) -> VerifierError:
        return VerifierError(f"{self._name} gave no judgement of {what}: {reason}", verifier=self._name)

    def _fingerprint(self, rubric: Rubric | Callable[[Rollout], Prompt], asks: str, votes: int) -> str:
        said = repr(rubric) if isinstance(rubric, Rubric) else getattr(rubric, "__qualname__", "")
        fields = json.dumps(dict(self._options.fields), sort_keys=True, default=repr)
        return blake2b(repr((said, asks, votes, fields)).encode(), digest_size=8).hexdigest()


def _mean(votes: Sequence[Reward]) -> Reward:
    """The mean of several judgements; a component's mean is over those that have it."""
    if len(votes) == 1:
        return votes[0]
    values = [vote.value for vote in votes]
    by_name: dict[str, list[float]] = {}
    for vote in votes:
        for name, value in vote.components.items():
            by_name.setdefault(name, []).append(value)
    components = {name: math.fsum(found) / len(found) for name, found in by_name.items()}
    components["vote_spread"] = max(values) - min(values)
    return Reward(value=math.fsum(values) / len(values), components=components)
