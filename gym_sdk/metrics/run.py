"""The numbers of a run, counted as its rollouts finish, in bounded memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Self

from gym_sdk.metrics.estimates import pass_at_k, pass_hat_k
from gym_sdk.metrics.groups import RewardMoments
from gym_sdk.metrics.sketch import QuantileSketch
from gym_sdk.metrics.throughput import Throughput
from gym_sdk.schema import Cancellation, FailureKind, Group, Outcome, Rollout, Truncation

__all__ = ["MetricsConfig", "RunMetrics"]

_TOTALS: Final = (
    "tool_calls",
    "tool_errors",
    "forks",
    "unreported_forks",
    "unparsed_calls",
    "lost_states",
    "teardown_errors",
    "cut_tool_outputs",
    "refused_calls",
    "failed_calls",
    "cancelled_calls",
)
"""Entries of `Rollout.metrics` that are counts, and are added up."""

_KNOWN: Final = frozenset({*_TOTALS, "turns", "tools_offered", "staleness", "group_scored"})


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """What `RunMetrics` counts, and how finely."""

    threshold: float = 1.0
    """A rollout is correct from this reward on (pass@k, pass^k)."""
    ks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """The k of pass@k and pass^k; one counts for the groups that have at least so many rewards."""
    relative_error: float = 0.01
    """Of percentiles over more than 256 different values (see `QuantileSketch`)."""
    window_s: float = 60.0
    """What the recent throughput looks back on."""
    most_names: int = 64
    """Names of each kind that a run makes up itself (errors, reward components, metrics of verifiers); what
    comes later is counted under `other`."""


class RunMetrics:
    """Counts rollouts and groups as they finish; `metrics()` may be asked at any time.

    Its memory does not grow with the run. One object belongs to one event loop or thread. All names are
    in `docs/metrics.md`.

    Args:
        config: thresholds and precision.
        clock: for throughput; returns seconds and never goes backwards.
    """

    def __init__(
        self, config: MetricsConfig | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config or MetricsConfig()
        self._throughput = Throughput(self._config.window_s, clock=clock)
        self._duration_s: float | None = None
        self._rollouts = 0
        self._model_calls = 0
        self._retries = 0
        self._generated = 0
        self._outcomes = dict.fromkeys(Outcome, 0)
        self._truncations = dict.fromkeys(Truncation, 0)
        self._cancellations = dict.fromkeys(Cancellation, 0)
        self._failures = dict.fromkeys(FailureKind, 0)
        self._errors: dict[str, int] = {}
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._rewards = _Moments()
        self._components: dict[str, _Moments] = {}
        self._others: dict[str, _Moments] = {}
        self._groups = _GroupCounts(self._config)
        self._turns, self._tool_calls, self._tool_errors = self._sketch(), self._sketch(), self._sketch()
        self._call_retries, self._staleness = self._sketch(), self._sketch()
        self._prompt, self._generation, self._sequence = self._sketch(), self._sketch(), self._sketch()
        self._rollout_s, self._model_s, self._tool_s = self._sketch(), self._sketch(), self._sketch()
        self._verifier_s, self._wait_s = self._sketch(), self._sketch()

    @classmethod
    def of(
        cls, groups: Iterable[Group], *, duration_s: float = 0.0, config: MetricsConfig | None = None
    ) -> Self:
        """Count groups of a run that is over.

        Args:
            groups: with their rollouts.
            duration_s: how long the run took; 0 if that is unknown, and then there is no throughput.
            config: as for the class.
        """
        counted = cls(config)
        counted._duration_s = duration_s
        for group in groups:
            for rollout in group.rollouts:
                counted.add_rollout(rollout)
            counted.add_group(group)
        return counted

    def add_rollout(self, rollout: Rollout) -> None:
        """Count a rollout that ended, however it did."""
        self._rollouts += 1
        outcome = rollout.outcome
        self._outcomes[outcome] += 1
        if rollout.truncation is not None:
            self._truncations[rollout.truncation] += 1
        if rollout.cancellation is not None:
            self._cancellations[rollout.cancellation] += 1
        if rollout.failure is not None:
            self._failures[rollout.failure.kind] += 1
            name = f"{rollout.failure.where}/{rollout.failure.error}"
            name = _bounded(name, self._errors, self._config.most_names)
            self._errors[name] = self._errors.get(name, 0) + 1
        if rollout.reward is not None:
            self._rewards.add(rollout.reward)
            for name, value in rollout.reward_components.items():
                self._add_named(self._components, name, value)
        ended = outcome is Outcome.COMPLETED or outcome is Outcome.TRUNCATED
        self._add_calls(rollout, ended)
        self._add_metrics(rollout, ended)
        if ended:
            self._add_timing(rollout)

    def add_group(self, group: Group) -> None:
        """Count what only a whole group tells; its rollouts are counted by `add_rollout`."""
        self._groups.add(group.rewards)

    def metrics(self) -> dict[str, float]:
        """Return all numbers by name. A mean or percentile of nothing is absent; counts are always there."""
        numbers: dict[str, float] = {"rollouts": self._rollouts}
        for family, counts in (
            ("outcomes", self._outcomes),
            ("truncations", self._truncations),
            ("cancellations", self._cancellations),
            ("failures", self._failures),
            ("errors", self._errors),
        ):
            numbers |= {f"{family}/{name}": count for name, count in counts.items()}
        numbers |= {
            "totals/model_calls": self._model_calls,
            "totals/generated_tokens": self._generated,
            "totals/retries": self._retries,
        }
        numbers |= {f"totals/{name}": total for name, total in self._totals.items()}
        numbers |= self._rewards.metrics("reward/", spread=True)
        for name, moments in self._components.items():
            numbers |= moments.metrics(f"reward_components/{name}_")
        for name, moments in self._others.items():
            numbers |= moments.metrics(f"verifier_metrics/{name}_")
        numbers |= self._groups.metrics()
        for name, sketch in self._distributions().items():
            numbers |= _percentiles(name, sketch)
        numbers |= self._throughput.metrics(self._duration_s)
        return {name: float(value) for name, value in numbers.items()}

    def _add_calls(self, rollout: Rollout, ended: bool) -> None:
        calls = rollout.model_calls
        retries = generated = longest = 0
        complete = bool(calls)
        for call in calls:
            retries += call.retries
            tokens = call.tokens
            if tokens is None:
                complete = False
                continue
            length = len(tokens.generation_token_ids)
            generated += length
            longest = max(longest, tokens.prompt_length + length)
        self._model_calls += len(calls)
        self._retries += retries
        self._generated += generated
        self._throughput.add(generated)
        if not ended:
            return
        self._turns.add(len(calls))
        self._call_retries.add(retries)
        if complete and calls[0].tokens is not None:
            self._prompt.add(calls[0].tokens.prompt_length)
            self._generation.add(generated)
            self._sequence.add(longest)

    def _add_metrics(self, rollout: Rollout, ended: bool) -> None:
        values, totals = rollout.metrics, self._totals
        for name, value in values.items():
            if name in totals:
                if value:
                    totals[name] += value
            elif name not in _KNOWN:
                self._add_named(self._others, name, value)
        if ended:
            self._tool_calls.add(values.get("tool_calls", 0.0))
            self._tool_errors.add(values.get("tool_errors", 0.0))
            staleness = values.get("staleness")
            if staleness is not None:
                self._staleness.add(staleness)

    def _add_timing(self, rollout: Rollout) -> None:
        timing = rollout.timing
        model_s, tool_s, verifier_s = timing.model_s, timing.tool_s, timing.verifier_s
        self._rollout_s.add(timing.duration_s)
        self._model_s.add(model_s)
        self._tool_s.add(tool_s)
        self._verifier_s.add(verifier_s)
        # concurrent calls add up, so that they can be longer than the rollout
        self._wait_s.add(max(0.0, timing.duration_s - model_s - tool_s - verifier_s))

    def _add_named(self, moments: dict[str, _Moments], name: str, value: float) -> None:
        entry = moments.get(name)
        if entry is None:
            name = _bounded(name, moments, self._config.most_names)
            entry = moments.setdefault(name, _Moments())
        entry.add(value)

    def _sketch(self) -> QuantileSketch:
        return QuantileSketch(self._config.relative_error)

    def _distributions(self) -> dict[str, QuantileSketch]:
        return {
            "tokens/prompt": self._prompt,
            "tokens/generated": self._generation,
            "tokens/sequence": self._sequence,
            "calls/turns": self._turns,
            "calls/tool_calls": self._tool_calls,
            "calls/tool_errors": self._tool_errors,
            "calls/retries": self._call_retries,
            "time/rollout_s": self._rollout_s,
            "time/model_s": self._model_s,
            "time/tool_s": self._tool_s,
            "time/verifier_s": self._verifier_s,
            "time/wait_s": self._wait_s,
            "staleness/steps": self._staleness,
        }


class _Moments:
    """Mean and standard deviation of a stream, without cancellation (Welford 1962)."""

    __slots__ = ("count", "mean", "squares")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    def metrics(self, prefix: str, *, spread: bool = False) -> dict[str, float]:
        numbers: dict[str, float] = {f"{prefix}count": self.count} if spread else {}
        if self.count:
            numbers[f"{prefix}mean"] = self.mean
            if spread:
                numbers[f"{prefix}std"] = math.sqrt(self.squares / self.count)
        return numbers


class _GroupCounts:
    """What groups tell: the mean reward's error, groups that teach nothing, pass@k."""

    def __init__(self, config: MetricsConfig) -> None:
        self._config = config
        self._moments = RewardMoments()
        self._groups = 0
        self._several = 0
        self._flat = 0
        self._zero = 0
        self._one = 0
        self._passes: dict[int, tuple[RewardMoments, RewardMoments]] = {}

    def add(self, rewards: list[float]) -> None:
        self._groups += 1
        self._moments.add(rewards)
        count = len(rewards)
        if count > 1:
            first = rewards[0]
            self._several += 1
            if all(reward == first for reward in rewards):
                self._flat += 1
                self._zero += first == 0.0
                self._one += first == 1.0
        correct = sum(reward >= self._config.threshold for reward in rewards)
        for k in self._config.ks:
            if k <= count:
                any_of, all_of = self._passes.setdefault(k, (RewardMoments(), RewardMoments()))
                any_of.add((pass_at_k(correct, count, k),))
                all_of.add((pass_hat_k(correct, count, k),))

    def metrics(self) -> dict[str, float]:
        numbers: dict[str, float] = {"groups": self._groups, "groups/without_reward": self._moments.left_out}
        error = self._moments.estimate().error
        if error is not None:
            numbers["reward/error"] = error
        if self._several:
            numbers["groups/flat_share"] = self._flat / self._several
            numbers["groups/all_zero_share"] = self._zero / self._several
            numbers["groups/all_one_share"] = self._one / self._several
        for k, (any_of, all_of) in sorted(self._passes.items()):
            numbers[f"pass_at/{k}"] = any_of.total / any_of.tasks
            numbers[f"pass_hat/{k}"] = all_of.total / all_of.tasks
            numbers[f"pass_left_out/{k}"] = self._groups - any_of.tasks
        return numbers


def _bounded(name: str, known: dict[str, int] | dict[str, _Moments], most: int) -> str:
    return name if name in known or len(known) < most else "other"


def _percentiles(name: str, sketch: QuantileSketch) -> dict[str, float]:
    values = {"mean": sketch.mean}
    values |= {f"p{percent}": sketch.quantile(percent / 100) for percent in (50, 95, 99)}
    values["max"] = sketch.greatest
    return {f"{name}_{what}": value for what, value in values.items() if value is not None}
