from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers import (
    Verifier,
    contains,
    exact,
    json_schema,
    last_number,
    numeric,
    regex,
    run_verifier,
)

Make = Callable[..., Rollout]


async def value(verifier: Verifier, rollout: Rollout) -> float:
    return (await run_verifier(verifier, rollout)).value


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("verifier", "text", "answer", "expected"),
    [
        (exact(), " Paris\n", "Paris", 1.0),
        (exact(), "paris", "Paris", 0.0),
        (exact(casefold=True), "STRASSE", "Straße", 1.0),
        (exact(strip=False), " Paris", "Paris", 0.0),
        (exact(), "5", 5, 1.0),
        (exact(), "true", True, 1.0),
        (exact(), "b", ["a", "b"], 1.0),
        (exact(), "", "", 1.0),
        (contains(), "The answer is 5.", "5", 1.0),
        (contains(), "The answer is 5.", 5, 1.0),
        (contains(), "The answer is 15.", "5", 0.0),
        (contains(), "The answer is 5.2", "5", 0.0),
        (contains(), "The answer is 2.5", "5", 0.0),
        (contains(), "The answer is -5", "5", 0.0),
        (contains(), "The answer is -5", "-5", 1.0),
        (contains(), "1,500", "500", 0.0),
        (contains(), "a party", "art", 0.0),
        (contains(casefold=True), "In PARIS!", "paris", 1.0),
        (contains(), "anything", "", 0.0),
        (contains(), "f(x) = (a+b)", "(a+b)", 1.0),
        (regex(r"answer is (\d+)"), "the answer is 4. No, the answer is 5.", "5", 1.0),
        (regex(r"answer is (\d+)"), "answer is 4", "5", 0.0),
        (regex(r"answer is (\d+)"), "", "5", 0.0),
        (regex(r"\d+"), "1 2 3", 3, 1.0),
        (regex(r"<a>(?P<x>.*)</a>", "x"), "<a> yes </a>", "yes", 1.0),
        (regex(r"(a)|(b)", 2), "a", "a", 0.0),
        (regex(r"The answer is (.*)\.", fullmatch=True), "The answer is 5.", "5", 1.0),
        (regex(r"The answer is (.*)\.", fullmatch=True), "So: The answer is 5.", "5", 0.0),
        (regex(r"ANSWER (\w)", flags=re.IGNORECASE), "answer x", "x", 1.0),
        (numeric(), "2 + 3 = 5", "5", 1.0),
        (numeric(), "It is 5.0 apples", 5, 1.0),
        (numeric(), "no digits", 5, 0.0),
        (numeric(), "0.333333", "1/3", 1.0),
        (numeric(), "0.33", "1/3", 0.0),
        (numeric(tolerance=0.01), "0.33", "1/3", 1.0),
        (numeric(tolerance=0, relative=0.01), "1009", 1000, 1.0),
        (numeric(tolerance=0, relative=0.01), "1011", 1000, 0.0),
        (numeric(tolerance=0), "0.1", 0.1, 1.0),
        (numeric(), "so \u22123", -3, 1.0),
        (numeric(), "12,345.5", 12345.5, 1.0),
        (numeric(), "50%", 0.5, 1.0),
        (numeric(), "7", ["5", "7"], 1.0),
        (numeric(), "18", "She sells 9 eggs.\n#### 18", 1.0),
    ],
)
async def test_verifiers(rollout: Make, verifier: Verifier, text: str, answer: Any, expected: float) -> None:
    assert await value(verifier, rollout(text, answer)) == expected


@pytest.mark.asyncio
@pytest.mark.parametrize("factory", [exact, contains, numeric, lambda: regex("x")])
@pytest.mark.parametrize("answer", [None, {"a": 1}, [], [None], [["a"]]])
async def test_a_task_without_a_usable_answer_is_an_error(
    rollout: Make, factory: Callable[[], Verifier], answer: Any
) -> None:
    with pytest.raises(VerifierError, match=r"task 't1' has (no answer|the answer)"):
        await run_verifier(factory(), rollout("x", answer))


@pytest.mark.asyncio
async def test_a_numeric_answer_needs_a_number(rollout: Make) -> None:
    with pytest.raises(VerifierError, match="the answer 'many' of task 't1' has no number"):
        await run_verifier(numeric(), rollout("5", "many"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5),
        ("The answer is 5.", 5),
        ("-5", -5),
        ("7-3", 3),
        ("7 - 3", 3),
        ("(7)-3", 3),
        ("x=-3", -3),
        ("(-3)", -3),
        ("\u22123.5", Fraction(-7, 2)),
        ("\u20133", -3),
        ("+4", 4),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("1,234,567.25", Fraction(123456725, 100)),
        ("1\u202f234", 1234),
        ("1,23", 23),
        ("1,2345", 2345),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("3/0", 3),
        ("3/1.5", 2),
        ("1 / 2 / 4", 4),
        ("1e3", 1000),
        ("2.5E-2", Fraction(1, 40)),
        ("1e99999", None),
        ("50%", Fraction(1, 2)),
        ("12.5 %", Fraction(1, 8)),
        ("$5", 5),
        ("-$5", -5),
        ("\u20ac1,000", 1000),
        ("5km", 5),
        ("H2O", None),
        ("x_2", None),
        ("", None),
        ("none", None),
        ("9" * 500, None),
        ("4 and " + "9" * 500, 4),
        ("٣", None),
    ],
)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


@settings(deadline=None)
@given(st.integers())
def test_integers_are_read_back(number: int) -> None:
    assert last_number(str(number)) == number
    assert last_number(f"It is {number:,}.") == number
    assert last_number(f"It is {number}!".replace("-", "\u2212")) == number


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=6), st.text(alphabet="abc ,.!?\n"))
def test_decimals_are_read_back_exactly(number: Any, noise: str) -> None:
    assert last_number(f"{noise} {number:f} {noise}") == Fraction(number)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    last_number(text)


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_numeric_rejects_bad_tolerances(limit: float) -> None:
    with pytest.raises(ConfigurationError, match="tolerance must be finite"):
        numeric(tolerance=limit)
    with pytest.raises(ConfigurationError, match="tolerance must be finite"):
        numeric(relative=limit)


@pytest.mark.parametrize(("pattern", "group"), [("(", None), ("a", 1), ("(a)", 2), ("(a)", "x"), ("(a)", -1)])
def test_regex_rejects_bad_patterns(pattern: str, group: Any) -> None:
    with pytest.raises(ConfigurationError, match="pattern"):
        regex(pattern, group)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', 1.0),
        (' {"a": 1}\n', 1.0),
        ('{"a": "1"}', 0.0),
        ("{}", 0.0),
        ("", 0.0),
        ('Here: {"a": 1}', 0.0),
        ('{"a": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ("1" * 5_000, 0.0),
    ],
)
async def test_json_schema(rollout: Make, text: str, expected: float) -> None:
    assert await value(json_schema(SCHEMA), rollout(text)) == expected


@pytest.mark.asyncio
async def test_json_schema_reads_no_other_documents(rollout: Make) -> None:
    verifier = json_schema({"$ref": "http://localhost:1/schema.json"})
    with pytest.raises(VerifierError, match="verifier json_schema raised"):
        await run_verifier(verifier, rollout("1"))


def test_json_schema_checks_the_schema() -> None:
    with pytest.raises(ConfigurationError, match=r"not valid at \$.type"):
        json_schema({"type": "text"})


@pytest.mark.parametrize(
    ("package", "make"), [("jsonschema", lambda: json_schema({})), ("reasoning_gym", None)]
)
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, make: Callable[[], Verifier] | None
) -> None:
    from gym_sdk.verifiers import reasoning_gym

    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ConfigurationError, match=r'pip install "gym-sdk\[tasks\]"'):
        (make or reasoning_gym)()
