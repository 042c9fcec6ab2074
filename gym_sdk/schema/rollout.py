"""Rollouts and groups: what happened, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from gym_sdk.errors import (
    DeadlineError,
    PolicyError,
    TokenContractError,
    TransportError,
    VerifierError,
)
from gym_sdk.schema.call_tokens import TokensField, links_of, mark_links, resolve_links
from gym_sdk.schema.items import FunctionCall, Item, output_text
from gym_sdk.schema.task import Task
from gym_sdk.tokens import CallTokens, TokenReport, TokenSequence, group_advantages, merge_calls

__all__ = [
    "Cancellation",
    "Failure",
    "FailureKind",
    "Group",
    "ModelCall",
    "Outcome",
    "Reward",
    "Rollout",
    "RolloutKey",
    "Stage",
    "Timing",
    "Truncation",
]

SCHEMA_VERSION = 3
"""Of the JSON of a rollout. 2: the tokens of a model call may extend those of an earlier one. 3: `epoch`,
`cancellation` and the kind of a failure."""


class Outcome(StrEnum):
    """How a rollout ended. The set is closed."""

    COMPLETED = "completed"
    """The policy gave its final answer."""
    TRUNCATED = "truncated"
    """A limit ended it early: tokens, context or turns. It is verified and can be trained on."""
    FAILED = "failed"
    """Infrastructure, a verifier or a deadline failed. It has no reward and is never trained on."""
    CANCELLED = "cancelled"
    """Whoever wanted it does no longer; `Cancellation` says why. It has no reward."""


class Truncation(StrEnum):
    """Which limit truncated a rollout."""

    TOKENS = "tokens"
    """The generation reached `max_output_tokens`."""
    CONTEXT = "context"
    """The prompt left no room in the policy's context."""
    TURNS = "turns"
    """The rollout used all of its model calls."""


class Cancellation(StrEnum):
    """Why a rollout was cancelled. The set is closed."""

    CALLER = "caller"
    """The stream was left, or its task was cancelled."""
    STRAGGLER = "straggler"
    """Its group was over-sampled, and full before it was done."""
    FLAT = "flat"
    """Its group was stopped: the rewards that it had were all the same."""
    STALE = "stale"
    """The weights that it began with are too old."""


class Stage(StrEnum):
    """What a rollout was doing when it failed. The set is closed."""

    SETUP = "setup"
    MODEL_CALL = "model_call"
    TOOL = "tool"
    VERIFIER = "verifier"
    GROUP_VERIFIER = "group_verifier"
    AGENT = "agent"
    """A captured agent's own code."""
    CAPTURE = "capture"
    """Reading what was captured."""


class FailureKind(StrEnum):
    """What kind of failure ended a rollout. The set is closed."""

    TRANSPORT = "transport"
    """The policy was not reached, or its answer did not come back, after all retries."""
    REFUSED = "refused"
    """The policy's server refused the request."""
    DEADLINE = "deadline"
    """Something did not finish in time."""
    TOKENS = "tokens"
    """The token fields contradict each other."""
    VERIFIER = "verifier"
    """The verifier raised, or returned something that is no reward."""
    ENVIRONMENT = "environment"
    """The environment, a tool's definition or a captured agent raised."""

    @classmethod
    def of(cls, error: BaseException) -> FailureKind:
        """Return the kind of an error; what this library does not raise itself is the environment's."""
        for kind, errors in _KINDS:
            if isinstance(error, errors):
                return kind
        return cls.ENVIRONMENT


_KINDS: tuple[tuple[FailureKind, tuple[type[BaseException], ...]], ...] = (
    (FailureKind.TRANSPORT, (TransportError,)),
    (FailureKind.TOKENS, (TokenContractError,)),
    (FailureKind.REFUSED, (PolicyError,)),
    (FailureKind.DEADLINE, (DeadlineError,)),
    (FailureKind.VERIFIER, (VerifierError,)),
)


class RolloutKey(NamedTuple):
    """Names a rollout in a run and in its store, whatever happened to it."""

    task_id: str
    epoch: int
    index: int  # type: ignore[assignment]  # hides a tuple's method that nobody needs here


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True, protected_namespaces=())


class Reward(_Data):
    """A score with its named components. A verifier may return one instead of a number."""

    value: float = Field(allow_inf_nan=False)
    components: dict[str, float] = Field(default_factory=dict)


class Failure(_Data):
    """What failed, and where."""

    error: str
    """Class name of the error, e.g. `TransportError`."""
    message: str
    where: Stage
    kind: FailureKind = FailureKind.ENVIRONMENT

    @classmethod
    def of(cls, error: BaseException, where: Stage) -> Failure:
        """Describe an error."""
        return cls.model_construct(
            error=type(error).__name__,
            message=str(error) or repr(error),
            where=where,
            kind=FailureKind.of(error),
        )


class Timing(_Data):
    """When a rollout ran, and what its time was spent on. Concurrent calls add up."""

    started_at: float
    """Unix time, in seconds."""
    duration_s: float = 0.0
    model_s: float = 0.0
    tool_s: float = 0.0
    verifier_s: float = 0.0
    wait_s: float = 0.0
    """Waiting for a place among the model calls or verifiers."""


class ModelCall(_Data):
    """One prompt-to-generation round trip of a rollout."""

    response_id: str
    first_item: int
    """Index in `Rollout.items` of the call's first output item."""
    end_item: int
    """Index after the call's last output item."""
    status: str = "completed"
    tokens: TokensField | None = None
    """None if the server does not return token ids."""
    fork: str | None = None
    """Why the prompt did not extend the newest model call of its history, if the server says so."""
    unparsed_calls: int = 0
    """Pieces of tool-call markup in the generation that did not parse and stayed text."""
    retries: int = 0
    duration_s: float = 0.0


class Rollout(_Data):
    """One attempt at a task.

    A rollout that failed or was cancelled has `reward` None, never 0: it stays out of means, baselines
    and losses.
    """

    id: str
    task: Task
    index: int = 0
    """Position in its group, from 0."""
    epoch: int = 0
    """How often the task had been attempted by a whole group before, in a run that repeats its tasks."""
    items: list[Item] = Field(default_factory=list)
    """Input and output items in order, without token fields."""
    input_items: int = 0
    """How many of `items` came with the task."""
    model_calls: list[ModelCall] = Field(default_factory=list)
    outcome: Outcome = Outcome.COMPLETED
    truncation: Truncation | None = None
    cancellation: Cancellation | None = None
    failure: Failure | None = None
    reward: float | None = None
    reward_components: dict[str, float] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    """Counts of this rollout, e.g. `tool_calls`, `tool_errors`, and whatever a verifier adds."""
    timing: Timing
    schema_version: int = SCHEMA_VERSION
    """Of the data; what an older version wrote is read, and written as the newest."""

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"version {version} of the data is not known; this gym-sdk reads 1 to {SCHEMA_VERSION}"
            )
        return SCHEMA_VERSION

    @field_validator("reward_components", "metrics", mode="before")
    @classmethod
    def _leave_out_nothing(cls, numbers: Any) -> Any:
        """JSON has no NaN: what a verifier noted as one was written as null, and says as little."""
        if isinstance(numbers, dict) and None in numbers.values():
            return {name: number for name, number in numbers.items() if number is not None}
        return numbers

    @field_validator("model_calls", mode="wrap")
    @classmethod
    def _load_calls(cls, calls: Any, handler: Callable[[Any], list[ModelCall]]) -> list[ModelCall]:
        loaded = handler(mark_links(calls))
        tokens = resolve_links([call.tokens for call in loaded])
        for call, resolved in zip(loaded, tokens, strict=True):
            if call.tokens is not resolved:
                call.tokens = resolved
        return loaded

    @field_serializer("model_calls", mode="wrap")
    def _dump_calls(self, calls: list[ModelCall], handler: Callable[[Any], Any]) -> Any:
        links = links_of([call.tokens for call in calls])
        return handler(
            [
                call if call.tokens is link else call.model_copy(update={"tokens": link})
                for call, link in zip(calls, links, strict=True)
            ]
        )

    @field_serializer("items")
    def _dump_items(self, items: list[Item]) -> list[dict[str, Any]]:
        return [item.to_wire() for item in items]

    @property
    def task_id(self) -> str:
        """The id of the task's group."""
        return self.task.id or ""

    @property
    def key(self) -> RolloutKey:
        """What names this rollout in its run and store."""
        return RolloutKey(self.task.id or "", self.epoch, self.index)

    @property
    def ok(self) -> bool:
        """Whether the rollout has a reward."""
        return self.reward is not None

    @property
    def output(self) -> list[Item]:
        """The items after the task's input."""
        return self.items[self.input_items :]

    @property
    def output_text(self) -> str:
        """The text of the last model call's messages: the policy's final answer."""
        if not self.model_calls:
            return ""
        last = self.model_calls[-1]
        return output_text(self.items[last.first_item : last.end_item])

    @property
    def function_calls(self) -> list[FunctionCall]:
        """All function calls of the policy, in order."""
        return [item for item in self.output if isinstance(item, FunctionCall)]

    def cancel(self, reason: Cancellation) -> Rollout:
        """Make this a cancelled rollout, which has no reward, and return it."""
        self.outcome, self.cancellation = Outcome.CANCELLED, reason
        self.truncation = self.failure = self.reward = None
        self.reward_components = {}
        return self

    def fail(self, error: BaseException, where: Stage) -> Rollout:
        """Make this a failed rollout, which has no reward, and return it.

        If it failed in a verifier, its attempt was over: it keeps its truncation, and may be verified again.
        """
        self.outcome, self.failure = Outcome.FAILED, Failure.of(error, where)
        if where not in (Stage.VERIFIER, Stage.GROUP_VERIFIER):
            self.truncation = None
        self.cancellation = self.reward = None
        self.reward_components = {}
        return self

    def sequences(self, *, abandoned: bool = True) -> list[TokenSequence]:
        """Return the training rows: one if every prompt extended the previous call, more after forks.

        Args:
            abandoned: whether to return the rows of generations that the rollout did not go on from (see
                `gym_sdk.tokens.merge_calls`).

        Raises:
            TokenContractError: a model call came without tokens.
        """
        rows = merge_calls(self._tokens(), abandoned=abandoned)
        for row in rows:
            row.rollout_id = self.id
            row.task_id = self.task_id
        return rows

    def token_report(self, decode: Callable[[Sequence[int]], str] | None = None) -> TokenReport:
        """Report what became of the tokens: rows, trained share, forks and what they drifted to.

        Args:
            decode: turns token ids into text, e.g. `client.transport.decode` of a `GymClient.local()`; then
                the tokens around forks are shown as text.

        Raises:
            TokenContractError: a model call came without tokens.
        """
        return TokenReport.of(
            self._tokens(),
            reasons=[call.fork for call in self.model_calls],
            unparsed_calls=sum(call.unparsed_calls for call in self.model_calls),
            decode=decode,
        )

    def _tokens(self) -> list[CallTokens]:
        tokens: list[CallTokens] = []
        for call in self.model_calls:
            if call.tokens is None:
                raise TokenContractError(
                    f"rollout {self.id}: response {call.response_id} carries no token ids; train on a "
                    "server that returns them, such as `gym-sdk serve`"
                )
            tokens.append(call.tokens)
        return tokens


class Group(_Data):
    """The rollouts of one task, in order of their index."""

    task: Task
    rollouts: list[Rollout]
    epoch: int = 0

    @property
    def rewards(self) -> list[float]:
        """The rewards of the rollouts that have one."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]

    @property
    def valid(self) -> list[Rollout]:
        """The rollouts that have a reward."""
        return [rollout for rollout in self.rollouts if rollout.ok]

    @property
    def mean_reward(self) -> float | None:
        """Mean over the rollouts that have a reward; None if none has."""
        rewards = self.rewards
        return sum(rewards) / len(rewards) if rewards else None

    def sequences(self, *, abandoned: bool = True) -> list[TokenSequence]:
        """Return the training rows of the valid rollouts, with their advantages over the group.

        The advantages are `gym_sdk.tokens.group_advantages` with its defaults (GRPO); a rollout without
        reward has no rows.

        Args:
            abandoned: as for `Rollout.sequences`.
        """
        advantages = group_advantages([rollout.reward for rollout in self.rollouts])
        rows: list[TokenSequence] = []
        for rollout, advantage in zip(self.rollouts, advantages, strict=True):
            if advantage is None:
                continue
            for row in rollout.sequences(abandoned=abandoned):
                row.advantage = advantage
                rows.append(row)
        return rows
