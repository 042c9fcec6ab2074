"""Whatever a verifier does, the rollout gets a reward or a `VerifierError`."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import numpy
import pytest

from gym_sdk.errors import VerifierError
from gym_sdk.schema import Failure, FailureKind, Message, ModelCall, Rollout, Stage
from gym_sdk.tokens import CallTokens
from gym_sdk.verifiers import run_verifier

Make = Callable[..., Rollout]

pytestmark = pytest.mark.asyncio


class Unwilling:
    """Has neither a text nor a length."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Left(BaseException):
    """What some test frameworks and sandboxes raise; no `Exception`."""


@pytest.mark.parametrize(
    ("result", "reward"),
    [
        (numpy.bool_(True), 1.0),
        (numpy.int64(3), 3.0),
        (numpy.float64(0.5), 0.5),
        (numpy.array(0.25), 0.25),
        ({"a": numpy.bool_(False), "b": numpy.float16(0.5)}, 0.5),
    ],
)
async def test_scalars_of_numpy_are_numbers(rollout: Make, result: Any, reward: float) -> None:
    async def verify(rollout: Rollout) -> Any:
        return result

    assert (await run_verifier(verify, rollout("x"))).value == reward


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1 + 2j, "returned complex"),
        (numpy.complex128(1), "returned complex"),
        (numpy.array([1.0]), "returned ndarray"),
        (numpy.float32("nan"), "returned nan"),
        (numpy.str_("1"), "returned str"),
        (Unwilling(), "returned Unwilling <Unwilling instance at"),
        ("x" * 10**7, "returned str 'xxx"),
        ([[0.0] * 10**6], "returned list"),
        ({"a": Unwilling()}, "component 'a' of verifier verify returned Unwilling"),
        (object, "returned type"),
    ],
)
async def test_nonsense_is_named_briefly(rollout: Make, result: Any, message: str) -> None:
    async def verify(rollout: Rollout) -> Any:
        return result

    with pytest.raises(VerifierError, match=message) as caught:
        await run_verifier(verify, rollout("x"))
    assert len(str(caught.value)) < 500


async def test_a_coroutine_that_nobody_awaited(rollout: Make) -> None:
    async def other(rollout: Rollout) -> float:
        return 1.0

    async def forgets(rollout: Rollout) -> Any:
        return other(rollout)

    async def forgets_inside(rollout: Rollout) -> Any:
        return {"a": other(rollout)}

    def hands_on(rollout: Rollout) -> Any:
        return other(rollout)

    for verifier in (forgets, forgets_inside):
        with pytest.raises(VerifierError, match=r"returned coroutine .*\(did it forget to await\?\)"):
            await run_verifier(verifier, rollout("x"))
    assert (await run_verifier(hands_on, rollout("x"))).value == 1.0
    gc.collect()  # "never awaited" would be a warning, and warnings are errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(3), "verifier verify raised SystemExit: 3"),
        (Left("the sandbox is gone"), "verifier verify raised Left: the sandbox is gone"),
        (MemoryError(), "verifier verify raised MemoryError"),
        (StopAsyncIteration(), "verifier verify raised"),
        (TimeoutError("slow"), "verifier verify raised TimeoutError: slow"),
        (Wordless(), r"verifier verify raised Wordless: \(its message cannot be read: RuntimeError\)"),
        (ValueError("x" * 10**7), "verifier verify raised ValueError: xxx"),
        (ExceptionGroup("g", [ValueError("v")]), "^verifier verify raised ValueError: v$"),
        (
            BaseExceptionGroup("g", [ExceptionGroup("h", [KeyError("k")]), SystemExit(1)]),
            r"^verifier verify raised KeyError: 'k' \(the first of 2 errors\)$",
        ),
        (
            ExceptionGroup("g", [KeyError("k"), VerifierError("the judge is down", verifier="judge")]),
            r"^the judge is down \(the first of 2 errors\)$",
        ),
    ],
)
async def test_errors(rollout: Make, error: BaseException, message: str) -> None:
    async def verify(rollout: Rollout) -> float:
        raise error

    def verify_in_thread(rollout: Rollout) -> float:
        raise error

    verify_in_thread.__name__ = "verify"
    for verifier in (verify, verify_in_thread):
        with pytest.raises(VerifierError, match=message) as caught:
            await run_verifier(verifier, rollout("x"))
        assert len(str(caught.value)) < 2200
        assert caught.value.__cause__ is not None
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert Failure.of(caught.value, Stage.VERIFIER).kind is FailureKind.VERIFIER


async def test_errors_of_a_verifiers_own_task_group(rollout: Make) -> None:
    ended: list[str] = []

    async def part(name: str) -> None:
        try:
            if name == "bad":
                raise ValueError("no such file")
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    async def with_anyio(rollout: Rollout) -> float:
        async with anyio.create_task_group() as group:
            group.start_soon(part, "slow")
            group.start_soon(part, "bad")
        return 1.0

    async def with_asyncio(rollout: Rollout) -> float:
        async with asyncio.TaskGroup() as group:
            group.create_task(part("slow"))
            group.create_task(part("bad"))
        return 1.0

    for verifier in (with_anyio, with_asyncio):
        ended.clear()
        with pytest.raises(VerifierError, match=r"raised ValueError: no such file$"):
            await run_verifier(verifier, rollout("x"))
        assert sorted(ended) == ["bad", "slow"]


async def test_keyboard_interrupt_is_the_users(rollout: Make) -> None:
    async def verify(rollout: Rollout) -> float:
        raise BaseExceptionGroup("g", [ValueError("v"), KeyboardInterrupt()])

    with pytest.raises(KeyboardInterrupt):
        await run_verifier(verify, rollout("x"))


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(rollout: Make) -> None:
    async def directly(rollout: Rollout) -> float:
        helper = asyncio.ensure_future(asyncio.sleep(60))
        helper.cancel()
        await helper
        return 1.0

    def from_a_thread(rollout: Rollout) -> Any:
        return directly(rollout)

    for verifier in (directly, from_a_thread):
        with pytest.raises(VerifierError, match=r"nobody (had )?cancelled"):
            await run_verifier(verifier, rollout("x"))


async def test_a_cancellation_that_somebody_asked_for_is_passed_on(rollout: Make) -> None:
    arrived = asyncio.Event()
    ended = False

    async def verify(rollout: Rollout) -> float:
        nonlocal ended
        arrived.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended = True
        return 1.0

    attempt = asyncio.create_task(run_verifier(verify, rollout("x")))
    await arrived.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    assert ended
    for _ in range(2):  # a deadline, of either library
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await run_verifier(verify, rollout("x"))
        with pytest.raises(TimeoutError), anyio.fail_after(0.01):
            await run_verifier(verify, rollout("x"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_verifier(verify, rollout("x"))
    assert scope.cancelled_caught


async def test_what_a_verifier_changes_does_not_reach_the_rollout(rollout: Make) -> None:
    async def spoil(rollout: Rollout) -> float:
        rollout.items.append(Message(role="assistant", content="me, too"))
        rollout.items[0] = rollout.items[1]
        rollout.model_calls.clear()
        rollout.reward = 5.0
        rollout.reward_components["x"] = 1.0
        rollout.items = []
        rollout.metrics["seen"] = 1.0
        return 1.0

    attempt = rollout("x")
    attempt.model_calls[0].tokens = CallTokens([1], [2], [-0.5])
    before = attempt.model_dump_json()
    await run_verifier(spoil, attempt)
    assert attempt.metrics == {"seen": 1.0}  # the one thing that a verifier may add to
    attempt.metrics.clear()
    assert attempt.model_dump_json() == before


async def test_a_view_behaves_like_the_rollout(rollout: Make) -> None:
    attempt = rollout("five", "5")
    attempt.model_calls = [
        ModelCall(response_id="resp_1", first_item=1, end_item=2, tokens=CallTokens([1], [2], [-0.5]))
    ]

    async def look(view: Rollout) -> float:
        assert view == attempt
        assert view is not attempt
        assert view.output_text == "five"
        assert view.sequences()[0].token_ids == [1, 2]
        return 1.0

    assert (await run_verifier(look, attempt)).value == 1.0
