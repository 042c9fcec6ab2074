"""Self-consistency: how often the answer that most of k attempts give is correct."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

from gym_sdk.schema import Rollout

__all__ = ["AnswerOf", "final_number", "final_text", "majority_at_k"]

AnswerOf: TypeAlias = Callable[[Rollout], Hashable | None]
"""Reads a rollout's answer; equal answers vote together. None abstains."""

# Above this many steps the exact mean of one group takes longer than about a third of a second.
_MOST_STEPS = 1_000_000


def final_text(rollout: Rollout) -> str | None:
    """Return the final text without white space around it; None if there is none."""
    return rollout.output_text.strip() or None


def final_number(rollout: Rollout) -> Hashable | None:
    """Return the last number of the final text, exactly (`gym_sdk.verifiers.last_number`), or None."""
    from gym_sdk.verifiers import last_number

    return last_number(rollout.output_text)


def majority_at_k(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool],
    k: int,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Estimate the chance that the most frequent answer of k attempts is correct.

    Self-consistency (Wang et al., arXiv 2203.11171) without weights, as the mean over the k-subsets of the n
    attempts. Among answers that are equally frequent, each is chosen with the same chance. Attempts
    without an answer (None) cast no vote; a subset in which nobody votes is not correct. If attempts with
    the same answer were judged differently, the answer counts as correct with the share of those that were.

    The mean is exact as long as n * k^2 is at most a million (n = k = 100), and otherwise taken over
    `draws` random subsets; its standard error is then at most `0.5 / sqrt(draws)`.

    Args:
        answers: of the attempts that were scored; length n >= k.
        correct: whether each of them is; length n.
        k: attempts that vote.
        draws: subsets to draw where the exact mean is too dear.
        seed: of these draws; the same arguments always give the same number.

    Raises:
        ValueError: k is not in 1..n, or the lengths differ.
    """
    total = len(answers)
    if not 1 <= k <= total or len(correct) != total:
        raise ValueError(
            f"majority_at_k needs 1 <= k <= n answers and n marks: {k=} {total=} {len(correct)=}"
        )
    counts = Counter(answer for answer in answers if answer is not None)
    right = Counter(answer for answer, ok in zip(answers, correct, strict=True) if ok and answer is not None)
    credit = {answer: right[answer] / count for answer, count in counts.items()}
    if total * k * k > _MOST_STEPS:
        return _sampled(answers, credit, k, draws, random.Random(seed))
    votes = [(count, credit[answer]) for answer, count in counts.items()]
    return math.fsum(
        _share_won(votes, total, k, most) for most in range(1, min(k, max(counts.values(), default=0)) + 1)
    )


def _share_won(votes: Sequence[tuple[int, float]], total: int, k: int, most: int) -> float:
    """Return the mean credit of the chosen answer, over subsets whose winners have `most` votes; else 0.

    Answer by answer, `ways[size][tied]` counts the choices of `size` attempts in which no answer has more
    than `most` votes and `tied` answers have that many; `won` is the sum of the credits of those.
    """
    abstaining = total - sum(count for count, _ in votes)
    most_tied = k // most
    ways = [[0.0] * (most_tied + 1) for _ in range(k + 1)]
    won = [[0.0] * (most_tied + 1) for _ in range(k + 1)]
    for size in range(min(abstaining, k) + 1):
        ways[size][0] = float(math.comb(abstaining, size))
    for count, credit in votes:
        choices = [float(math.comb(count, taken)) for taken in range(min(count, most) + 1)]
        for size in range(k, -1, -1):  # downwards: the smaller sizes are still without this answer
            for tied in range(most_tied, -1, -1):
                new_ways = new_won = 0.0
                for taken, chosen in enumerate(choices[: size + 1]):
                    wins = taken == most
                    if wins and not tied:
                        continue
                    before, tied_before = size - taken, tied - wins
                    new_ways += chosen * ways[before][tied_before]
                    new_won += chosen * won[before][tied_before]
                    if wins:
                        new_won += chosen * credit * ways[before][tied_before]
                ways[size][tied] = new_ways
                won[size][tied] = new_won
    subsets = math.comb(total, k)
    return sum(won[k][tied] / tied for tied in range(1, most_tied + 1)) / subsets


def _sampled(
    answers: Sequence[Hashable | None],
    credit: dict[Hashable, float],
    k: int,
    draws: int,
    source: random.Random,
) -> float:
    won = 0.0
    for _ in range(draws):
        votes = Counter(answer for answer in source.sample(answers, k) if answer is not None)
        if votes:
            most = max(votes.values())
            winners = [credit[answer] for answer, count in votes.items() if count == most]
            won += sum(winners) / len(winners)
    return won / draws
