"""Verifiers that score the rollouts of a group together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Any, TypeAlias

from gym_sdk.calling import call_function
from gym_sdk.errors import VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.faults import verifier_faults
from gym_sdk.verifiers.protocol import VerifierResult, verifier_name, view_of
from gym_sdk.verifiers.results import as_reward

__all__ = ["GroupVerifier", "run_group_verifier"]

GroupVerifier: TypeAlias = Callable[
    [Sequence[Rollout]], Awaitable[Sequence[VerifierResult]] | Sequence[VerifierResult]
]
"""Scores the rollouts of one task: one result for each, in the same order. A coroutine function runs on the
event loop, a plain function in a worker thread. What each rollout's own verifier said is in its `reward` and
`reward_components`."""


async def run_group_verifier(verifier: GroupVerifier, rollouts: Sequence[Rollout]) -> list[Reward]:
    """Score the rollouts of a group.

    The verifier is given views of them (see `gym_sdk.verifiers.protocol.view_of`). Cancellation is passed on
    to it; a deadline is the caller's. It is not asked about no rollouts.

    Args:
        verifier: what scores them.
        rollouts: those of one task that finished (completed or truncated), in order of their index.

    Returns:
        A reward for each rollout, in order.

    Raises:
        VerifierError: the verifier raised, or returned another number of results, or one of them is no
            reward. No rollout has a reward then: a score that is relative to others means nothing alone.
    """
    if not rollouts:
        return []
    name = verifier_name(verifier)
    with verifier_faults(name):
        results = _listed(await call_function(verifier, [view_of(rollout) for rollout in rollouts]), name)
        if len(results) != len(rollouts):
            raise VerifierError(
                f"group verifier {name} returned {len(results)} results for {len(rollouts)} rollouts; "
                "expected one for each, in order",
                verifier=name,
            )
        return [
            as_reward(result, name, at=f", position {place} (rollout {rollout.id}),")
            for place, (result, rollout) in enumerate(zip(results, rollouts, strict=True))
        ]


def _listed(results: Any, name: str) -> list[Any]:
    """Accept any ordered collection, also a one-dimensional array."""
    if isinstance(results, Sequence) and not isinstance(results, str | bytes):
        return list(results)
    if getattr(results, "ndim", None) == 1:
        return list(results)
    hint = ""
    if results is None:
        hint = " (did it forget to return?)"
    elif isinstance(results, Mapping | Set):
        hint = ", which has no order"
    raise VerifierError(
        f"group verifier {name} returned {type(results).__name__}{hint}; expected a list with one result for "
        "each rollout",
        verifier=name,
    )
