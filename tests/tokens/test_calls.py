"""Model calls, whole and as extensions of each other."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import weakref

import pytest
from hypothesis import given, settings
from support.token_calls import call_lists, chain, unlinked

from gym_sdk.errors import TokenContractError
from gym_sdk.tokens import CallTokens, WeightSpan, chained


def test_an_extension_is_its_parent_and_what_is_new() -> None:
    first = CallTokens([1, 2], [3], [-0.5])
    second = CallTokens.extending(first, [4, 5], [6, 7], [-0.1, -0.2], (WeightSpan("0", 0, 2),))
    assert second.parent is first
    assert second.new_prompt_ids == [4, 5]
    assert second.prompt_token_ids == [1, 2, 3, 4, 5]
    assert second.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert (second.prompt_length, second.total_tokens, second.own_tokens) == (5, 7, 4)
    assert (first.prompt_length, first.total_tokens, first.own_tokens) == (2, 3, 3)
    assert second == CallTokens([1, 2, 3, 4, 5], [6, 7], [-0.1, -0.2], (WeightSpan("0", 0, 2),))
    assert repr(second) == "<CallTokens: 5 prompt tokens (2 new), 2 generated>"
    assert repr(first) == "<CallTokens: 2 prompt tokens, 1 generated>"


@pytest.mark.parametrize(
    "other",
    [
        CallTokens([9, 2, 3], [4], [-0.5], (WeightSpan("0", 0, 1),)),
        CallTokens([1, 2, 3, 4], [4], [-0.5], (WeightSpan("0", 0, 1),)),
        CallTokens([1, 2, 3], [9], [-0.5], (WeightSpan("0", 0, 1),)),
        CallTokens([1, 2, 3], [4], [-0.6], (WeightSpan("0", 0, 1),)),
        CallTokens([1, 2, 3], [4], [-0.5], (WeightSpan("1", 0, 1),)),
        CallTokens.extending(CallTokens([1, 2], [9], [-0.5]), [], [4], [-0.5], (WeightSpan("0", 0, 1),)),
        "CallTokens",
    ],
)
def test_calls_that_differ_in_any_field_are_not_equal(other: object) -> None:
    call = CallTokens.extending(CallTokens([1, 2], [3], [-9.0]), [], [4], [-0.5], (WeightSpan("0", 0, 1),))
    assert call != other
    assert call == CallTokens([1, 2, 3], [4], [-0.5], (WeightSpan("0", 0, 1),))


def test_a_call_is_not_to_be_changed() -> None:
    call = CallTokens([1], [2], [-0.5])
    with pytest.raises(AttributeError):
        call.generation_token_ids = [3]  # type: ignore[misc]
    with pytest.raises(AttributeError):
        call.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(call)


IMPOSSIBLE = [
    ([3], [-0.1, -0.2], (), "generation_log_probs has 2 entries for 1"),
    ([3], [math.nan], (), r"generation_log_probs\[0\] is nan"),
    ([3, 4], [-0.5, 0.5], (), r"generation_log_probs\[1\] is 0.5; .* at most 0"),
    ([3], [math.inf], (), r"generation_log_probs\[0\] is inf"),
    ([3], [-math.inf], (), r"generation_log_probs\[0\] is -inf; .* finite"),
    ([-3], [-0.5], (), "generation_token_ids holds a negative id"),
    ([3, 4], [-0.5, -0.5], (WeightSpan("0", 0, 1),), "weight_versions cover 1 of 2"),
    (
        [3, 4],
        [-0.5, -0.5],
        (WeightSpan("0", 0, 1), WeightSpan("1", 0, 2)),
        "weight_versions must .* in order",
    ),
]


@pytest.mark.parametrize(("generation", "log_probs", "spans", "complaint"), IMPOSSIBLE)
def test_impossible_generations_are_refused_by_name(
    generation: list[int], log_probs: list[float], spans: tuple[WeightSpan, ...], complaint: str
) -> None:
    with pytest.raises(TokenContractError, match=complaint):
        CallTokens([1], generation, log_probs, spans)
    with pytest.raises(TokenContractError, match=complaint):
        CallTokens.extending(CallTokens([1], [2], [-0.5]), [], generation, log_probs, spans)


def test_negative_prompt_ids_are_refused_by_name() -> None:
    with pytest.raises(TokenContractError, match=r"^prompt_token_ids holds a negative id"):
        CallTokens([1, -1], [], [])
    with pytest.raises(TokenContractError, match=r"^new_prompt_token_ids holds a negative id"):
        CallTokens.extending(CallTokens([1], [], []), [-1], [], [])


def test_rounding_above_zero_is_let_through() -> None:
    assert CallTokens([1], [2], [1e-6]).generation_log_probs == [1e-6]


def test_a_deep_chain_works_without_recursion() -> None:
    calls = chain(10_000)
    last = calls[-1]
    assert last.prompt_token_ids == [7, 8] * 9_999 + [7]
    assert last.token_ids == [7, 8] * 10_000
    assert sum(call.own_tokens for call in calls) == last.total_tokens == 20_000
    again = pickle.loads(pickle.dumps(last))
    assert again == last
    assert copy.deepcopy(last) == last
    assert last == chain(10_000)[-1]


def test_a_deep_chain_is_freed_without_recursion() -> None:
    class Ids(list[int]):
        """A list that can be watched."""

    first = Ids([1])
    watched = weakref.ref(first)
    call = CallTokens(first, [2], [-0.5])
    del first
    for _ in range(200_000):
        call = CallTokens.extending(call, [], [], [])
    assert watched() is not None
    del call
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("order", [1, -1])
def test_pickled_calls_stay_linked_and_share_their_parents(order: int) -> None:
    calls = chain(1_500)[::order]
    data = pickle.dumps(calls)
    again: list[CallTokens] = pickle.loads(data)
    assert again == calls
    oldest_first = again[::order]
    assert oldest_first[0].parent is None
    assert all(call.parent is before for before, call in itertools.pairwise(oldest_first))
    assert len(data) < 2 * len(pickle.dumps(calls[-1 if order == 1 else 0]))  # no more than the longest alone


@settings(deadline=None)
@given(call_lists())
def test_copies_are_equal(calls: list[CallTokens]) -> None:
    assert pickle.loads(pickle.dumps(calls)) == calls
    assert copy.deepcopy(calls) == calls
    assert [copy.copy(call) for call in calls] == calls
    assert unlinked(calls) == calls


@settings(deadline=None)
@given(call_lists())
def test_chained_calls_are_equal_and_link_to_the_longest_earlier_call(calls: list[CallTokens]) -> None:
    whole = unlinked(calls)
    linked = chained(whole)
    assert linked == calls
    for index, call in enumerate(linked):
        earlier = linked[:index]
        prompt = call.prompt_token_ids
        prefixes = [old.total_tokens for old in earlier if prompt[: old.total_tokens] == old.token_ids]
        if not prefixes:
            assert call is whole[index]
        else:
            assert call.parent is not None
            assert call.parent.total_tokens == max(prefixes)
            assert any(call.parent is old for old in earlier)
    assert all(new is old for new, old in zip(chained(linked), linked, strict=True))


@settings(deadline=None)
@given(call_lists())
def test_chaining_keeps_links_and_mixes_with_them(calls: list[CallTokens]) -> None:
    linked = chained(calls)
    assert linked == calls
    for index, (new, old) in enumerate(zip(linked, calls, strict=True)):
        parents = [place for place, call in enumerate(calls[:index]) if call is old.parent]
        if parents:
            assert new.parent is linked[parents[-1]]


def test_a_call_whose_parent_was_linked_follows_it() -> None:
    first = CallTokens([1], [2], [-0.5])
    second = CallTokens([1, 2, 3], [4], [-0.5])
    third = CallTokens.extending(second, [5], [6], [-0.5])
    linked = chained([first, second, third])
    assert linked == [first, second, third]
    assert linked[2].parent is linked[1]
    assert linked[1].parent is linked[0] is first
    assert sum(call.own_tokens for call in linked) == 6


def test_chained_calls_hold_each_token_once() -> None:
    calls = chain(200, new=30, generated=10)
    linked = chained(unlinked(calls))
    assert sum(call.own_tokens for call in linked) == calls[-1].total_tokens == 200 * 40
