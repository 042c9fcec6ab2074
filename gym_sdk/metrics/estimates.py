"""What k attempts at a task would have come to, estimated without bias from n of them.

All of these are means over the k-subsets of the n attempts that were scored, drawn without replacement, in
closed form. An attempt without a reward (failed, cancelled) is none of the n: it is never a wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["best_at_k", "pass_at_k", "pass_hat_k"]


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Estimate the chance that at least one of k attempts is correct, without bias.

    `1 - C(total - correct, k) / C(total, k)` (Chen et al., arXiv 2107.03374, section 2.1).

    Args:
        correct: attempts that were correct, c.
        total: attempts made, n >= k.
        k: attempts allowed.

    Raises:
        ValueError: k is not in 1..total, or correct is not in 0..total.
    """
    _check("pass_at_k", correct, total, k)
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def pass_hat_k(correct: int, total: int, k: int) -> float:
    """Estimate the chance that all of k attempts are correct (pass^k), without bias.

    `C(correct, k) / C(total, k)` (Yao et al., tau-bench, arXiv 2406.12045). Pass@k says what a policy
    can do, pass^k what one can rely on; for k = 1 both are the share of correct attempts.

    Args:
        correct: attempts that were correct, c.
        total: attempts made, n >= k.
        k: attempts that all have to be correct.

    Raises:
        ValueError: k is not in 1..total, or correct is not in 0..total.
    """
    _check("pass_hat_k", correct, total, k)
    return math.comb(correct, k) / math.comb(total, k)


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """Estimate the greatest reward among k attempts, without bias.

    With the n rewards in ascending order r_1 <= ... <= r_n, r_i is the greatest of a k-subset in
    C(i - 1, k - 1) of the C(n, k) cases: `sum_i r_i * C(i - 1, k - 1) / C(n, k)`. With rewards 0 and 1
    this is pass@k.

    Args:
        rewards: of the attempts that have one, in any order; length n >= k.
        k: attempts from which the best is chosen.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check("best_at_k", 0, len(rewards), k)
    ways = math.comb(len(rewards), k)
    return math.fsum(
        reward * (math.comb(below, k - 1) / ways) for below, reward in enumerate(sorted(rewards))
    )


def _check(name: str, correct: int, total: int, k: int) -> None:
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise ValueError(f"{name} needs 1 <= k <= total and 0 <= correct <= total: {correct=} {total=} {k=}")
