"""One captured rollout: an address for the agent, then a rollout like any other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import anyio

from gym_sdk.capture.calls import CapturedCall, restore
from gym_sdk.capture.outcome import call_metrics, truncation_of
from gym_sdk.capture.remote import RemoteCapture
from gym_sdk.capture.transcript import write_transcript
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, DeadlineError, GymError
from gym_sdk.rollout.beginning import input_items
from gym_sdk.rollout.config import Deadlines
from gym_sdk.schema import Cancellation, Outcome, Rollout, Stage, Task, Timing, Truncation
from gym_sdk.transport import Retry, ServingTransport
from gym_sdk.verifiers import Verifier, run_verifier

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI

__all__ = ["CaptureSession"]

_log = logging.getLogger(__name__)

_LEAVE_S = 15.0


class CaptureSession:
    """Records the model calls of an agent; use it as `async with client.capture(task) as session`.

    Inside, the agent talks to `base_url`, and `finish` or `fail` makes the rollout. Leaving without either
    aborts what is in flight; `rollout` is then failed if an exception or the deadline ended the block, and
    cancelled otherwise. The exception passes through.

    Args:
        task: what the agent attempts; it has an id.
        index: position in the task's group.
        transport: whose policy the agent calls.
        model: the policy's name, for the agent.
        api_key: sent by the clients of `openai` and `anthropic`.
        retry: how infrastructure failures of the capture's own requests are tried again.
        deadlines: `rollout_s` bounds the block and `finish`, `verifier_s` the verifier.

    Attributes:
        task: the task.
        model: what an agent names as its model.
        rollout_id: the id of the rollout, and of its capture.
        calls: every call that was recorded, also those that failed; empty before `finish`.
        rollout: the rollout; None before `finish`, `fail` or the end of the block.
    """

    def __init__(
        self,
        task: Task,
        index: int,
        *,
        transport: ServingTransport,
        model: str | None,
        api_key: str | None,
        retry: Retry,
        deadlines: Deadlines,
    ) -> None:
        self.task = task
        self.model = model or "policy"
        self.rollout_id = f"ro_{uuid4().hex}"
        self.calls: list[CapturedCall] = []
        self.rollout: Rollout | None = None
        self._index = index
        self._transport = transport
        self._api_key = api_key
        self._retry = retry
        self._deadlines = deadlines
        self._remote: RemoteCapture | None = None
        self._scope = anyio.CancelScope()
        self._clients: list[AsyncOpenAI | AsyncAnthropic] = []
        self._started_at = 0.0
        self._started = 0.0
        input_items(task)  # what is no task fails here, not after the agent's work

    async def __aenter__(self) -> Self:
        """Begin the capture on the server.

        Raises:
            TransportError: the server was not reached, or has too many captures.
            PolicyError: the server cannot capture.
            ConfigurationError: the session was entered before.
        """
        if self._remote is not None:
            raise ConfigurationError("a capture session can be entered only once")
        remote = RemoteCapture(self.rollout_id, await self._transport.serving(), self._retry)
        await remote.begin()
        self._remote = remote
        self._started_at, self._started = time.time(), time.perf_counter()
        self._scope = anyio.move_on_after(self._deadlines.rollout_s)
        self._scope.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        self._scope.__exit__(kind, error, traceback)
        expired = None
        if self._scope.cancelled_caught:
            expired = DeadlineError("the captured agent", seconds=self._deadlines.rollout_s)
        with anyio.CancelScope(shield=True):
            try:
                if self.rollout is None:
                    await self._leave(expired or error)
            finally:
                for client in self._clients:
                    await client.close()
        if expired is not None:
            raise expired from None
        return None

    @property
    def base_url(self) -> str:
        """The API's root for this rollout, ending in `/v1`.

        Raises:
            ConfigurationError: the session was not entered.
        """
        return self._entered().base_url

    def openai(self, **options: Any) -> AsyncOpenAI:
        """Return the openai package's client for this rollout; it is closed with the session.

        Args:
            **options: further arguments of `AsyncOpenAI`, e.g. `max_retries=0`.
        """
        from openai import AsyncOpenAI

        given: dict[str, Any] = {"base_url": self.base_url, "api_key": self._api_key or "none", **options}
        client = AsyncOpenAI(**given)
        self._clients.append(client)
        return client

    def anthropic(self, **options: Any) -> AsyncAnthropic:
        """Return the anthropic package's client for this rollout; it is closed with the session.

        Args:
            **options: further arguments of `AsyncAnthropic`, e.g. `max_retries=0`.

        Raises:
            ConfigurationError: the package is not installed.
        """
        try:
            from anthropic import AsyncAnthropic
        except ImportError as error:
            raise ConfigurationError("the package anthropic is missing: pip install anthropic") from error
        root = self.base_url.removesuffix("/v1")  # the package adds it
        given: dict[str, Any] = {"base_url": root, "api_key": self._api_key or "none", **options}
        client = AsyncAnthropic(**given)
        self._clients.append(client)
        return client

    async def finish(
        self,
        *,
        verifier: Verifier | None = None,
        environment: Environment | None = None,
        truncation: Truncation | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Rollout:
        """End the capture and return the rollout, verified.

        Calls in flight are aborted. Whatever goes wrong is in the rollout's `outcome` and `failure`.

        Args:
            verifier: scores the rollout.
            environment: its verifier is used, instead of `verifier`; its tools and its state are not.
            truncation: the agent's own limit that ended it, e.g. `Truncation.TURNS`; that the last generation
                was cut is known without it.
            metrics: added to the rollout's, e.g. `{"tool_errors": 2}`, which only the agent knows.

        Raises:
            ConfigurationError: the rollout is finished already, or both verifiers are given.
        """
        if environment is not None:
            if verifier is not None:
                raise ConfigurationError("give `environment` or `verifier`, not both")
            verifier = environment.verifier
        return await self._end(_Ending(verifier, truncation), metrics)

    async def fail(self, error: Exception, *, metrics: Mapping[str, float] | None = None) -> Rollout:
        """End the capture and return a failed rollout, which has no reward.

        Args:
            error: why the agent failed.
            metrics: added to the rollout's.

        Raises:
            ConfigurationError: the rollout is finished already.
        """
        return await self._end(_Ending(error=error), metrics)

    async def _end(self, ending: _Ending, metrics: Mapping[str, float] | None) -> Rollout:
        self._entered()
        if self.rollout is not None:
            raise ConfigurationError("this rollout is finished already")
        deadline_s = self._deadlines.rollout_s
        self._scope.deadline = math.inf  # from here on, running out of time is an outcome
        rollout = self._empty()
        left_s = max(0.0, deadline_s - (time.perf_counter() - self._started))
        where = Stage.CAPTURE
        with anyio.move_on_after(left_s) as scope:
            try:
                await self._collect(rollout)
                where = Stage.AGENT
                if ending.error is not None:
                    raise ending.error
                where = Stage.MODEL_CALL
                rollout.truncation = truncation_of(self.calls) or ending.truncation
                rollout.outcome = Outcome.TRUNCATED if rollout.truncation else Outcome.COMPLETED
                where = Stage.VERIFIER
                await self._verify(rollout, ending.verifier)
            except Exception as failure:
                rollout.fail(failure, where)
        if scope.cancelled_caught:
            rollout.fail(DeadlineError("the rollout", seconds=deadline_s), where)
        rollout.metrics |= metrics or {}
        rollout.timing.duration_s = time.perf_counter() - self._started
        _log.debug("captured rollout %s of task %s: %s", rollout.id, rollout.task_id, rollout.outcome)
        self.rollout = rollout
        return rollout

    async def _leave(self, error: BaseException | None) -> None:
        """Make the rollout of a block that was left without `finish`."""
        rollout = self._empty()
        with anyio.move_on_after(_LEAVE_S):
            try:
                await self._collect(rollout)
            except GymError as failure:
                _log.debug("capture %s could not be read: %s", self.rollout_id, failure)
        if isinstance(error, Exception):
            rollout.fail(error, Stage.AGENT)
        else:
            rollout.cancel(Cancellation.CALLER)
        rollout.timing.duration_s = time.perf_counter() - self._started
        self.rollout = rollout

    async def _collect(self, rollout: Rollout) -> None:
        """End the capture and write its calls into the rollout."""
        self.calls = restore(await self._entered().collect())
        transcript = write_transcript(self.calls, self.task)
        if transcript.items:
            rollout.items, rollout.input_items = transcript.items, transcript.input_items
        rollout.model_calls = transcript.model_calls
        rollout.metrics |= call_metrics(self.calls, transcript.silent_forks)
        rollout.timing.model_s = sum(call.duration_s for call in self.calls)

    async def _verify(self, rollout: Rollout, verifier: Verifier | None) -> None:
        if verifier is None:
            return
        seconds = self._deadlines.verifier_s
        started = time.perf_counter()
        try:
            with anyio.move_on_after(seconds) as scope:
                reward = await run_verifier(verifier, rollout)
        finally:
            rollout.timing.verifier_s = time.perf_counter() - started
        if scope.cancelled_caught:
            raise DeadlineError("the verifier", seconds=seconds)
        rollout.reward = reward.value
        rollout.reward_components = dict(reward.components)

    def _empty(self) -> Rollout:
        items = input_items(self.task)
        return Rollout(
            id=self.rollout_id,
            task=self.task,
            index=self._index,
            items=items,
            input_items=len(items),
            metrics={"turns": 0.0, "tool_calls": 0.0},
            timing=Timing(started_at=self._started_at),
        )

    def _entered(self) -> RemoteCapture:
        if self._remote is None:
            raise ConfigurationError("enter the session first: async with client.capture(task) as session")
        return self._remote


@dataclass(frozen=True, slots=True)
class _Ending:
    """How the agent's work ended, and who scores it."""

    verifier: Verifier | None = None
    truncation: Truncation | None = None
    error: Exception | None = None
