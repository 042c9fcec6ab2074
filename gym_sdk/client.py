"""The client: one policy to talk to, and rollouts from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import anyio

from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, DeadlineError
from gym_sdk.rollout import (
    Collection,
    Deadlines,
    DynamicSampling,
    Limits,
    Retry,
    RolloutStream,
    Sampling,
    Schedule,
    Staleness,
    StreamOptions,
    TaskSource,
    WeightClock,
)
from gym_sdk.rollout.run import run_rollout
from gym_sdk.rollout.source import as_task
from gym_sdk.rollout.spec import Gates, RolloutSpec
from gym_sdk.schema import Response, ResponseRequest, Rollout, Task, TokenForm, as_items
from gym_sdk.tools import ToolLike, resolve_tools
from gym_sdk.trackers import Tracker
from gym_sdk.transport import (
    Breaker,
    Dispatch,
    ReplicaHealth,
    Replicas,
    ServingTransport,
    Transport,
)
from gym_sdk.updates import WeightUpdates
from gym_sdk.verifiers import Verifier

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from gym_sdk.capture import CaptureSession

__all__ = ["API_KEY_VARIABLE", "GymClient"]

API_KEY_VARIABLE = "GYM_SDK_API_KEY"
"""The environment variable with the key that servers ask for and clients send."""


class GymClient(WeightUpdates):
    """A policy behind an OpenAI-compatible server, or in this process (`GymClient.local`).

    Use it as `async with GymClient(...) as client`; leaving the context closes its connections, or its
    engine. Any number of clients live in one event loop.

    Args:
        base_url: the server's API root, e.g. `http://localhost:8000/v1`; or those of several replicas, over
            which calls are spread. The rollouts of a group stay on one of them as long as it is well.
        model: the model's name on that server.
        api_key: sent as a bearer token; by default what the environment variable `GYM_SDK_API_KEY` holds.
        headers: sent with every request.
        retry: how infrastructure failures are tried again.
        breaker: when a replica that fails is left alone, and how long calls wait for one.
        token_form: how rollouts ask for their tokens. `compact` moves each token once, and needs a server of
            this project; others answer in their own form, which is understood as well.

    Raises:
        ConfigurationError: `base_url` is not an HTTP address, or two replicas have the same.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry: Retry | None = None,
        breaker: Breaker | None = None,
        token_form: TokenForm = "compact",
    ) -> None:
        from gym_sdk.transport.http import http_transports

        self._api_key = api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        transports = http_transports(urls, api_key=api_key, headers=headers)
        self._base_url: str | None = urls[0]
        self._setup(transports, model, token_form, retry, breaker)

    @classmethod
    def local(
        cls,
        model: str | Path | None = None,
        *,
        name: str = "policy",
        device: str | None = None,
        dtype: str | None = None,
        context_length: int | None = None,
        retry: Retry | None = None,
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> GymClient:
        """Return a client with an embedded engine, for notebooks and tests.

        Args:
            model: folder in the Hugging Face layout, or a name on the hub; None takes the tiny policy, which
                is made on this machine the first time (about a minute) and cached.
            name: the model's name in responses.
            device: where it runs; a GPU if there is one, by default.
            dtype: number type of the weights, e.g. `bfloat16`.
            context_length: most tokens of prompt and generation; the model's own limit by default.
            retry: how infrastructure failures are tried again.
            progress: told what the tiny policy's making is at, and the share that is done.
            **options: further fields of `backends.loading.PolicyConfig`, e.g.
                `rendering=RenderingConfig(thinking="template")`, or `backend="sglang"`, which launches SGLang
                instead, or connects to it (`sglang=SGLangOptions(...)`).
        """
        from gym_sdk.transport.local import LocalTransport

        options |= {"device": device, "dtype": dtype, "context_length": context_length}
        transport = LocalTransport(model, name=name, progress=progress, **options)
        return cls.over(transport, model=name, retry=retry)

    @classmethod
    def over(
        cls,
        transport: Transport | Sequence[Transport],
        *,
        model: str | None = None,
        retry: Retry | None = None,
        breaker: Breaker | None = None,
        token_form: TokenForm = "compact",
    ) -> GymClient:
        """Return a client over a transport of your own, or over several that reach replicas of one policy."""
        client = cls.__new__(cls)
        client._api_key = None
        client._base_url = None
        transports = [transport] if not isinstance(transport, Sequence) else list(transport)
        client._setup(transports, model, token_form, retry, breaker)
        return client

    def _setup(
        self,
        transports: list[Any],
        model: str | None,
        token_form: TokenForm,
        retry: Retry | None,
        breaker: Breaker | None,
    ) -> None:
        self._transports: list[Transport] = transports
        self.transport: Transport = transports[0] if len(transports) == 1 else Replicas(transports)
        self.token_form: TokenForm = token_form
        self.model = model
        self.retry = retry or Retry()
        self.breaker = breaker or Breaker()
        self.weights = WeightClock()
        self._dispatch: Dispatch | None = None
        self._stack: AsyncExitStack | None = None

    async def open(self) -> None:
        """Open the connections, or load the embedded engine. `async with` does it too.

        Raises:
            ConfigurationError: the client is open already, or the embedded engine cannot be loaded.
        """
        if self._stack is not None:
            raise ConfigurationError("this client is open already")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.transport.aclose)
            await self.transport.open()
            dispatch = Dispatch(self._transports, retry=self.retry, breaker=self.breaker)
            stack.push_async_callback(dispatch.aclose)
            self._stack, self._dispatch = stack.pop_all(), dispatch

    async def aclose(self) -> None:
        """Close the connections, or the embedded engine; without effect if it is closed."""
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def respond(
        self,
        input: str | Iterable[Any],
        *,
        tools: Iterable[ToolLike] = (),
        instructions: str | None = None,
        deadline_s: float = 600.0,
        **fields: Any,
    ) -> Response:
        """Make one model call.

        Args:
            input: text, or items (objects or dicts in the API's shape).
            tools: functions on offer; they are not run here.
            instructions: system text.
            deadline_s: how long it may take, all tries together, in seconds.
            **fields: further fields of the request, e.g. `temperature=0.7`.

        Raises:
            TransportError: the server was not reached, after all retries.
            PolicyError: the server refused the request.
            DeadlineError: there was no answer in time.
            ConfigurationError: the client is not open, or the fields ask for a stream.
            pydantic.ValidationError: a field does not fit the API's shape.
        """
        dispatch = self._opened()
        if fields.get("stream"):
            raise ConfigurationError("`respond` answers in one piece; stream with `client.openai()`")
        body: dict[str, Any] = {"model": self.model, "instructions": instructions, **fields}
        body = {name: value for name, value in body.items() if value is not None}
        schemas = [tool.schema for tool in resolve_tools(tools).values()]
        if schemas:
            body["tools"] = schemas
        request = ResponseRequest.model_validate({**body, "input": _input(input)})
        with anyio.move_on_after(deadline_s) as scope:
            return (await dispatch.respond(request)).response
        assert scope.cancelled_caught
        raise DeadlineError("the model call", seconds=deadline_s)

    async def rollout(
        self,
        task: Task | str,
        *,
        tools: Iterable[ToolLike] = (),
        verifier: Verifier | None = None,
        environment: Environment | None = None,
        sampling: Sampling | None = None,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
        begun: Rollout | None = None,
    ) -> Rollout:
        """Attempt a task once: model calls and tool calls in turn, then the verifier.

        Whatever goes wrong is in the rollout's `outcome` and `failure`; a failed rollout has no reward.

        Args:
            task: the problem; text is short for `Task(text)`.
            tools: functions that the policy may call.
            verifier: scores the rollout.
            environment: tools, verifier and per-rollout state in one, instead of `tools` and `verifier`.
            sampling: temperature, limits on tokens, seed.
            deadlines: how long each thing may take.
            limits: how many model calls a rollout may make.
            begun: a cancelled attempt at the same task, to go on from: its turns and tokens stay.

        Raises:
            ConfigurationError: the arguments contradict each other, the attempt cannot be gone on from, or
                the client is not open.
        """
        self._opened()
        spec = self._spec(tools, verifier, environment, sampling, deadlines, limits)
        return await run_rollout(_with_id(as_task(task)), spec, begun=begun)

    def rollouts(
        self,
        tasks: TaskSource,
        *,
        tools: Iterable[ToolLike] = (),
        verifier: Verifier | None = None,
        environment: Environment | None = None,
        group_size: int = 1,
        sampling: Sampling | None = None,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
        schedule: Schedule | None = None,
        dynamic: DynamicSampling | None = None,
        staleness: Staleness | None = None,
        store: str | Path | None = None,
        begun: Iterable[Rollout] = (),
        keep_partial: bool = False,
        progress: bool = False,
        tracker: Tracker | None = None,
    ) -> RolloutStream:
        """Attempt many tasks; use it as `async with client.rollouts(...) as stream`.

        Groups come as they finish. Leaving the context cancels what is in flight.

        Args:
            tasks: tasks or texts, from any iterable or asynchronous iterable; read as far as needed.
            tools: functions that the policy may call.
            verifier: scores each rollout.
            environment: tools, verifiers and per-rollout state in one, instead of `tools` and `verifier`.
            group_size: rollouts of each task.
            sampling: temperature, limits on tokens, seed.
            deadlines: how long each thing may take, and the whole stream.
            limits: how much runs at once, how many model calls each rollout may make.
            schedule: order, epochs, ramp and look-ahead of admission.
            dynamic: spares, refills and early stops of groups.
            staleness: how old the weights of a rollout may be.
            store: journal (JSONL, or zstd if it ends in `.zst`) to which each rollout is appended when it
                finishes. What it holds already is not sampled again, and delivered as if it had been.
            begun: cancelled attempts to go on from.
            keep_partial: whether rollouts that are cancelled when the stream is left stay, in the store and
                in `stream.partial`, so that a later stream can go on from them; it takes those in its store
                by itself.
            progress: whether to show a progress bar.
            tracker: gets the stream's metrics every ten seconds, and at its end.

        Raises:
            ConfigurationError: the arguments contradict each other, or the client is not open.
        """
        self._opened()
        spec = self._spec(tools, verifier, environment, sampling, deadlines, limits)
        options = StreamOptions(
            group_size=group_size,
            schedule=schedule or Schedule(),
            dynamic=dynamic or DynamicSampling(),
            staleness=staleness,
            store=Path(store) if store is not None else None,
            begun=tuple(begun),
            keep_partial=keep_partial,
            progress=progress,
            tracker=tracker,
        )
        return RolloutStream(tasks, spec, options)

    async def collect(self, tasks: TaskSource, **options: Any) -> Collection:
        """Run `rollouts(tasks, **options)` to its end and return all groups, in the order of the tasks.

        Raises:
            ConfigurationError: as for `rollouts`.
        """
        started = perf_counter()
        async with self.rollouts(tasks, **options) as stream:
            groups = [group async for group in stream]
        groups.sort(key=lambda group: (group.epoch, stream.position(group.task)))
        return Collection(groups, perf_counter() - started)

    def capture(
        self,
        task: Task | str,
        *,
        index: int = 0,
        deadline_s: float | None = None,
        deadlines: Deadlines | None = None,
    ) -> CaptureSession:
        """Record the model calls of an agent of your own; use it as `async with client.capture(task) as s`.

        The agent talks to `s.base_url` (or `s.openai()`); `await s.finish(verifier=...)` returns the rollout.
        With an embedded engine, the policy is served on a loopback port from the first capture until the
        client closes.

        Args:
            task: the problem; text is short for `Task(text)`.
            index: position in the task's group.
            deadline_s: how long the agent and `finish` may take together, in seconds; short for
                `Deadlines(rollout_s=...)`.
            deadlines: `rollout_s` and `verifier_s` count here.

        Raises:
            ConfigurationError: the arguments contradict each other, the policy has no address, or the client
                is not open.
        """
        from gym_sdk.capture import CaptureSession

        self._opened()
        if not isinstance(self.transport, ServingTransport):
            raise ConfigurationError(
                f"{type(self.transport).__name__} gives its policy no address that an agent could call"
            )
        if deadline_s is not None:
            if deadlines is not None:
                raise ConfigurationError("give `deadline_s` or `deadlines`, not both")
            deadlines = Deadlines(rollout_s=deadline_s)
        return CaptureSession(
            _with_id(as_task(task)),
            index,
            transport=self.transport,
            model=self.model,
            api_key=self._api_key,
            retry=self.retry,
            deadlines=deadlines or Deadlines(),
        )

    def openai(self) -> AsyncOpenAI:
        """Return the openai package's client for the same server; close it yourself.

        Raises:
            ConfigurationError: the engine is embedded and has no address.
        """
        if self._base_url is None:
            raise ConfigurationError("an embedded engine has no address; serve it with `gym-sdk serve`")
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self._base_url, api_key=self._api_key or "none")

    def _spec(
        self,
        tools: Iterable[ToolLike],
        verifier: Verifier | None,
        environment: Environment | None,
        sampling: Sampling | None,
        deadlines: Deadlines | None,
        limits: Limits | None,
    ) -> RolloutSpec:
        resolved = list(resolve_tools(tools).values())
        if environment is None:
            environment = Environment(tools=resolved, verifier=verifier)
        elif resolved or verifier is not None:
            raise ConfigurationError("give `environment`, or `tools` and `verifier`, not both")
        limits = limits or Limits()
        return RolloutSpec(
            caller=self._opened(),
            token_form=self.token_form,
            model=self.model,
            environment=environment,
            sampling=sampling or Sampling(),
            deadlines=deadlines or Deadlines(),
            limits=limits,
            gates=Gates.of(limits),
            clock=self.weights,
        )

    def _opened(self) -> Dispatch:
        if self._stack is None or self._dispatch is None:
            raise ConfigurationError("the client is not open; use `async with GymClient(...) as client`")
        return self._dispatch

    def health(self) -> list[ReplicaHealth]:
        """Return how each replica is doing: whether it answers, what is in flight, what failed.

        Raises:
            ConfigurationError: the client is not open.
        """
        return self._opened().health()


def _input(value: str | Iterable[Any]) -> Any:
    return value if isinstance(value, str) else as_items(value)


def _with_id(task: Task) -> Task:
    return task if task.id is not None else replace(task, id=f"task-{uuid4().hex[:12]}")
