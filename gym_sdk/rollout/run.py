"""One rollout: respond, run the function calls, append their outputs, repeat; then verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import anyio
from pydantic import ValidationError

from gym_sdk.environments import Environment
from gym_sdk.errors import (
    ConfigurationError,
    ContextOverflowError,
    DeadlineError,
    GymError,
    PolicyError,
    TransportError,
)
from gym_sdk.rollout.calls import run_function_calls
from gym_sdk.rollout.config import Deadlines, Limits, Sampling
from gym_sdk.schema import (
    Failure,
    FunctionCall,
    Item,
    ModelCall,
    Outcome,
    Response,
    ResponseRequest,
    Rollout,
    Task,
    Timing,
    Truncation,
)
from gym_sdk.tokens import CallTokens, chained
from gym_sdk.tools import Tool, ToolContext, resolve_tools
from gym_sdk.transport import Retry, with_retries
from gym_sdk.verifiers import run_verifier

__all__ = ["RolloutSpec", "input_items", "run_rollout"]

_log = logging.getLogger(__name__)

Respond = Callable[[ResponseRequest], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Everything about a rollout but its task."""

    model: str | None = None
    environment: Environment = field(default_factory=Environment)
    sampling: Sampling = field(default_factory=Sampling)
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: Limits = field(default_factory=Limits)
    retry: Retry = field(default_factory=Retry)


async def run_rollout(task: Task, index: int, spec: RolloutSpec, respond: Respond) -> Rollout:
    """Attempt a task once.

    Whatever goes wrong is the rollout's outcome, not an exception; what was collected until then stays in
    it. Cancellation ends it at once and is passed on.

    Args:
        task: the problem.
        index: position in the task's group.
        spec: tools, verifier, sampling, deadlines, limits.
        respond: sends one request, once.

    Raises:
        ConfigurationError: the task's input is not made of items.
    """
    return await _Run(task, index, spec, respond).run()


class _Run:
    """The state of one rollout in flight."""

    def __init__(self, task: Task, index: int, spec: RolloutSpec, respond: Respond) -> None:
        self._task = task
        self._spec = spec
        self._respond = respond
        self._state: Any = None
        self._where = "setup"
        self._previous: str | None = None  # the response that the next request may continue
        self._seen = 0  # how many items the server knows with it
        self._echo = True  # whether the items that are sent carry their tokens
        items = input_items(task)
        self._rollout = Rollout(
            id=f"ro_{uuid4().hex}",
            task=task,
            index=index,
            items=items,
            input_items=len(items),
            metrics={"turns": 0.0, "tool_calls": 0.0, "tool_errors": 0.0},
            timing=Timing(started_at=time.time()),
        )

    async def run(self) -> Rollout:
        rollout, deadline_s = self._rollout, self._spec.deadlines.rollout_s
        started = time.perf_counter()
        try:
            with anyio.fail_after(deadline_s) as scope:
                await self._attempt()
        except TimeoutError as error:
            expired = scope.cancelled_caught and not isinstance(error, GymError)
            self._fail(DeadlineError("the rollout", seconds=deadline_s) if expired else error)
        except Exception as error:
            self._fail(error)
        finally:
            rollout.timing.duration_s = time.perf_counter() - started
        _log.debug("rollout %s of task %s: %s", rollout.id, rollout.task_id, rollout.outcome)
        return rollout

    async def _attempt(self) -> None:
        environment = self._spec.environment
        set_up = False
        try:
            with self._deadline("the environment's setup", self._spec.deadlines.setup_s):
                self._state = await environment.start(self._task)
            set_up = True
            tools = resolve_tools(environment.tools_for(self._state))
            self._where = "model_call"
            await self._converse(tools)
            self._where = "verifier"
            await self._verify()
        finally:
            if set_up:
                await self._tear_down()

    async def _converse(self, tools: dict[str, Tool[..., Any]]) -> None:
        """Take turns until the policy gives its answer or a limit is reached."""
        rollout = self._rollout
        rollout.metrics["tools_offered"] = float(len(tools))
        for turn in range(self._spec.limits.max_turns):
            self._where = "model_call"
            try:
                response = await self._model_call(tools, turn)
            except ContextOverflowError:
                if not rollout.model_calls:
                    raise
                self._truncate(Truncation.CONTEXT)
                return
            if response.status == "incomplete":
                self._truncate(self._limit_reached(response))
                return
            calls = [item for item in response.output if isinstance(item, FunctionCall)]
            if not calls:
                return
            self._where = "tool"
            await self._run_tools(calls, tools)
        self._truncate(Truncation.TURNS)

    async def _model_call(self, tools: dict[str, Tool[..., Any]], turn: int) -> Response:
        started = time.perf_counter()
        try:
            try:
                response, retries = await self._send(self._request(tools, turn))
            except PolicyError as error:
                if self._previous is None or error.code != "previous_response_not_found":
                    raise
                # the server lost its memory: tell it everything once
                self._previous, self._seen, self._echo = None, 0, True
                self._count("lost_states")
                response, retries = await self._send(self._request(tools, turn))
        finally:
            duration_s = time.perf_counter() - started
            self._rollout.timing.model_s += duration_s
        self._record(response, retries, duration_s)
        return response

    async def _send(self, request: ResponseRequest) -> tuple[Response, int]:
        limit_s = self._spec.deadlines.model_call_s

        async def once() -> Response:
            with self._deadline("a model call", limit_s):
                response = await self._respond(request)
            if response.status in ("cancelled", "failed", "queued", "in_progress"):
                error = response.error.message if response.error else "no reason given"
                raise TransportError(
                    f"response {response.id} ended as {response.status}: {error}", retryable=True
                )
            return response

        return await with_retries(once, self._spec.retry)

    def _request(self, tools: dict[str, Tool[..., Any]], turn: int) -> ResponseRequest:
        task, spec = self._task, self._spec
        # the rollout itself is the record: nobody asks the server for its responses again
        fields: dict[str, Any] = {"store": False}
        fields |= spec.sampling.fields(task.id or "", self._rollout.index, turn)
        instructions = task.instructions or spec.environment.instructions
        if spec.model is not None:
            fields["model"] = spec.model
        if instructions is not None:
            fields["instructions"] = instructions
        if tools:
            fields["tools"] = [tool.schema for tool in tools.values()]
        fields.update(task.settings)
        if self._previous is None:
            fields["input"] = self._items_with_tokens() if self._echo else list(self._rollout.items)
        else:
            for name in ("instructions", "tools", "chat_template_kwargs"):
                fields.pop(name, None)  # as in the response that this one continues
            fields["previous_response_id"] = self._previous
            fields["input"] = self._rollout.items[self._seen :]
        if task.settings or spec.sampling.extra:
            return ResponseRequest.model_validate(fields)
        return ResponseRequest.model_construct(**fields)  # every value is this library's own

    def _items_with_tokens(self) -> list[Item]:
        """Return the items with each model call's tokens on its last output item."""
        items = list(self._rollout.items)
        for call in self._rollout.model_calls:
            if call.tokens is not None:
                items[call.end_item - 1] = items[call.end_item - 1].with_tokens(call.tokens)
        return items

    def _record(self, response: Response, retries: int, duration_s: float) -> None:
        rollout = self._rollout
        first = len(rollout.items)
        rollout.items += [item.without_tokens() for item in response.output]
        rollout.metrics["turns"] += 1
        tokens = self._tokens(response)
        if response.fork is not None:
            self._count("forks")
        elif (
            tokens is not None and tokens.parent is None and any(call.tokens for call in rollout.model_calls)
        ):
            self._count("unreported_forks")
        if response.unparsed_calls:
            self._count("unparsed_calls", response.unparsed_calls)
        rollout.model_calls.append(
            ModelCall(
                response_id=response.id,
                first_item=first,
                end_item=len(rollout.items),
                status=response.status,
                tokens=tokens,
                fork=response.fork,
                unparsed_calls=response.unparsed_calls,
                retries=retries,
                duration_s=duration_s,
            )
        )
        self._echo = any(item.tokens is not None for item in response.output)
        if response.remembered:
            self._previous, self._seen = response.id, len(rollout.items)
        else:
            self._previous, self._seen = None, 0

    def _tokens(self, response: Response) -> CallTokens | None:
        """Return the response's tokens, linked to the earlier call that they extend."""
        earlier = [call.tokens for call in self._rollout.model_calls if call.tokens is not None]
        known = {} if self._previous is None or not earlier else {self._previous: earlier[-1]}
        tokens = response.tokens_after(known)
        if tokens is None or (earlier and tokens.parent is earlier[-1]):
            return tokens
        return chained([*earlier, tokens])[-1]

    def _count(self, metric: str, amount: float = 1.0) -> None:
        metrics = self._rollout.metrics
        metrics[metric] = metrics.get(metric, 0.0) + amount

    def _limit_reached(self, response: Response) -> Truncation:
        """An incomplete response ended at its own limit, or at the end of the context."""
        limit = self._task.settings.get("max_output_tokens", self._spec.sampling.max_output_tokens)
        used = response.usage.output_tokens if response.usage else None
        if limit is None or (used is not None and used < limit):
            return Truncation.CONTEXT
        return Truncation.TOKENS

    def _truncate(self, reason: Truncation) -> None:
        self._rollout.outcome = Outcome.TRUNCATED
        self._rollout.truncation = reason

    async def _run_tools(self, calls: list[FunctionCall], tools: dict[str, Tool[..., Any]]) -> None:
        rollout = self._rollout
        context = ToolContext(self._task, rollout.id, self._state)
        started = time.perf_counter()
        try:
            outputs, errors = await run_function_calls(
                calls, tools, context, timeout_s=self._spec.deadlines.tool_s
            )
        finally:
            rollout.timing.tool_s += time.perf_counter() - started
        rollout.metrics["tool_calls"] += len(calls)
        rollout.metrics["tool_errors"] += errors
        rollout.items += outputs

    async def _verify(self) -> None:
        rollout, verifier = self._rollout, self._spec.environment.verifier
        if verifier is None:
            return
        started = time.perf_counter()
        try:
            with self._deadline("the verifier", self._spec.deadlines.verifier_s):
                reward = await run_verifier(verifier, rollout)
        finally:
            rollout.timing.verifier_s = time.perf_counter() - started
        rollout.reward = reward.value
        rollout.reward_components = dict(reward.components)

    async def _tear_down(self) -> None:
        """Give the state back, also when the rollout was cancelled."""
        with anyio.CancelScope(shield=True):
            try:
                with self._deadline("the environment's teardown", self._spec.deadlines.setup_s):
                    await self._spec.environment.stop(self._state)
            except Exception as error:
                # The attempt itself is over and its reward stands; what leaks must be seen.
                _log.warning("teardown after rollout %s failed: %r", self._rollout.id, error)
                self._rollout.metrics["teardown_errors"] = 1.0

    @contextmanager
    def _deadline(self, what: str, seconds: float) -> Iterator[None]:
        with anyio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise DeadlineError(what, seconds=seconds)

    def _fail(self, error: BaseException) -> None:
        rollout = self._rollout
        rollout.outcome = Outcome.FAILED
        rollout.truncation = None
        rollout.reward = None
        rollout.reward_components = {}
        rollout.failure = Failure(
            error=type(error).__name__, message=str(error) or repr(error), where=self._where
        )


def _has_tokens(rollout: Rollout) -> bool:
    return any(call.tokens is not None for call in rollout.model_calls)


def input_items(task: Task) -> list[Item]:
    """Return the task's input as items.

    Raises:
        ConfigurationError: an entry is not an item.
    """
    try:
        return task.items()
    except ValidationError as error:
        raise ConfigurationError(
            f"task {task.id}: its input holds something that is no item: {error}"
        ) from error
