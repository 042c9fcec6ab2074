from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import anyio
import numpy
import pytest

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers import exact, run_verifier, verifier_name, weighted

Make = Callable[..., Rollout]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("result", "reward"),
    [
        (1.0, Reward(value=1.0)),
        (2, Reward(value=2.0)),
        (True, Reward(value=1.0)),
        (False, Reward(value=0.0)),
        (-0.5, Reward(value=-0.5)),
        (Fraction(1, 4), Reward(value=0.25)),
        (numpy.float32(0.5), Reward(value=0.5)),
        (Reward(value=0.5, components={"a": 1}), Reward(value=0.5, components={"a": 1.0})),
        ({"right": 1.0, "format": 0.25}, Reward(value=1.25, components={"right": 1.0, "format": 0.25})),
        ({"reward": 0.5, "length": 80}, Reward(value=0.5, components={"length": 80.0})),
        ({"reward": True}, Reward(value=1.0)),
    ],
)
async def test_results(rollout: Make, result: Any, reward: Reward) -> None:
    async def verify(rollout: Rollout) -> Any:
        return result

    def verify_in_thread(rollout: Rollout) -> Any:
        return result

    assert await run_verifier(verify, rollout("x")) == reward
    assert await run_verifier(verify_in_thread, rollout("x")) == reward


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"verifier verify returned None \(did it forget to return\?\); expected a number"),
        ("1.0", "verifier verify returned str '1.0'"),
        (float("nan"), "returned nan; a reward is finite"),
        (float("inf"), "returned inf"),
        (10**400, "returned inf"),
        (Decimal(1), "returned Decimal"),
        ([1.0], "returned list"),
        ({}, "empty mapping"),
        ({"a": None}, "component 'a' of verifier verify returned None"),
        ({"a": float("nan")}, "component 'a' of verifier verify returned nan"),
        ({1: 1.0}, "component named 1"),
        ({"a": 1e308, "b": 1e308}, "verifier verify returned inf"),
        (Reward.model_construct(value=float("nan"), components={}), "returned nan"),
        (Reward(value=1.0, components={"a": float("inf")}), "component 'a'"),
    ],
)
async def test_anything_else_is_an_error_and_never_a_zero(rollout: Make, result: Any, message: str) -> None:
    async def verify(rollout: Rollout) -> Any:
        return result

    with pytest.raises(VerifierError, match=message) as caught:
        await run_verifier(verify, rollout("x"))
    assert caught.value.verifier == "verify"


@pytest.mark.asyncio
async def test_exceptions_become_verifier_errors(rollout: Make) -> None:
    async def divide(rollout: Rollout) -> float:
        return 1 / 0

    def leave(rollout: Rollout) -> float:
        raise SystemExit(1)

    async def own(rollout: Rollout) -> float:
        raise VerifierError("the judge is down", verifier="judge")

    with pytest.raises(VerifierError, match="verifier divide raised ZeroDivisionError: division") as caught:
        await run_verifier(divide, rollout("x"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(VerifierError, match="verifier leave raised SystemExit"):
        await run_verifier(leave, rollout("x"))
    with pytest.raises(VerifierError, match=r"^the judge is down$"):
        await run_verifier(own, rollout("x"))


@pytest.mark.asyncio
async def test_a_blocking_verifier_does_not_stop_the_loop(rollout: Make) -> None:
    def block(rollout: Rollout) -> bool:
        time.sleep(0.3)
        return True

    longest = 0.0
    done = anyio.Event()

    async def watch() -> None:
        nonlocal longest
        while not done.is_set():
            start = time.perf_counter()
            await anyio.sleep(0.005)
            longest = max(longest, time.perf_counter() - start)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        assert (await run_verifier(block, rollout("x"))).value == 1.0
        done.set()
    assert longest < 0.2


@pytest.mark.asyncio
async def test_deadlines_reach_a_verifier(rollout: Make) -> None:
    released = threading.Event()

    def block(rollout: Rollout) -> None:
        released.wait(30)

    async def hang(rollout: Rollout) -> float:
        await anyio.sleep(30)
        return 1.0

    for verifier in (block, hang, weighted({"hang": (hang, 1.0), "block": (block, 1.0)})):  # type: ignore[dict-item]
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await run_verifier(verifier, rollout("x"))  # type: ignore[arg-type]
    released.set()


def test_names() -> None:
    def mine(rollout: Rollout, strength: int = 1) -> float:
        return 1.0

    class Judge:
        async def __call__(self, rollout: Rollout) -> float:
            return 1.0

    assert verifier_name(mine) == "mine"
    assert verifier_name(functools.partial(mine, strength=2)) == "mine"
    assert verifier_name(Judge()) == "Judge"
    assert verifier_name(exact()) == "exact"
    assert verifier_name(weighted({"a": (mine, 1.0), "b": (Judge(), 2)})) == "weighted(a, b)"


@pytest.mark.asyncio
async def test_weighted(rollout: Make) -> None:
    def length(rollout: Rollout) -> dict[str, float]:
        return {"reward": 0.5, "characters": len(rollout.output_text)}

    both = weighted({"right": (exact(), 1.0), "length": (length, -0.5), "watched": (exact(), 0)})
    reward = await run_verifier(both, rollout("five", "five"))
    assert reward.value == 0.75
    assert reward.components == {"right": 1.0, "length": 0.5, "length/characters": 4.0, "watched": 1.0}
    nested = weighted({"all": (both, 2.0)})
    assert (await run_verifier(nested, rollout("five", "five"))).value == 1.5


@pytest.mark.asyncio
async def test_weighted_runs_its_parts_together_and_fails_with_any(rollout: Make) -> None:
    async def slow(rollout: Rollout) -> float:
        await anyio.sleep(0.2)
        return 1.0

    async def broken(rollout: Rollout) -> float:
        raise KeyError("k")

    start = time.perf_counter()
    parts = {f"s{i}": (slow, 0.25) for i in range(4)}
    assert (await run_verifier(weighted(parts), rollout("x"))).value == 1.0
    assert time.perf_counter() - start < 0.6
    with pytest.raises(VerifierError, match="verifier broken raised KeyError"):
        await run_verifier(weighted({"slow": (slow, 1.0), "broken": (broken, 0.0)}), rollout("x"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one"),
        ({"a": exact()}, r"'a' must be \(verifier, weight\)"),
        ({"a": (exact(), float("nan"))}, "weight of 'a' must be finite"),
        ({"a": (exact(), "1")}, "weight of 'a' must be finite"),
        ({"a": (1.0, exact())}, "'a' must be"),
    ],
)
def test_weighted_rejects_bad_parts(parts: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        weighted(parts)
