"""A soft penalty on generations that are too long."""

from __future__ import annotations

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, named

__all__ = ["overlong"]


def overlong(max_tokens: int, buffer_tokens: int) -> Verifier:
    """Make a verifier: 0 for a generation well within its limit, falling to -1 at the limit.

    With y generated tokens, L = `max_tokens` and C = `buffer_tokens` (DAPO, arXiv:2503.14476, equation 13):
    0 if y <= L - C; (L - C - y) / C if L - C < y <= L; -1 if y > L. Tokens of all model calls count, those of
    prompts and tool outputs don't. Use it as a part:
    `weighted({"right": (numeric(), 1.0), "length": (overlong(16_384, 4_096), 1.0)})`.

    Args:
        max_tokens: generated tokens from which on the penalty is whole.
        buffer_tokens: over how many tokens before that it grows.

    Raises:
        ConfigurationError: not 0 < `buffer_tokens` <= `max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ConfigurationError(
            f"overlong: buffer_tokens must lie in 1 to max_tokens ({max_tokens}), not be {buffer_tokens}"
        )
    free = max_tokens - buffer_tokens

    async def verify(rollout: Rollout) -> float:
        generated = _generated_tokens(rollout)
        return 0.0 if generated <= free else max(-1.0, (free - generated) / buffer_tokens)

    return named("overlong", verify)


def _generated_tokens(rollout: Rollout) -> int:
    generated = 0
    for call in rollout.model_calls:
        if call.tokens is None:
            raise VerifierError(
                f"verifier overlong: response {call.response_id} of rollout {rollout.id} carries no token "
                "ids; use a server that returns them, such as `gym-sdk serve`",
                verifier="overlong",
            )
        generated += len(call.tokens.generation_token_ids)
    return generated
