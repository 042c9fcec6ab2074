"""How a captured rollout ended, read off its model calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gym_sdk.capture.calls import CapturedCall
from gym_sdk.errors import ConfigurationError, PolicyError, TransportError
from gym_sdk.schema import FunctionCall, Truncation

__all__ = ["call_metrics", "truncation_of"]


def truncation_of(calls: Sequence[CapturedCall]) -> Truncation | None:
    """Return which limit cut the last model call, or None if it came to its end.

    Calls that the agent itself gave up, or that the rollout's end aborted, do not count.

    Raises:
        ConfigurationError: there is no model call.
        TransportError: the last call failed for a reason of infrastructure, or none came to an end.
        PolicyError: the last call was refused.
    """
    if not calls:
        raise ConfigurationError(
            "the agent made no model call; give it the session's base_url, e.g. session.openai()"
        )
    counted = [call for call in calls if call.status != "cancelled" or call.response_id is not None]
    if not counted:
        raise TransportError("all model calls of the agent were cancelled", retryable=True)
    last = counted[-1]
    if last.error is not None:
        return _refused(last, answered=any(call.response_id is not None for call in counted))
    if last.status == "incomplete":
        limit = last.sampling.get("max_output_tokens")
        used = last.usage.output_tokens if last.usage is not None else None
        return Truncation.CONTEXT if limit is None or (used or 0) < limit else Truncation.TOKENS
    if last.status != "completed":
        raise TransportError(f"the last model call ended as {last.status}", retryable=True)
    return None


def _refused(call: CapturedCall, *, answered: bool) -> Truncation:
    error = call.error
    assert error is not None
    if error.code == "context_length_exceeded" and answered:
        return Truncation.CONTEXT
    text = f"the last model call ended with {error.status} ({error.error}): {error.message}"
    if call.status == "failed":
        raise TransportError(text, retryable=True, status=error.status)
    raise PolicyError(text, status=error.status, code=error.code, param=error.param)


def call_metrics(calls: Sequence[CapturedCall], silent_forks: int) -> dict[str, float]:
    """Count what the calls say; `forks` and the like only where there are any."""
    answered = [call for call in calls if call.response_id is not None]
    metrics = {
        "turns": float(len(answered)),
        "tool_calls": float(sum(isinstance(item, FunctionCall) for call in answered for item in call.output)),
    }
    endings = Counter(call.status for call in calls if call.response_id is None)
    rare = {
        "forks": silent_forks + sum(call.fork is not None for call in answered),
        "unparsed_calls": sum(call.unparsed_calls for call in answered),
        **{f"{status}_calls": endings[status] for status in ("refused", "failed", "cancelled")},
    }
    return metrics | {name: float(count) for name, count in rare.items() if count}
