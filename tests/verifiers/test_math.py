from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers import Verifier, math_equivalent, run_verifier

Make = Callable[..., Rollout]


@pytest.fixture(scope="module")
def equivalent() -> Verifier:
    return math_equivalent(workers=1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 0.5", "1/2", 1.0),
        ("So we get $\\frac{2}{4}$.", "\\frac{1}{2}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{2x}", "2x+1", 0.0),
        ("\\boxed{x+1}", "$x+1$", 1.0),
        ("\\boxed{12}", 12, 1.0),
        ("I think 12 or 13", "12", 0.0),
        ("\\boxed{2\\sqrt{2}}", ["3", "\\sqrt{8}"], 1.0),
        ("", "3", 0.0),
        ("no idea", "3", 0.0),
    ],
)
async def test_equivalence(
    rollout: Make, equivalent: Verifier, text: str, answer: Any, expected: float
) -> None:
    assert (await run_verifier(equivalent, rollout(text, answer))).value == expected


@pytest.mark.asyncio
async def test_answers_that_are_not_mathematics(rollout: Make, equivalent: Verifier) -> None:
    with pytest.raises(VerifierError, match="task 't1': the answer '' is not a mathematical expression"):
        await run_verifier(equivalent, rollout("3", ""))
    with pytest.raises(VerifierError, match="task 't1' has no answer"):
        await run_verifier(equivalent, rollout("3"))


@pytest.mark.asyncio
async def test_a_hanging_comparison_fails_and_the_next_one_works(rollout: Make) -> None:
    verifier = math_equivalent(timeout_s=0.5, workers=1)
    start = time.perf_counter()
    with pytest.raises(VerifierError, match=r"did not finish within 0\.5 s"):
        await run_verifier(verifier, rollout("$2$", "\\sum_{n=1}^{1000000} \\frac{1}{n^2}"))
    assert (await run_verifier(verifier, rollout("\\boxed{4}", "2+2"))).value == 1.0
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"workers": 0}])
def test_limits_are_positive(options: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        math_equivalent(**options)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "gym-sdk\[math\]"'):
        math_equivalent()
