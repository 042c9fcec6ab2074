"""Group verifiers that compare rollouts with each other: in pairs, or all at once."""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gym_sdk.calling import call_function
from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.concurrent import run_together
from gym_sdk.verifiers.faults import verifier_faults
from gym_sdk.verifiers.group import GroupVerifier
from gym_sdk.verifiers.protocol import verifier_name
from gym_sdk.verifiers.results import as_reward

__all__ = ["Compare", "Pairing", "Rank", "pairwise", "ranking"]

Compare: TypeAlias = Callable[[Rollout, Rollout], Awaitable[float] | float]
"""How much better the first rollout is than the second: 1 if it wins, 0 if it loses, 0.5 for a tie."""

Rank: TypeAlias = Callable[[Sequence[Rollout]], Awaitable[Sequence[Any]] | Sequence[Any]]
"""The positions of the rollouts (from 0), the best first; a list among them is a tie."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which rollouts of a group meet.

    Raises:
        ConfigurationError: a value is not positive.
    """

    opponents: int | None = None
    """How many others each rollout meets, drawn at random; None for all. A group of n then costs
    n * opponents / 2 comparisons instead of n * (n - 1) / 2. Where that is no whole number, one rollout meets
    one more."""
    both_orders: bool = False
    """Whether each pair is compared in both orders and the mean counts, at twice the cost. Without it each
    rollout still stands first about as often as second, so a judge's preference for a place is noise, not
    bias."""
    seed: int = 0
    """With the task's id and epoch it decides who meets whom, so that a repeated run compares the same."""
    concurrency: int = 16
    """Comparisons of one group at once."""

    def __post_init__(self) -> None:
        if self.opponents is not None and self.opponents < 1:
            raise ConfigurationError(f"Pairing.opponents must be at least 1, not {self.opponents}")
        if self.concurrency < 1:
            raise ConfigurationError(f"Pairing.concurrency must be at least 1, not {self.concurrency}")

    def pairs(self, rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
        """Return who meets whom, as positions; the first of a pair is shown first. No pair comes twice.

        The rollouts are put on a ring in random order, and each meets its nearest neighbours.
        """
        n = len(rollouts)
        if n < 2:
            return []
        first = rollouts[0]
        ring = list(range(n))
        random.Random(f"{self.seed}/{first.task_id}/{first.epoch}").shuffle(ring)
        degree = n - 1 if self.opponents is None else min(self.opponents, n - 1)
        places = [(i, (i + step) % n) for step in range(1, degree // 2 + 1) for i in range(n)]
        if degree % 2:  # an odd number: one more for each, from across the ring
            places += [(i, i + n // 2) for i in range((n + 1) // 2)]
        return [(ring[a], ring[b]) for a, b in places]


def pairwise(compare: Compare, pairing: Pairing | None = None) -> GroupVerifier:
    """Make a group verifier: each rollout's mean score against others, in [0, 1].

    The mean score against all others is the share of them that it beats, a tie counting half. A rollout
    without an opponent, because no other finished, gets 0.5. The component `comparisons` says how many
    decided. If one comparison fails, the group has no rewards.

    Args:
        compare: compares two rollouts; a coroutine function, or a plain one, which runs in a thread. See
            `Judge.compare`.
        pairing: who meets whom; by default all pairs, once.
    """
    pairing = pairing or Pairing()
    name = f"pairwise({verifier_name(compare)})"

    async def score(a: Rollout, b: Rollout) -> float:
        with verifier_faults(name):
            value = as_reward(await call_function(compare, a, b), name).value
            if not 0 <= value <= 1:
                raise VerifierError(
                    f"{name} of rollouts {a.id} and {b.id} returned {value:g}; expected a number in [0, 1]",
                    verifier=name,
                )
            return value

    async def verify(rollouts: Sequence[Rollout]) -> list[Reward]:
        pairs = pairing.pairs(rollouts)
        played = pairs + [(b, a) for a, b in pairs] if pairing.both_orders else pairs
        calls = [functools.partial(score, rollouts[a], rollouts[b]) for a, b in played]
        values = await run_together(calls, concurrency=pairing.concurrency)
        scores: list[list[float]] = [[] for _ in rollouts]
        for (a, b), value in zip(played, values, strict=True):
            scores[a].append(value)
            scores[b].append(1 - value)
        return [
            Reward(
                value=math.fsum(own) / len(own) if own else 0.5,
                components={"comparisons": float(len(own))},
            )
            for own in scores
        ]

    return _named(name, verify)


def ranking(rank: Rank) -> GroupVerifier:
    """Make a group verifier: each rollout's place in an order, in [0, 1].

    The reward is (n - r) / (n - 1) for n rollouts and the rank r, counted from 1 for the best; rollouts that
    tie share the mean of their ranks. So the best gets 1, the worst 0, and each the share of the others that
    it beats, a tie counting half. A rollout alone gets 0.5.

    Args:
        rank: returns the positions of the rollouts, the best first, each exactly once; a list of positions in
            their place is a tie. `[2, [0, 3], 1]` says that the third is the best and the second the worst. A
            coroutine function, or a plain one, which runs in a thread.
    """
    name = f"ranking({verifier_name(rank)})"

    async def verify(rollouts: Sequence[Rollout]) -> list[float]:
        n = len(rollouts)
        tiers = _tiers(await call_function(rank, rollouts), n, name)
        rewards = [0.5] * n
        better = 0
        for tier in tiers:
            worse = n - better - len(tier)
            for position in tier:
                rewards[position] = (worse + (len(tier) - 1) / 2) / (n - 1) if n > 1 else 0.5
            better += len(tier)
        return rewards

    return _named(name, verify)


def _tiers(order: Any, n: int, name: str) -> list[list[int]]:
    """Read an order, and check that it names each position once."""
    try:
        tiers = [
            [operator.index(entry) for entry in tier] if _is_list(tier) else [operator.index(tier)]
            for tier in order
        ]
    except TypeError as error:
        raise VerifierError(
            f"{name} returned {order!r:.200}; expected positions from 0 to {n - 1}, or lists of them, "
            "the best first",
            verifier=name,
        ) from error
    named = [position for tier in tiers for position in tier]
    if sorted(named) != list(range(n)):
        missing = sorted(set(range(n)) - set(named))
        unknown = sorted(set(named) - set(range(n)))
        twice = sorted({position for position in named if named.count(position) > 1} - set(unknown))
        wrong = [
            f"{what}: {', '.join(map(str, positions[:10]))}"
            for what, positions in (("missing", missing), ("twice", twice), ("unknown", unknown))
            if positions
        ]
        raise VerifierError(
            f"{name} must name each position from 0 to {n - 1} once; {'; '.join(wrong)}", verifier=name
        )
    return tiers


def _is_list(tier: Any) -> bool:
    return isinstance(tier, Sequence) and not isinstance(tier, str | bytes)


def _named(name: str, function: Callable[[Sequence[Rollout]], Any]) -> GroupVerifier:
    function.__name__ = function.__qualname__ = name
    return function
