"""Calls that came with whole prompts, linked to the calls that they extend."""

from __future__ import annotations

from collections.abc import Sequence

from gym_sdk.tokens.calls import CallTokens
from gym_sdk.tokens.prefixes import Place, PrefixTrie

__all__ = ["chained"]


def chained(calls: Sequence[CallTokens]) -> list[CallTokens]:
    """Link the calls of one rollout to each other, so that together they hold each token once.

    A call that is linked to an earlier one stays so. The parent of any other becomes the longest earlier call
    whose tokens are a prefix of its prompt; of several equally long ones, the newest. Calls that need no
    change come back as the same objects, so linking `[*linked, new]` again costs one prompt.

    Args:
        calls: in order of arrival.

    Returns:
        An equal call for each call, in the same order.
    """
    trie = PrefixTrie()
    linked: list[CallTokens] = []
    successors: dict[int, CallTokens] = {}  # by the id of the call in `calls` that they stand for
    for call in calls:
        prompt, end = trie.insert_call(call)
        parent, new_prompt_ids = call.prompt_after(successors)
        if parent is not None:
            parent = successors[id(parent)]
        elif (found := _newest_end(prompt)) is not None:
            parent = linked[found]
            new_prompt_ids = new_prompt_ids[parent.total_tokens :]
        if parent is not call.parent and parent is not None:
            successor = _extend(parent, call, new_prompt_ids)
        else:
            successor = call
        successors[id(call)] = successor
        end.calls.append(len(linked))
        linked.append(successor)
    trie.clear()
    return linked


def _newest_end(prompt: Place) -> int | None:
    place: Place | None = prompt
    while place is not None:
        if place.calls:
            return place.calls[-1]
        place = place.above
    return None


def _extend(parent: CallTokens, call: CallTokens, new_prompt_ids: list[int]) -> CallTokens:
    return CallTokens.extending(
        parent,
        new_prompt_ids,
        call.generation_token_ids,
        call.generation_log_probs,
        call.weight_versions,
    )
