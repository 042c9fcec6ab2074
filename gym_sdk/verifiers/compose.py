"""Verifiers made of verifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import anyio

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.protocol import Verifier, named, run_verifier

__all__ = ["weighted"]


def weighted(parts: Mapping[str, tuple[Verifier, float]]) -> Verifier:
    """Make a verifier whose reward is the weighted sum of others, which run concurrently.

    The components are the unweighted rewards under the names given here; a part's own components follow as
    `name/component`. A weight of 0 reports a part without counting it. If one part fails, the rollout fails.

    Args:
        parts: verifier and weight by name.

    Raises:
        ConfigurationError: no parts, or a weight that is not a finite number.
    """
    if not parts:
        raise ConfigurationError("weighted needs at least one verifier")
    for name, part in parts.items():
        if not (isinstance(part, tuple) and len(part) == 2 and callable(part[0])):
            raise ConfigurationError(f"weighted: {name!r} must be (verifier, weight), not {part!r:.80}")
        weight = part[1]
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigurationError(f"weighted: the weight of {name!r} must be finite, not {weight!r:.80}")
    chosen = dict(parts)

    async def verify(rollout: Rollout) -> Reward:
        rewards: dict[str, Reward] = {}
        failures: list[VerifierError] = []

        async def score(name: str, verifier: Verifier) -> None:
            try:
                rewards[name] = await run_verifier(verifier, rollout)
            except VerifierError as error:
                # not raised here: a task group would wrap it in an exception group
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for name, (verifier, _) in chosen.items():
                group.start_soon(score, name, verifier)
        if failures:
            raise failures[0]
        components: dict[str, float] = {}
        for name in chosen:
            components[name] = rewards[name].value
            components.update({f"{name}/{key}": value for key, value in rewards[name].components.items()})
        return Reward(
            value=math.fsum(weight * rewards[name].value for name, (_, weight) in chosen.items()),
            components=components,
        )

    return named(f"weighted({', '.join(chosen)})", verify)
