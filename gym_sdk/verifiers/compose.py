"""Verifiers made of verifiers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.concurrent import run_together
from gym_sdk.verifiers.protocol import Verifier, VerifierResult, named, run_verifier, verifier_name
from gym_sdk.verifiers.results import as_reward

__all__ = ["gated", "mapped", "weighted"]


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
        _check_finite(f"weighted: the weight of {name!r}", part[1])
    chosen = dict(parts)

    async def verify(rollout: Rollout) -> Reward:
        rewards = await run_together(
            [functools.partial(run_verifier, verifier, rollout) for verifier, _ in chosen.values()]
        )
        components: dict[str, float] = {}
        for name, reward in zip(chosen, rewards, strict=True):
            components |= _under(name, reward)
        weights = (weight for _, weight in chosen.values())
        value = math.fsum(weight * reward.value for weight, reward in zip(weights, rewards, strict=True))
        return Reward(value=value, components=components)

    return named(f"weighted({', '.join(chosen)})", verify)


def gated(
    condition: Verifier, verifier: Verifier, *, threshold: float = 1.0, otherwise: float = 0.0
) -> Verifier:
    """Make a verifier that scores only what passes a condition, e.g. an answer's form before its content.

    The second verifier does not run where the condition's reward stays below the threshold: a judge costs
    nothing there. Components: `gate` (the condition's reward) and, where the gate is open, `score`; their own
    components follow as `gate/component` and `score/component`. A condition that fails is a failure, not a
    closed gate.

    Args:
        condition: decides whether the gate is open.
        verifier: gives the reward then.
        threshold: least reward of the condition that opens the gate.
        otherwise: the reward while it is closed.

    Raises:
        ConfigurationError: a number is not finite.
    """
    _check_finite("gated: threshold", threshold)
    _check_finite("gated: otherwise", otherwise)

    async def verify(rollout: Rollout) -> Reward:
        gate = await run_verifier(condition, rollout)
        if gate.value < threshold:
            return Reward(value=otherwise, components=_under("gate", gate))
        reward = await run_verifier(verifier, rollout)
        return Reward(value=reward.value, components=_under("gate", gate) | _under("score", reward))

    return named(f"gated({verifier_name(condition)}, {verifier_name(verifier)})", verify)


def mapped(verifier: Verifier, function: Callable[[float], VerifierResult]) -> Verifier:
    """Make a verifier whose reward is a function of another's, e.g. clipped or put on another scale.

    `mapped(judged, lambda score: min(score, 0.9))`. The reward as it was is the component `score`, with the
    verifier's own components as `score/component`.

    Args:
        verifier: what is changed.
        function: from its reward to the new one; it runs on the event loop and must not block.
    """
    name = f"mapped({verifier_name(verifier)})"

    async def verify(rollout: Rollout) -> Reward:
        reward = await run_verifier(verifier, rollout)
        changed = as_reward(function(reward.value), name)
        return Reward(value=changed.value, components=_under("score", reward) | changed.components)

    return named(name, verify)


def _under(name: str, reward: Reward) -> dict[str, float]:
    """Name a reward and its components in a larger one."""
    return {name: reward.value} | {f"{name}/{key}": value for key, value in reward.components.items()}


def _check_finite(what: str, value: object) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"{what} must be finite, not {value!r:.80}")
