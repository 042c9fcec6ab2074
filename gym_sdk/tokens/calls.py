"""The tokens of one model call: what was prompted, what was sampled, and how likely it was."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from gym_sdk.tokens.bundle import WeightSpan, check_generation, check_ids, check_token_bundle

__all__ = ["CallTokens"]


class CallTokens:
    """The exact tokens of one prompt-to-generation round trip.

    A call is made either whole, or as the extension of another call (`CallTokens.extending`): its prompt is
    then all tokens of that parent and the new ones, and only what is new is stored. So the k calls of a
    conversation of n tokens hold O(n) ids, not O(k·n). Both kinds behave alike and are equal if their
    tokens are.

    A call does not change after it is made. It takes the lists that it is given as its own, and hands out its
    own: whoever wants to change one copies it.

    Args:
        prompt_token_ids: all tokens the policy was conditioned on; length P.
        generation_token_ids: the sampled tokens, the stop token included; length G.
        generation_log_probs: natural-log probability of each sampled token under the sampling
            distribution at the request's temperature, before top-k/top-p truncation; length G.
            Greedy decoding reports temperature 1.
        weight_versions: spans over the G generated tokens, in order, without gaps or overlap; empty
            if the engine does not report them.

    Raises:
        TokenContractError: lengths disagree, an id is negative, or a log-prob is not finite or positive.
    """

    __slots__ = (
        "_depth",
        "_generation_log_probs",
        "_generation_token_ids",
        "_new_prompt_ids",
        "_parent",
        "_prompt_length",
        "_weight_versions",
    )

    _parent: CallTokens | None
    _new_prompt_ids: list[int]
    _generation_token_ids: list[int]
    _generation_log_probs: list[float]
    _weight_versions: tuple[WeightSpan, ...]
    _prompt_length: int
    _depth: int

    def __init__(
        self,
        prompt_token_ids: list[int],
        generation_token_ids: list[int],
        generation_log_probs: list[float],
        weight_versions: tuple[WeightSpan, ...] = (),
    ) -> None:
        check_token_bundle(prompt_token_ids, generation_token_ids, generation_log_probs, weight_versions)
        self._set(None, prompt_token_ids, generation_token_ids, generation_log_probs, weight_versions)

    @classmethod
    def extending(
        cls,
        parent: CallTokens,
        new_prompt_ids: list[int],
        generation_token_ids: list[int],
        generation_log_probs: list[float],
        weight_versions: tuple[WeightSpan, ...] = (),
    ) -> CallTokens:
        """Make the call whose prompt is all tokens of `parent`, then `new_prompt_ids`.

        Only the new parts are stored and checked: the cost does not depend on the parent's length.

        Args:
            parent: the call that is extended.
            new_prompt_ids: what the prompt adds to the parent's prompt and generation; may be empty.
            generation_token_ids: as in `CallTokens`.
            generation_log_probs: as in `CallTokens`.
            weight_versions: as in `CallTokens`.

        Raises:
            TokenContractError: as for `CallTokens`, for the new parts.
        """
        check_ids(new_prompt_ids, "new_prompt_token_ids")
        check_generation(generation_token_ids, generation_log_probs, weight_versions)
        call = cls.__new__(cls)
        call._set(parent, new_prompt_ids, generation_token_ids, generation_log_probs, weight_versions)
        return call

    def _set(
        self,
        parent: CallTokens | None,
        new_prompt_ids: list[int],
        generation_token_ids: list[int],
        generation_log_probs: list[float],
        weight_versions: tuple[WeightSpan, ...],
    ) -> None:
        self._parent = parent
        self._new_prompt_ids = new_prompt_ids
        self._generation_token_ids = generation_token_ids
        self._generation_log_probs = generation_log_probs
        self._weight_versions = weight_versions
        self._prompt_length = len(new_prompt_ids) + (0 if parent is None else parent.total_tokens)
        self._depth = 0 if parent is None else parent._depth + 1

    @property
    def parent(self) -> CallTokens | None:
        """The call that this one extends; None if it was made whole."""
        return self._parent

    @property
    def new_prompt_ids(self) -> list[int]:
        """What the prompt adds to the parent's tokens; the whole prompt if there is no parent."""
        return self._new_prompt_ids

    @property
    def generation_token_ids(self) -> list[int]:
        """The G sampled tokens."""
        return self._generation_token_ids

    @property
    def generation_log_probs(self) -> list[float]:
        """Natural-log probability of each of the G sampled tokens."""
        return self._generation_log_probs

    @property
    def weight_versions(self) -> tuple[WeightSpan, ...]:
        """Which weights sampled which of the G tokens; empty if unknown."""
        return self._weight_versions

    @property
    def prompt_token_ids(self) -> list[int]:
        """All P prompt tokens. For a call with a parent a new list at each access, in O(P)."""
        if self._parent is None:
            return self._new_prompt_ids
        return self.prompt_after(())[1]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generation, in one new list of length P + G."""
        return self.prompt_token_ids + self._generation_token_ids

    @property
    def prompt_length(self) -> int:
        """P, without putting the prompt together."""
        return self._prompt_length

    @property
    def total_tokens(self) -> int:
        """P + G."""
        return self._prompt_length + len(self._generation_token_ids)

    @property
    def own_tokens(self) -> int:
        """How many ids this call stores itself: new prompt tokens and generated ones."""
        return len(self._new_prompt_ids) + len(self._generation_token_ids)

    def prompt_after(self, known: Container[int]) -> tuple[CallTokens | None, list[int]]:
        """Return the closest ancestor that is known, and what the prompt adds to its tokens.

        Args:
            known: the `id()` of each call that is known.

        Returns:
            None and the whole prompt if no ancestor is known.
        """
        parts = [self._new_prompt_ids]
        call = self._parent
        while call is not None and id(call) not in known:  # a loop: chains are longer than Python's stack
            parts += (call._generation_token_ids, call._new_prompt_ids)
            call = call._parent
        if len(parts) == 1:
            return call, self._new_prompt_ids
        tokens: list[int] = []
        for part in reversed(parts):
            tokens += part
        return call, tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallTokens):
            return NotImplemented
        if self is other:
            return True
        if (
            self._prompt_length != other._prompt_length
            or self._generation_token_ids != other._generation_token_ids
            or self._generation_log_probs != other._generation_log_probs
            or self._weight_versions != other._weight_versions
        ):
            return False
        if self._parent is other._parent:
            return self._new_prompt_ids == other._new_prompt_ids
        return self.prompt_token_ids == other.prompt_token_ids

    __hash__ = None  # type: ignore[assignment]  # equal by the content of lists

    def __repr__(self) -> str:
        new = "" if self._parent is None else f" ({len(self._new_prompt_ids)} new)"
        generated = len(self._generation_token_ids)
        return f"<CallTokens: {self._prompt_length} prompt tokens{new}, {generated} generated>"

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickler that follows parents one by one runs out of stack. Depth d names the ancestor at d without
        # its lowest bit and then, oldest first, those in between: each finds its own ancestors written, so
        # the pickler nests log2(k) deep, k calls cost k·log2(k) references, and shared parents stay shared.
        line: list[CallTokens] = []
        call = self._parent
        for _ in range(self._depth & -self._depth):
            assert call is not None
            line.append(call)
            call = call._parent
        own = (
            self._new_prompt_ids,
            self._generation_token_ids,
            self._generation_log_probs,
            self._weight_versions,
        )
        return _rebuild, (tuple(reversed(line)), *own)


def _rebuild(line: tuple[CallTokens, ...], *own: Any) -> CallTokens:
    call = CallTokens.__new__(CallTokens)
    call._set(line[-1] if line else None, *own)
    return call
