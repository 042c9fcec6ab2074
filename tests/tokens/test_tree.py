"""The prefix tree of a rollout's calls and the rows it gives."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.token_calls import call_lists, chain, unlinked

from gym_sdk.tokens import CallTokens, TokenSequence, TokenTree, WeightSpan, merge_calls

Content = tuple[tuple[int, ...], tuple[int, ...]]


def content(call: CallTokens) -> Content:
    return tuple(call.prompt_token_ids), tuple(call.generation_token_ids)


def measured(call: CallTokens) -> tuple[list[float], list[tuple[int, int, str]]]:
    return call.generation_log_probs, [(s.start, s.end, s.version) for s in call.weight_versions]


def reference_rows(calls: Sequence[CallTokens]) -> list[TokenSequence]:
    """The rows by the definition, pair by pair: each generation asks all the others."""
    arrivals: dict[Content, list[int]] = {}
    for index, call in enumerate(calls):
        if call.generation_token_ids:
            arrivals.setdefault(content(call), []).append(index)
    nodes = list(arrivals)
    chosen = {node: min(arrivals[node], key=lambda index: (measured(calls[index]), index)) for node in nodes}

    def starts(node: Content, prompt: Sequence[int]) -> bool:
        tokens = node[0] + node[1]
        return tuple(prompt[: len(tokens)]) == tokens

    def parent(node: Content) -> Content | None:
        found = [other for other in nodes if starts(other, node[0])]
        return max(found, key=lambda other: (len(other[0] + other[1]), -len(other[0])), default=None)

    continued = {node: any(starts(node, call.prompt_token_ids) for call in calls) for node in nodes}

    def abandoned(node: Content) -> bool:
        same = [other for other in nodes if other[0] == node[0]]
        if any(continued[other] for other in same):
            return not continued[node]
        return node != max(same, key=lambda other: max(arrivals[other]))

    parents = {node: parent(node) for node in nodes}
    lines: dict[Content, list[Content]] = {}
    for leaf in nodes:
        if leaf in parents.values():
            continue
        line: list[Content] = [leaf]
        while (above := parents[line[0]]) is not None:
            line.insert(0, above)
        lines[leaf] = line
    ranked = sorted(
        lines, key=lambda leaf: (abandoned(leaf), -len(leaf[0] + leaf[1]), leaf[0] + leaf[1], len(leaf[0]))
    )
    home = {node: next(leaf for leaf in ranked if node in lines[leaf]) for node in nodes}
    rows = []
    for leaf, line in lines.items():
        tokens = list(leaf[0] + leaf[1])
        row = TokenSequence(tokens, [0] * len(tokens), [0.0] * len(tokens), abandoned=abandoned(leaf))
        for node in line:
            if home[node] != leaf:
                continue
            call = calls[chosen[node]]
            row.calls.append(chosen[node])
            for offset, value in enumerate(call.generation_log_probs):
                row.loss_mask[len(node[0]) + offset] = 1
                row.log_probs[len(node[0]) + offset] = value
            for span in call.weight_versions:
                moved = WeightSpan(span.version, span.start + len(node[0]), span.end + len(node[0]))
                row.weight_versions.append(moved)
        rows.append(row)
    rows.sort(key=lambda row: (row.abandoned, min(row.calls)))
    for row in rows[1:]:
        row.forked = True
    return rows


@settings(deadline=None)
@given(call_lists())
@example([CallTokens([0], [1], [-1.0]), CallTokens([0], [], []), CallTokens([0, 2], [1], [-1.0])])
@example(
    [
        CallTokens([0], [1, 2], [-1.0, -1.0]),
        CallTokens([0, 1], [2], [-1.0]),
        CallTokens([0, 1, 2], [1], [-1.0]),
    ]
)
@example(
    [
        CallTokens([0, 1], [2], [-1.0]),
        CallTokens([0], [1, 2], [-1.0, -1.0]),
        CallTokens([0, 1, 2], [1], [-1.0]),
    ]
)
@example(
    [
        CallTokens([0], [1], [-1.0]),
        CallTokens([0, 1, 2, 1], [1], [-1.0]),
        CallTokens([0, 1, 2], [1, 1], [-1.0, -1.0]),
    ]
)
def test_rows_are_those_of_the_reference(calls: list[CallTokens]) -> None:
    assert merge_calls(calls) == reference_rows(calls)


@settings(deadline=None)
@given(call_lists())
def test_links_make_no_difference(calls: list[CallTokens]) -> None:
    assert merge_calls(unlinked(calls)) == merge_calls(calls)


@settings(deadline=None)
@given(call_lists())
def test_each_generation_carries_loss_in_exactly_one_row(calls: list[CallTokens]) -> None:
    rows = merge_calls(calls)
    trained: Counter[Content] = Counter()
    for row in rows:
        length = len(row.token_ids)
        assert len(row.loss_mask) == len(row.log_probs) == length
        loss = [0] * length
        log_probs = [0.0] * length
        spans: list[WeightSpan] = []
        for index in row.calls:
            call = calls[index]
            start, end = call.prompt_length, call.total_tokens
            assert row.token_ids[:end] == call.token_ids
            assert not any(loss[start:end])
            loss[start:end] = [1] * (end - start)
            log_probs[start:end] = call.generation_log_probs
            spans += [WeightSpan(s.version, s.start + start, s.end + start) for s in call.weight_versions]
            trained[content(call)] += 1
        assert (row.loss_mask, row.log_probs, row.weight_versions) == (loss, log_probs, spans)
        assert calls[row.calls[-1]].token_ids == row.token_ids
        assert row.trained_tokens == sum(loss)
        assert not row.abandoned or len(row.calls) == 1
    assert set(trained.values()) <= {1}
    assert set(trained) == {content(call) for call in calls if call.generation_token_ids}
    assert [row.forked for row in rows] == [index > 0 for index in range(len(rows))]


@settings(deadline=None)
@given(call_lists())
def test_spans_cover_the_loss_of_calls_that_report_them(calls: list[CallTokens]) -> None:
    full = [
        CallTokens.extending(
            CallTokens(call.prompt_token_ids, [], []),
            [],
            call.generation_token_ids,
            call.generation_log_probs,
            (WeightSpan("7", 0, len(call.generation_token_ids)),),
        )
        for call in calls
    ]
    for row in merge_calls(full):
        covered = [place for span in row.weight_versions for place in range(span.start, span.end)]
        assert covered == [place for place, flag in enumerate(row.loss_mask) if flag]


def by_content(rows: list[TokenSequence], calls: Sequence[CallTokens]) -> list[object]:
    """The rows without what counts in order of arrival, sorted."""
    return sorted(
        (
            row.token_ids,
            row.loss_mask,
            row.log_probs,
            [(span.start, span.end, span.version) for span in row.weight_versions],
            row.abandoned,
            [content(calls[index]) for index in row.calls],
        )
        for row in rows
    )


@settings(deadline=None)
@given(call_lists(), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_the_order_of_arrival(calls: list[CallTokens], shuffle: random.Random) -> None:
    shuffled = list(calls)
    shuffle.shuffle(shuffled)
    # up to the one tie: calls with the same prompt keep their places among each other
    queues: dict[tuple[int, ...], list[CallTokens]] = {}
    for call in calls:
        queues.setdefault(tuple(call.prompt_token_ids), []).append(call)
    permuted = [queues[tuple(call.prompt_token_ids)].pop(0) for call in shuffled]
    assert by_content(merge_calls(permuted), permuted) == by_content(merge_calls(calls), calls)

    def tokens(rows: list[TokenSequence]) -> list[list[int]]:
        return sorted(row.token_ids for row in rows)

    assert tokens(merge_calls(shuffled)) == tokens(merge_calls(calls))
    trained = [sum(row.trained_tokens for row in merge_calls(order)) for order in (calls, shuffled)]
    assert trained[0] == trained[1]


@settings(deadline=None)
@given(call_lists())
def test_leaving_out_abandoned_rows_changes_no_other_row(calls: list[CallTokens]) -> None:
    rows = merge_calls(calls)
    assert merge_calls(calls, abandoned=False) == [row for row in rows if not row.abandoned]
    assert not rows or not rows[0].abandoned


@settings(deadline=None)
@given(call_lists())
def test_the_tree_agrees_with_itself(calls: list[CallTokens]) -> None:
    tree = TokenTree(calls)
    assert sorted([*tree.empty, *(copy for node in tree.nodes for copy in node.copies)]) == [
        *range(len(calls))
    ]
    assert tree.duplicates == sum(len(node.copies) - 1 for node in tree.nodes)
    for number, node in enumerate(tree.nodes):
        assert node.call in node.copies
        assert node.tokens is calls[node.call]
        assert all(tree.nodes[child].parent == number for child in node.children)
        path = tree.path(node)
        assert path[0] in tree.roots
        assert path[-1] is node
        assert not node.abandoned or (node in tree.leaves and not node.continued)
        for upper, lower in itertools.pairwise(path):
            assert lower.tokens.prompt_token_ids[: upper.tokens.total_tokens] == upper.tokens.token_ids
    assert f"{len(tree.leaves)} leaves" in repr(tree)


def test_a_conversation_is_one_row() -> None:
    one = CallTokens([1, 2], [3, 4], [-0.1, -0.2], (WeightSpan("a", 0, 2),))
    two = CallTokens([1, 2, 3, 4, 9], [5], [-0.3], (WeightSpan("b", 0, 1),))
    assert merge_calls([one, two]) == [
        TokenSequence(
            [1, 2, 3, 4, 9, 5],
            [0, 0, 1, 1, 0, 1],
            [0.0, 0.0, -0.1, -0.2, 0.0, -0.3],
            [WeightSpan("a", 2, 4), WeightSpan("b", 5, 6)],
            calls=[0, 1],
        )
    ]


def test_two_branches_train_what_they_share_once() -> None:
    root = CallTokens([1], [2], [-0.1])
    short = CallTokens.extending(root, [3], [4], [-0.2])
    long = CallTokens.extending(root, [5], [6, 7], [-0.3, -0.4])
    rows = merge_calls([root, short, long])
    assert [(row.token_ids, row.loss_mask, row.calls, row.abandoned) for row in rows] == [
        ([1, 2, 5, 6, 7], [0, 1, 0, 1, 1], [0, 2], False),
        ([1, 2, 3, 4], [0, 0, 0, 1], [1], False),
    ]


def test_an_answer_that_was_recorded_twice_is_trained_once() -> None:
    call = CallTokens([1], [2, 3], [-0.1, -0.2])
    again = CallTokens([1], [2, 3], [-0.1, -0.25])
    later = CallTokens.extending(again, [4], [5], [-0.1])
    for calls in ([call, again, later], [again, call, later]):
        tree = TokenTree(calls)
        assert (len(tree.nodes), tree.duplicates) == (2, 1)
        (row,) = merge_calls(calls)
        assert row.log_probs == [0.0, -0.1, -0.25, 0.0, -0.1]
        assert row.trained_tokens == 3
        assert not row.abandoned


def test_a_request_that_was_sent_again_leaves_an_abandoned_answer() -> None:
    lost = CallTokens([1], [2, 2, 2, 2], [-0.1] * 4)
    kept = CallTokens([1], [3], [-0.1])
    later = CallTokens([1, 3, 4], [5], [-0.1])
    for calls in ([lost, kept, later], [later, kept, lost]):
        rows = merge_calls(calls)
        assert [(row.token_ids, row.abandoned, row.forked) for row in rows] == [
            ([1, 3, 4, 5], False, False),
            ([1, 2, 2, 2, 2], True, True),
        ]


def test_if_no_answer_is_continued_the_last_one_counts() -> None:
    root = CallTokens([1], [2], [-0.1])
    one = CallTokens.extending(root, [3], [4, 4, 4], [-0.1] * 3)
    two = CallTokens.extending(root, [3], [5], [-0.1])
    rows = merge_calls([root, one, two])
    assert [(row.calls, row.abandoned) for row in rows] == [([0, 2], False), ([1], True)]
    rows = merge_calls([root, two, one])
    assert [(row.calls, row.abandoned) for row in rows] == [([0, 2], False), ([1], True)]
    # the first answer was delivered again, after the second
    (row,) = merge_calls([root, one, two, one], abandoned=False)
    assert row.calls == [0, 1]


def test_an_answer_that_only_an_empty_call_went_on_from_is_not_abandoned() -> None:
    kept = CallTokens([1], [2], [-0.1])
    lost = CallTokens([1], [3], [-0.1])
    nothing = CallTokens.extending(kept, [4], [], [])
    assert [(row.calls, row.abandoned) for row in merge_calls([kept, nothing, lost])] == [
        ([0], False),
        ([2], True),
    ]


@pytest.mark.parametrize("linked", [True, False])
def test_empty_generations_do_not_break_a_chain(linked: bool) -> None:
    first = CallTokens([1], [2], [-0.1])
    nothing = CallTokens.extending(first, [3], [], [])
    last = CallTokens.extending(nothing, [4], [5], [-0.2])
    calls = [first, nothing, last]
    tree = TokenTree(calls if linked else unlinked(calls))
    assert tree.empty == [1]
    assert [(node.call, node.parent) for node in tree.nodes] == [(0, None), (2, 0)]
    (row,) = merge_calls(calls)
    assert row.loss_mask == [0, 1, 0, 0, 1]
    assert merge_calls([nothing]) == []
    assert merge_calls([]) == []


def test_a_link_does_not_hide_a_longer_parent() -> None:
    root = CallTokens([1], [2], [-0.1])
    middle = CallTokens.extending(root, [3], [4], [-0.1])
    last = CallTokens.extending(root, [3, 4, 5], [6], [-0.1])
    (row,) = merge_calls([root, middle, last])
    assert row.calls == [0, 1, 2]


def test_a_parent_that_was_not_recorded_is_context() -> None:
    root = CallTokens([1], [2], [-0.1])
    (row,) = merge_calls([CallTokens.extending(root, [3], [4], [-0.1])])
    assert (row.token_ids, row.loss_mask) == ([1, 2, 3, 4], [0, 0, 0, 1])


class Counted(list[int]):
    """Token ids that count how many of them are read one by one or as slices."""

    reads = 0

    def __getitem__(self, key: object) -> object:  # type: ignore[override]
        value = super().__getitem__(key)  # type: ignore[index]
        Counted.reads += len(value) if isinstance(value, list) else 1
        return value


def counted_chain(length: int, new: int, generated: int, *, linked: bool) -> list[CallTokens]:
    calls: list[CallTokens] = []
    for number in range(length):
        fresh = [number % 50] * new
        answer, scores = Counted([7] * generated), [-0.5] * generated
        if linked and calls:
            calls.append(CallTokens.extending(calls[-1], Counted(fresh), answer, scores))
        else:
            base = calls[-1].token_ids if calls else []
            calls.append(CallTokens(Counted(base + fresh), answer, scores))
    Counted.reads = 0
    return calls


def test_linked_calls_cost_their_new_tokens() -> None:
    reads = []
    for length in (100, 1_000):
        calls = counted_chain(length, 12, 4, linked=True)
        assert len(TokenTree(calls).leaves) == 1
        reads.append(Counted.reads)
        assert Counted.reads <= calls[-1].total_tokens == 16 * length
    assert reads[1] == 10 * reads[0]  # k calls of n tokens: O(n), though their prompts add up to k·n/2


def test_whole_calls_cost_their_prompts_once() -> None:
    calls = counted_chain(100, 12, 4, linked=False)
    assert len(TokenTree(calls).leaves) == 1
    # a comparison reads both sides, and each edge on the way is looked up by its first token
    assert Counted.reads <= 3 * sum(call.total_tokens for call in calls)


def test_thousands_of_turns_make_one_row() -> None:
    calls = chain(5_000, new=2, generated=3)
    (row,) = merge_calls(calls)
    assert row.token_ids == calls[-1].token_ids
    assert row.trained_tokens == 15_000
    (again,) = merge_calls(reversed(unlinked(calls[:300])))
    assert again.token_ids == calls[299].token_ids
