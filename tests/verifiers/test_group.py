from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Reward, Rollout, Task, Timing
from gym_sdk.verifiers import Pairing, pairwise, ranking, run_group_verifier

pytestmark = pytest.mark.asyncio

Make = Callable[..., Rollout]


def group_of(n: int, task_id: str = "t1") -> list[Rollout]:
    task = Task("q", id=task_id)
    return [Rollout(id=f"r{i}", task=task, index=i, timing=Timing(started_at=0.0)) for i in range(n)]


def values(rewards: Sequence[Reward]) -> list[float]:
    return [reward.value for reward in rewards]


@pytest.mark.parametrize(
    "results",
    [[1.0, 0.5], (True, 0.5), numpy.array([1.0, 0.5]), [numpy.float32(1), Reward(value=0.5)]],
)
async def test_results(results: Any) -> None:
    async def verify(rollouts: Sequence[Rollout]) -> Any:
        return results

    def verify_in_thread(rollouts: Sequence[Rollout]) -> Any:
        return results

    for verifier in (verify, verify_in_thread):
        assert values(await run_group_verifier(verifier, group_of(2))) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([1.0], "group verifier verify returned 1 results for 2 rollouts"),
        ([1.0, 2.0, 3.0], "returned 3 results for 2"),
        (None, r"returned NoneType \(did it forget to return\?\)"),
        (1.0, "returned float; expected a list"),
        ("ab", "returned str"),
        ({0: 1.0, 1: 2.0}, "returned dict, which has no order"),
        ({0.5, 1.0}, "returned set, which has no order"),
        (iter([1.0, 2.0]), "returned list_iterator"),
        ([1.0, None], r"verifier verify, position 1 \(rollout r1\), returned None"),
        ([float("nan"), 1.0], r"position 0 \(rollout r0\), returned nan"),
        ([1.0, {"a": "b"}], r"component 'a' of verifier verify, position 1 \(rollout r1\), returned str"),
        (numpy.ones((2, 2)), "returned ndarray"),
    ],
)
async def test_anything_else_is_an_error(results: Any, message: str) -> None:
    async def verify(rollouts: Sequence[Rollout]) -> Any:
        return results

    with pytest.raises(VerifierError, match=message) as caught:
        await run_group_verifier(verify, group_of(2))
    assert caught.value.verifier == "verify"


async def test_errors_and_deadlines() -> None:
    async def broken(rollouts: Sequence[Rollout]) -> list[float]:
        return [1 / 0]

    async def hang(rollouts: Sequence[Rollout]) -> list[float]:
        await anyio.sleep_forever()
        return []

    with pytest.raises(VerifierError, match="verifier broken raised ZeroDivisionError"):
        await run_group_verifier(broken, group_of(1))
    with pytest.raises(TimeoutError), anyio.fail_after(0.02):
        await run_group_verifier(hang, group_of(1))
    assert await run_group_verifier(hang, []) == []


async def test_a_group_verifier_sees_what_the_others_said_and_changes_nothing() -> None:
    rollouts = group_of(3)
    for rollout in rollouts:
        rollout.reward, rollout.reward_components = float(rollout.index), {"right": 1.0}

    def spoil(given: Sequence[Rollout]) -> list[float]:
        rewards = [rollout.reward or 0.0 for rollout in given]
        for rollout in given:
            rollout.reward = 7.0
            rollout.reward_components.clear()
        assert isinstance(given, list)
        given.clear()
        return [reward + 1 for reward in rewards]

    assert values(await run_group_verifier(spoil, rollouts)) == [1.0, 2.0, 3.0]
    assert [rollout.reward for rollout in rollouts] == [0.0, 1.0, 2.0]
    assert rollouts[0].reward_components == {"right": 1.0}


@given(n=st.integers(0, 40), opponents=st.none() | st.integers(1, 50), seed=st.integers(0, 5))
async def test_who_meets_whom(n: int, opponents: int | None, seed: int) -> None:
    pairing = Pairing(opponents=opponents, seed=seed)
    pairs = pairing.pairs(group_of(n))
    assert pairs == pairing.pairs(group_of(n))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(a != b for a, b in pairs)
    met = Counter(place for pair in pairs for place in pair)
    degree = min(n - 1, opponents or n)
    if n < 2:
        assert pairs == []
    elif (n * degree) % 2:
        assert sorted(met.values()) == [degree] * (n - 1) + [degree + 1]
    else:
        assert [met[place] for place in range(n)] == [degree] * n
    first = Counter(a for a, _ in pairs)
    assert all(abs(2 * first[place] - met[place]) <= 2 for place in met)


async def test_pairings_differ_between_tasks() -> None:
    pairing = Pairing(opponents=2)
    assert len({str(pairing.pairs(group_of(16, f"t{i}"))) for i in range(8)}) == 8


async def test_pairwise() -> None:
    asked: list[tuple[str, str]] = []

    async def higher(a: Rollout, b: Rollout) -> float:
        asked.append((a.id, b.id))
        return 0.5 if a.index // 2 == b.index // 2 else float(a.index > b.index)

    verifier = pairwise(higher)
    rewards = await run_group_verifier(verifier, group_of(4))
    assert values(rewards) == pytest.approx([0.5 / 3, 0.5 / 3, 2.5 / 3, 2.5 / 3])
    assert [reward.components for reward in rewards] == [{"comparisons": 3.0}] * 4
    assert len(asked) == 6
    asked.clear()
    both = pairwise(higher, Pairing(both_orders=True, concurrency=2))
    assert values(await run_group_verifier(both, group_of(4))) == values(rewards)
    assert len(set(asked)) == 12
    assert values(await run_group_verifier(verifier, group_of(1))) == [0.5]


async def test_both_orders_even_out_a_preference_for_a_place() -> None:
    async def prefer_first(a: Rollout, b: Rollout) -> float:
        return 1.0

    rewards = await run_group_verifier(pairwise(prefer_first, Pairing(both_orders=True)), group_of(5))
    assert values(rewards) == [0.5] * 5


@pytest.mark.parametrize("result", [1.5, -0.1, None, float("nan"), "A"])
async def test_a_comparison_that_is_none(result: Any) -> None:
    def compare(a: Rollout, b: Rollout) -> Any:
        return result

    with pytest.raises(VerifierError, match=r"pairwise\(compare\)"):
        await run_group_verifier(pairwise(compare), group_of(3))


async def test_a_failed_comparison_ends_the_others() -> None:
    running = 0

    async def compare(a: Rollout, b: Rollout) -> float:
        nonlocal running
        if {a.index, b.index} == {0, 1}:
            while running < 5:
                await anyio.sleep(0)
            raise SystemExit("gone")
        running += 1
        try:
            await anyio.sleep_forever()
        finally:
            running -= 1
        return 1.0

    with pytest.raises(VerifierError, match=r"pairwise\(compare\) raised SystemExit: gone"):
        await run_group_verifier(pairwise(compare), group_of(4))
    assert running == 0


async def test_comparisons_are_limited() -> None:
    running = most = 0

    async def compare(a: Rollout, b: Rollout) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001)
        running -= 1
        return 0.5

    await run_group_verifier(pairwise(compare, Pairing(concurrency=3)), group_of(8))
    assert most == 3


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([2, 0, 1], [0.5, 0.0, 1.0]),
        ([[0, 1, 2]], [0.5, 0.5, 0.5]),
        ([2, (0, 1)], [0.25, 0.25, 1.0]),
        (numpy.array([0, 1, 2]), [1.0, 0.5, 0.0]),
        ([[], 0, [], [1, 2]], [1.0, 0.25, 0.25]),
    ],
)
async def test_ranking(order: Any, expected: list[float]) -> None:
    def rank(rollouts: Sequence[Rollout]) -> Any:
        return order

    assert values(await run_group_verifier(ranking(rank), group_of(3))) == expected


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1], "must name each position from 0 to 2 once; missing: 2"),
        ([0, 1, 1], "missing: 2; twice: 1"),
        ([0, 1, 2, 3], "unknown: 3"),
        ([1, 2, 3], "missing: 0; unknown: 3"),
        (["a", 1, 2], r"returned \['a', 1, 2\]; expected positions"),
        (None, "returned None"),
        (1.0, "returned 1.0"),
    ],
)
async def test_an_order_that_is_none(order: Any, message: str) -> None:
    async def rank(rollouts: Sequence[Rollout]) -> Any:
        return order

    with pytest.raises(VerifierError, match=message) as caught:
        await run_group_verifier(ranking(rank), group_of(3))
    assert caught.value.verifier == "ranking(rank)"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
async def test_ranking_is_what_comparing_all_pairs_gives(strengths: list[int]) -> None:
    async def compare(a: Rollout, b: Rollout) -> float:
        x, y = strengths[a.index], strengths[b.index]
        return 0.5 if x == y else float(x > y)

    async def rank(rollouts: Sequence[Rollout]) -> list[list[int]]:
        tiers = [[i for i, s in enumerate(strengths) if s == level] for level in range(5, -1, -1)]
        for tier in tiers:
            random.shuffle(tier)
        return tiers

    rollouts = group_of(len(strengths))
    ranked = values(await run_group_verifier(ranking(rank), rollouts))
    assert ranked == pytest.approx(values(await run_group_verifier(pairwise(compare), rollouts)))
    assert sum(ranked) == pytest.approx(len(ranked) / 2)


@pytest.mark.parametrize("values", [{"opponents": 0}, {"concurrency": 0}])
async def test_mistakes_are_told_early(values: Any) -> None:
    with pytest.raises(ConfigurationError):
        Pairing(**values)
