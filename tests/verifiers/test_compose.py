from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import ModelCall, Reward, Rollout
from gym_sdk.tokens import CallTokens
from gym_sdk.verifiers import exact, gated, mapped, overlong, run_verifier, verifier_name, weighted
from gym_sdk.verifiers.concurrent import run_together

pytestmark = pytest.mark.asyncio

Make = Callable[..., Rollout]


async def form(rollout: Rollout) -> dict[str, float]:
    return {"reward": float(rollout.output_text.startswith("=")), "signs": rollout.output_text.count("=")}


async def test_gated(rollout: Make) -> None:
    asked = 0

    async def dear(rollout: Rollout) -> dict[str, float]:
        nonlocal asked
        asked += 1
        return {"right": 0.75}

    verifier = gated(form, dear, otherwise=-0.5)
    assert verifier_name(verifier) == "gated(form, dear)"
    closed = Reward(value=-0.5, components={"gate": 0.0, "gate/signs": 1.0})
    assert await run_verifier(verifier, rollout("5=")) == closed
    assert asked == 0
    opened = {"gate": 1.0, "gate/signs": 1.0, "score": 0.75, "score/right": 0.75}
    assert await run_verifier(verifier, rollout("=5")) == Reward(value=0.75, components=opened)
    assert (await run_verifier(gated(dear, exact(), threshold=0.75), rollout("a", "a"))).value == 1.0
    nested = await run_verifier(gated(form, gated(form, dear)), rollout("=5"))
    assert nested.components["score/score/right"] == 0.75


async def test_a_gate_that_fails_is_not_closed(rollout: Make) -> None:
    with pytest.raises(VerifierError, match="task 't1' has no answer"):
        await run_verifier(gated(exact(), form), rollout("x"))
    for options in ({"threshold": float("nan")}, {"otherwise": float("inf")}, {"otherwise": None}):
        with pytest.raises(ConfigurationError, match="must be finite"):
            gated(exact(), form, **options)  # type: ignore[arg-type]


async def test_mapped(rollout: Make) -> None:
    verifier = mapped(form, lambda reward: 2 * reward - 1)
    assert verifier_name(verifier) == "mapped(form)"
    expected = Reward(value=1.0, components={"score": 1.0, "score/signs": 2.0})
    assert await run_verifier(verifier, rollout("==")) == expected
    named = mapped(form, lambda reward: {"reward": 1 - reward, "lost": 1.0})
    assert (await run_verifier(named, rollout("="))).components == {
        "score": 1.0,
        "score/signs": 1.0,
        "lost": 1.0,
    }
    nonsense: Any = lambda reward: None  # noqa: E731
    with pytest.raises(VerifierError, match=r"mapped\(form\) returned None"):
        await run_verifier(mapped(form, nonsense), rollout("="))
    with pytest.raises(VerifierError, match=r"mapped\(form\) raised ZeroDivisionError"):
        await run_verifier(mapped(form, lambda reward: 1 / reward), rollout(""))


@pytest.mark.parametrize(
    ("generated", "penalty"),
    [(0, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0), (17, -1.0), (1000, -1.0)],
)
async def test_overlong(rollout: Make, generated: int, penalty: float) -> None:
    attempt = rollout("x")
    lengths = (generated // 2, generated - generated // 2)  # of two model calls; prompts don't count
    attempt.model_calls = [
        ModelCall(
            response_id=f"resp_{n}",
            first_item=1,
            end_item=2,
            tokens=CallTokens([7] * 50, [1] * n, [-1.0] * n) if n else CallTokens([7], [], []),
        )
        for n in lengths
    ]
    verifier = weighted({"right": (exact(), 1.0), "length": (overlong(16, 4), 0.5)})
    attempt.task = type(attempt.task)("q", answer="x", id="t1")
    reward = await run_verifier(verifier, attempt)
    assert reward.components == {"right": 1.0, "length": penalty}
    assert reward.value == 1.0 + 0.5 * penalty


async def test_overlong_needs_tokens(rollout: Make) -> None:
    with pytest.raises(VerifierError, match="response resp_1 of rollout r1 carries no token ids"):
        await run_verifier(overlong(16, 4), rollout("x"))
    for limits in ((4, 5), (4, 0), (0, 0)):
        with pytest.raises(ConfigurationError, match="buffer_tokens must lie in 1 to max_tokens"):
            overlong(*limits)


async def test_run_together() -> None:
    ended: list[int] = []

    async def give(number: int) -> int:
        try:
            if number < 0:
                raise ValueError(number)
            await anyio.sleep(0.001 * (5 - number))
        finally:
            ended.append(number)
        return number

    def calls(*numbers: int) -> list[Callable[[], Any]]:
        return [lambda n=number: give(n) for number in numbers]  # type: ignore[misc]

    assert await run_together(calls(0, 1, 2, 3)) == [0, 1, 2, 3]
    assert ended == [3, 2, 1, 0]
    assert await run_together(calls(0, 1, 2), concurrency=1) == [0, 1, 2]
    assert await run_together([]) == []
    ended.clear()
    with pytest.raises(ValueError, match="-1"):
        await run_together(calls(0, -1, 1, 2), concurrency=2)
    assert sorted(ended) == [-1, 0]
