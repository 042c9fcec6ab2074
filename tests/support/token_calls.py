"""Model calls as hypothesis draws them: chains, branches, repeats and empty generations over few ids."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from gym_sdk.tokens import CallTokens, WeightSpan

ids = st.lists(st.integers(0, 2), max_size=3)
log_probs = st.sampled_from([-0.25, -0.5, -3.0])


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[WeightSpan, ...]:
    """No spans, or spans that cover a generation of this length."""
    if not length or draw(st.booleans()):
        return ()
    cut = draw(st.integers(0, length))
    pieces = [(0, cut), (cut, length)] if 0 < cut < length else [(0, length)]
    return tuple(WeightSpan(str(number), start, end) for number, (start, end) in enumerate(pieces))


@st.composite
def call_lists(draw: st.DrawFn, max_size: int = 7) -> list[CallTokens]:
    """Calls of one rollout in any order; some are linked, to calls that arrive before or after them."""
    calls: list[CallTokens] = []
    for _ in range(draw(st.integers(0, max_size))):
        calls.append(draw(_next_call(calls)))
    return draw(st.permutations(calls)) if draw(st.booleans()) else calls


@st.composite
def _next_call(draw: st.DrawFn, calls: Sequence[CallTokens]) -> CallTokens:
    kind = draw(st.sampled_from(["fresh", "extend", "link", "same prompt", "cut", "split", "repeat"]))
    old = draw(st.sampled_from(calls)) if calls else None
    generation = draw(ids)
    if kind == "repeat" and old is not None:
        generation = old.generation_token_ids
    if kind == "split" and old is not None:
        generation = old.generation_token_ids[1:]
    measured = [draw(log_probs) for _ in generation]
    own = (generation, measured, draw(spans(len(generation))))
    if old is None or kind == "fresh":
        return CallTokens([0, *draw(ids)], *own)
    if kind == "link":
        return CallTokens.extending(old, draw(ids), *own)
    if kind in ("same prompt", "repeat"):
        return CallTokens(list(old.prompt_token_ids), *own)
    if kind == "split":  # the same tokens as another call, more of them prompted
        return CallTokens([*old.prompt_token_ids, *old.generation_token_ids[:1]], *own)
    base = old.token_ids
    if kind == "cut":
        base = base[: draw(st.integers(0, len(base)))]
    return CallTokens([*base, *draw(ids)], *own)


def unlinked(calls: Sequence[CallTokens]) -> list[CallTokens]:
    """The same calls, each with its whole prompt."""
    return [
        CallTokens(
            list(call.prompt_token_ids),
            call.generation_token_ids,
            call.generation_log_probs,
            call.weight_versions,
        )
        for call in calls
    ]


def chain(length: int, new: int = 1, generated: int = 1) -> list[CallTokens]:
    """A conversation: calls that each extend the one before it."""
    calls = [CallTokens([7] * new, [8] * generated, [-0.5] * generated)]
    while len(calls) < length:
        calls.append(CallTokens.extending(calls[-1], [7] * new, [8] * generated, [-0.5] * generated))
    return calls
