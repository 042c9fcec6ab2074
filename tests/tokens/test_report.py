"""What a report says about a rollout's tokens."""

from __future__ import annotations

from hypothesis import given, settings
from support.token_calls import call_lists, chain, unlinked

from gym_sdk.tokens import CallTokens, Fork, TokenReport, merge_calls

FIRST = CallTokens([1, 2], [3, 4], [-0.1, -0.2])
SECOND = CallTokens.extending(FIRST, [5, 6], [7], [-0.3])


def test_a_conversation_has_nothing_odd() -> None:
    report = TokenReport.of([FIRST, SECOND])
    assert report == TokenReport(
        calls=2,
        sequences=1,
        duplicates=0,
        abandoned=0,
        trained_tokens=3,
        total_tokens=7,
        generated_tokens=3,
    )
    assert (report.prompt_tokens, report.trained_share, report.unreported_forks) == (4, 1.0, 0)
    assert str(report) == "calls 2, sequences 1\ntokens 7: 4 prompted, 3 trained (100.0% of 3 generated)"


def test_silent_drift_is_a_fork_that_nobody_reported() -> None:
    drifted = CallTokens([1, 2, 3, 4, 5, 6, 8, 9], [1], [-0.1])  # 7 was tokenized again, as 8
    report = TokenReport.of([FIRST, SECOND, drifted], decode=lambda ids: "".join(map(str, ids)))
    assert report.forks == [
        Fork(2, "not reported by the server", 6, [1, 2, 3, 4, 5, 6], [7], [8, 9], "7", "89")
    ]
    assert report.unreported_forks == 1
    assert str(report) == (
        "calls 3, sequences 2, forks 1, unreported forks 1\n"
        "tokens 16: 12 prompted, 4 trained (100.0% of 4 generated)\n"
        "  call 2 forks at token 6 (not reported by the server): expected '7', found '89'"
    )


def test_a_fork_that_the_server_reported_has_its_reason() -> None:
    edited = CallTokens([1, 9], [1], [-0.1])
    report = TokenReport.of([FIRST, SECOND, edited], reasons=[None, None, "history edited"])
    assert report.forks == [Fork(2, "history edited", 1, [1], [2, 3, 4, 5, 6, 7], [9])]
    assert report.forks[0].reported
    assert report.unreported_forks == 0
    assert "call 2 forks at token 1 (history edited): expected [2, 3, 4" in str(report)


def test_a_reported_fork_whose_tokens_extend_all_the_same_is_not_listed() -> None:
    report = TokenReport.of([FIRST, SECOND], reasons=["first seen", "memory lost"])
    assert report.forks == []
    assert report.sequences == 1


def test_a_branch_from_an_inner_turn_is_a_fork() -> None:
    other = CallTokens.extending(FIRST, [5, 9], [1], [-0.1])
    onwards = CallTokens.extending(other, [2], [1], [-0.1])
    (fork,) = TokenReport.of([FIRST, SECOND, other, onwards]).forks
    assert (fork.call, fork.diverged_at, fork.expected, fork.found) == (2, 5, [6, 7], [9])
    another = CallTokens.extending(FIRST, [8], [1], [-0.1])
    (fork,) = TokenReport.of([FIRST, SECOND, another]).forks
    assert (fork.call, fork.diverged_at, fork.expected, fork.found) == (2, 4, [5, 6, 7], [8])


def test_a_prompt_that_stops_inside_an_earlier_row_is_a_fork() -> None:
    (fork,) = TokenReport.of([FIRST, SECOND, CallTokens([1, 2, 3], [9], [-0.1])]).forks
    assert (fork.call, fork.diverged_at, fork.expected, fork.found) == (2, 3, [4, 5, 6, 7], [])


def test_a_prompt_that_was_sent_again_is_no_fork() -> None:
    again = CallTokens([1, 2, 3, 4, 5, 6], [8], [-0.1])
    twice = CallTokens([1, 2, 3, 4, 5, 6], [8], [-0.1])
    last = CallTokens.extending(again, [9], [1], [-0.1])
    report = TokenReport.of([FIRST, SECOND, again, twice, last], unparsed_calls=2)
    assert report.forks == []
    assert (report.sequences, report.duplicates, report.abandoned) == (2, 1, 1)
    assert (report.trained_tokens, report.generated_tokens) == (5, 6)
    assert report.trained_share == 5 / 6
    assert "sequences 2, duplicates 1, abandoned 1, unparsed calls 2\n" in str(report)


def test_an_empty_call_can_fork_and_be_extended() -> None:
    nothing = CallTokens.extending(SECOND, [1], [], [])
    last = CallTokens.extending(nothing, [2], [3], [-0.1])
    assert TokenReport.of([FIRST, SECOND, nothing, last]).forks == []
    (fork,) = TokenReport.of([FIRST, SECOND, CallTokens([1, 9], [], [])]).forks
    assert (fork.call, fork.diverged_at) == (2, 1)


def test_nothing_generated_leaves_nothing_untrained() -> None:
    assert TokenReport.of([]).trained_share == 1.0
    assert TokenReport.of([CallTokens([1], [], [])]).trained_share == 1.0


@settings(deadline=None)
@given(call_lists())
def test_counts_agree_with_the_rows(calls: list[CallTokens]) -> None:
    report, rows = TokenReport.of(calls), merge_calls(calls)
    assert report == TokenReport.of(unlinked(calls))
    assert report.calls == len(calls)
    assert report.sequences == len(rows)
    assert report.total_tokens == sum(len(row) for row in rows)
    assert report.trained_tokens == sum(row.trained_tokens for row in rows)
    assert report.abandoned == sum(row.abandoned for row in rows)
    assert report.generated_tokens == sum(len(call.generation_token_ids) for call in calls)


@settings(deadline=None)
@given(call_lists())
def test_forks_are_those_of_the_definition(calls: list[CallTokens]) -> None:
    found = {fork.call: fork for fork in TokenReport.of(calls).forks}
    for index, call in enumerate(calls):
        prompt, earlier = call.prompt_token_ids, [old.token_ids for old in calls[:index]]
        ends = [  # ends of rows: nothing earlier goes on from them
            tokens
            for tokens in earlier
            if not any(len(other) > len(tokens) and other[: len(tokens)] == tokens for other in earlier)
        ]
        extends = any(prompt[: len(end)] == end for end in ends)
        again = any(prompt == old.prompt_token_ids for old in calls[:index])
        assert (index in found) == bool(earlier and not extends and not again)
        if index in found:
            shared = max(
                next((n for n, pair in enumerate(zip(prompt, old, strict=False)) if pair[0] != pair[1]), None)
                or (0 if prompt[:1] != old[:1] else min(len(prompt), len(old)))
                for old in earlier
            )
            fork = found[index]
            assert fork.diverged_at == shared
            assert fork.found == prompt[shared : shared + 8]
            assert fork.shared == prompt[max(0, shared - 8) : shared]
            onwards = prompt[:shared] + fork.expected
            assert fork.expected
            assert any(old[: len(onwards)] == onwards for old in earlier)


def test_a_long_conversation_is_reported() -> None:
    assert TokenReport.of(chain(3_000)).forks == []
