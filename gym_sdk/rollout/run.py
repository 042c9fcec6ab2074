"""One rollout: respond, run the function calls, append their outputs, repeat; then verify."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from uuid import uuid4

from gym_sdk.deadline import Deadline
from gym_sdk.errors import (
    ContextOverflowError,
    DeadlineError,
    PolicyError,
    TransportError,
)
from gym_sdk.rollout.beginning import Times, empty_rollout, going_on, unanswered_calls
from gym_sdk.rollout.calls import run_function_calls
from gym_sdk.rollout.deadline import to_its_end, was_cancelled, within
from gym_sdk.rollout.requests import RequestWriter
from gym_sdk.rollout.slots import Slots
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.rollout.staleness import oldest_version
from gym_sdk.schema import (
    FunctionCall,
    ModelCall,
    Outcome,
    Rollout,
    Stage,
    Task,
    Truncation,
    Turn,
)
from gym_sdk.tokens import CallTokens, chained
from gym_sdk.tools import Tool, ToolContext
from gym_sdk.transport.dispatch import Answer
from gym_sdk.verifiers import run_verifier, verifier_name

__all__ = ["RolloutRun", "run_rollout"]

_log = logging.getLogger(__name__)

_UNFINISHED = frozenset({"cancelled", "failed", "queued", "in_progress"})


async def run_rollout(task: Task, spec: RolloutSpec, *, begun: Rollout | None = None) -> Rollout:
    """Attempt a task once.

    Whatever goes wrong is the rollout's outcome, not an exception; what was collected until then stays in
    it. Cancellation ends it at once and is passed on.

    Args:
        task: the problem.
        spec: the policy, tools, verifier, sampling, deadlines, limits.
        begun: a cancelled attempt at the same task, to go on from.

    Raises:
        ConfigurationError: the task's input is not made of items, or the attempt cannot be gone on from.
    """
    return await RolloutRun(task, spec, begun=begun).run()


class RolloutRun:
    """One rollout in flight.

    Args:
        task: the problem; its id names the group.
        spec: the policy, tools, verifier, sampling, deadlines, limits.
        index: position in the group.
        epoch: how often the task's group was attempted before.
        order: what is admitted earlier has a smaller one, and goes first where something is scarce.
        begun: a cancelled attempt to go on from: its items and tokens stay as they are.

    Attributes:
        rollout: what there is so far. A call that is in flight is not in it.
        born: the number of the oldest weights that it was sampled with; None before its first model call, or
            without a clock.

    Raises:
        ConfigurationError: the task's input is not made of items, or the attempt cannot be gone on from.
    """

    def __init__(
        self,
        task: Task,
        spec: RolloutSpec,
        *,
        index: int = 0,
        epoch: int = 0,
        order: int = 0,
        begun: Rollout | None = None,
    ) -> None:
        self._task = task
        self._spec = spec
        self._order = order
        self._state: Any = None
        self._stage = Stage.SETUP
        self._writer: RequestWriter
        self._tools: dict[str, Tool[..., Any]] = {}
        self._affinity = f"{task.id}@{epoch}"
        self._times = Times()
        self.born: int | None = None
        self.rollout = (
            empty_rollout(task, index, epoch)
            if begun is None
            else going_on(begun, spec.environment.has_state)
        )
        self._calls_id = self.rollout.id  # names its calls for servers, which answer a call only once
        if begun is not None:
            self._times = Times.of(begun.timing)
            self._calls_id += f".{uuid4().hex[:8]}"  # what they were asked before, they were asked otherwise

    async def run(self) -> Rollout:
        """Attempt the task; see `run_rollout`."""
        rollout, deadline_s = self.rollout, self._spec.deadlines.rollout_s
        started = time.perf_counter()
        try:
            with Deadline(deadline_s) as deadline:
                await self._attempt()
            # later: some code of a user swallowed the cancellation
            if deadline.expired or time.perf_counter() - started > deadline_s:
                rollout.fail(
                    DeadlineError("the rollout (Deadlines.rollout_s)", seconds=deadline_s), self._stage
                )
        except asyncio.CancelledError as error:
            if was_cancelled():
                raise
            rollout.fail(error, self._stage)  # some code of a user raised it by itself
        except Exception as error:
            rollout.fail(error, self._stage)
        finally:
            self._times.duration_s += time.perf_counter() - started
            rollout.timing = self._times.timing(rollout.timing.started_at)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("rollout %s of task %s: %s", rollout.id, rollout.task_id, rollout.outcome)
        return rollout

    async def _attempt(self) -> None:
        environment, deadlines = self._spec.environment, self._spec.deadlines
        if environment.setup is not None:
            setup = environment.start(self._task)
            self._state = await within(
                "the environment's setup (Deadlines.setup_s)", deadlines.setup_s, setup
            )
        try:
            self._tools = self._spec.tools_for(self._state)
            self._stage = Stage.MODEL_CALL
            self._writer = RequestWriter(self.rollout, self._spec, self._tools)
            await self._converse()
            self._stage = Stage.VERIFIER
            await self._verify()
        finally:
            if environment.teardown is not None:
                await to_its_end(self._tear_down())

    async def _converse(self) -> None:
        """Take turns until the policy gives its answer or a limit is reached."""
        rollout = self.rollout
        rollout.metrics["tools_offered"] = float(len(self._tools))
        if rollout.model_calls and self._had_ended(rollout.model_calls[-1]):
            return None
        calls = unanswered_calls(rollout)
        for turn in range(len(rollout.model_calls), self._spec.limits.max_turns):
            if calls:
                self._stage = Stage.TOOL
                await self._run_tools(calls)
                self._stage = Stage.MODEL_CALL
            try:
                response = await self._model_call(turn)
            except ContextOverflowError:
                if not rollout.model_calls:
                    raise
                return self._truncate(Truncation.CONTEXT)
            if response.status == "incomplete":
                used = response.output_tokens
                return self._truncate(self._limit_reached(used))
            calls = [item for item in response.output if isinstance(item, FunctionCall)]
            if not calls:
                return None
        if calls:
            self._stage = Stage.TOOL
            await self._run_tools(calls)
        return self._truncate(Truncation.TURNS)

    async def _model_call(self, turn: int) -> Turn:
        gates, times = self._spec.gates, self._times
        asked = started = time.perf_counter()
        self._note_birth()
        try:
            if gates.model_calls is not None:
                await gates.model_calls.acquire(self._order)
            try:
                started = time.perf_counter()
                times.wait_s += started - asked
                answer = await self._send(turn)
            finally:
                if gates.model_calls is not None:
                    gates.model_calls.release()
        finally:
            duration_s = time.perf_counter() - started
            times.model_s += duration_s
        self._record(answer, duration_s)
        return answer.response

    def _note_birth(self) -> None:
        clock = self._spec.clock
        if clock is not None and self.born is None:
            oldest = oldest_version(self.rollout, clock)
            self.born = clock.now if oldest is None else oldest

    async def _send(self, turn: int) -> Answer[Turn]:
        try:
            return await self._request(turn, f"{self._calls_id}-{turn}")
        except PolicyError as error:
            if self._writer.continues is None or error.code != "previous_response_not_found":
                raise
        self._writer.forget()  # the server lost its memory: tell it everything once
        self._count("lost_states")
        return await self._request(turn, f"{self._calls_id}-{turn}-whole")

    async def _request(self, turn: int, request_id: str) -> Answer[Turn]:
        return await self._spec.caller.turn(
            self._writer.write(turn),
            token_form=self._spec.token_form,
            affinity=self._affinity,
            request_id=request_id,
            try_s=self._spec.deadlines.model_call_s,
            check=self._check,
        )

    def _check(self, response: Turn) -> None:
        """Refuse what is no answer to the request: it is asked for again.

        Raises:
            TransportError: it is not.
        """
        wrong = None
        if response.status in _UNFINISHED:
            wrong = f"ended as {response.status}: {response.problem or 'no reason given'}"
        elif any(call.response_id == response.id for call in self.rollout.model_calls):
            wrong = "was the answer to an earlier turn, and came again"
        elif response.previous_response_id not in (None, self._writer.continues):
            wrong = f"continues {response.previous_response_id}, and not {self._writer.continues}"
        if wrong is not None:
            raise TransportError(f"response {response.id} {wrong}", retryable=True)

    def _record(self, answer: Answer[Turn], duration_s: float) -> None:
        rollout, response = self.rollout, answer.response
        first = len(rollout.items)
        tokens = self._tokens(response)
        rollout.items += [item.without_tokens() for item in response.output]
        rollout.metrics["turns"] += 1
        if response.fork is not None:
            self._count("forks")
        elif tokens is not None and tokens.parent is None and any(c.tokens for c in rollout.model_calls):
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
                retries=answer.retries,
                duration_s=duration_s,
            )
        )
        self._writer.note(response)

    def _tokens(self, response: Turn) -> CallTokens | None:
        """Return the response's tokens, linked to the earlier call that they extend."""
        earlier = [call.tokens for call in self.rollout.model_calls if call.tokens is not None]
        if not earlier:
            return response.tokens_after({})
        continued = self._writer.continues
        tokens = response.tokens_after({} if continued is None else {continued: earlier[-1]})
        if tokens is None or tokens.parent is earlier[-1]:
            return tokens
        return chained([*earlier, tokens])[-1]

    def _count(self, metric: str, amount: float = 1.0) -> None:
        metrics = self.rollout.metrics
        metrics[metric] = metrics.get(metric, 0.0) + amount

    def _had_ended(self, last: ModelCall) -> bool:
        """Whether an attempt that goes on had taken its last turn, and was cut off in what came after."""
        if last.status == "incomplete":
            used = None if last.tokens is None else len(last.tokens.generation_token_ids)
            self._truncate(self._limit_reached(used))
            return True
        output = self.rollout.items[last.first_item : last.end_item]
        return not any(isinstance(item, FunctionCall) for item in output)

    def _limit_reached(self, used: int | None) -> Truncation:
        """An incomplete response ended at its own limit, or at the end of the context."""
        limit = self._task.settings.get("max_output_tokens", self._spec.sampling.max_output_tokens)
        if limit is None or (used is not None and used < limit):
            return Truncation.CONTEXT
        return Truncation.TOKENS

    def _truncate(self, reason: Truncation) -> None:
        self.rollout.outcome = Outcome.TRUNCATED
        self.rollout.truncation = reason

    async def _run_tools(self, calls: list[FunctionCall]) -> None:
        rollout, spec = self.rollout, self._spec
        slots = spec.gates.tool_calls
        started = time.perf_counter()
        try:
            results = await run_function_calls(
                calls,
                self._tools,
                ToolContext(self._task, rollout.id, self._state),
                timeout_s=spec.deadlines.tool_s,
                max_output_chars=spec.limits.tool_output_chars,
                slots=None if slots is None else slots.claim(self._order),
            )
        finally:
            self._times.tool_s += time.perf_counter() - started
        rollout.metrics["tool_calls"] += len(calls)
        rollout.metrics["tool_errors"] += results.errors
        if results.cut:
            self._count("cut_tool_outputs", results.cut)
        rollout.items += results.outputs

    async def _verify(self) -> None:
        rollout, verifier = self.rollout, self._spec.environment.verifier
        if verifier is None:
            return
        slots: Slots | None = self._spec.gates.verifiers
        asked = started = time.perf_counter()
        if slots is not None:
            await slots.acquire(self._order)
        try:
            started = time.perf_counter()
            self._times.wait_s += started - asked
            verification = run_verifier(verifier, rollout)
            what = f"the verifier {verifier_name(verifier)} (Deadlines.verifier_s)"
            reward = await within(what, self._spec.deadlines.verifier_s, verification)
        finally:
            if slots is not None:
                slots.release()
            self._times.verifier_s += time.perf_counter() - started
        rollout.reward = reward.value
        rollout.reward_components = dict(reward.components)

    async def _tear_down(self) -> None:
        """Give the state back, also when the rollout was cancelled."""
        try:
            stopping = self._spec.environment.stop(self._state)
            await within(
                "the environment's teardown (Deadlines.setup_s)", self._spec.deadlines.setup_s, stopping
            )
        except Exception as error:
            # The attempt itself is over and its reward stands; what leaks must be seen.
            _log.warning("teardown after rollout %s failed: %r", self.rollout.id, error)
            self.rollout.metrics["teardown_errors"] = 1.0
