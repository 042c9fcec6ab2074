from __future__ import annotations

import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.environments import (
    arithmetic,
    arithmetic_tasks,
    calculator,
    load_tasks,
    reasoning_gym_tasks,
    save_tasks,
)
from gym_sdk.environments.calculator import CalculationError, evaluate, format_number
from gym_sdk.errors import ConfigurationError, ToolError
from gym_sdk.schema import Message, ModelCall, Rollout, Task, Timing
from gym_sdk.verifiers import run_verifier

FAMILIES: list[Any] = ["chain_sum", "basic_arithmetic"]


async def reward(family: Any, task: Task, text: str) -> float:
    rollout = Rollout(
        id="r",
        task=task,
        items=[Message(role="assistant", content=text)],
        model_calls=[ModelCall(response_id="resp", first_item=0, end_item=1)],
        timing=Timing(started_at=0.0),
    )
    verifier = arithmetic(family).verifier
    assert verifier is not None
    return (await run_verifier(verifier, rollout)).value


@pytest.mark.asyncio
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_reward(family: Any, tmp_path: Any) -> None:
    save_tasks(tmp_path / "t.jsonl", arithmetic_tasks(family, size=20, seed=1))
    for task in load_tasks(tmp_path / "t.jsonl"):
        answer = task.answer
        expression = re.sub(r"^.*: | =$|^Calculate |\.$", "", str(task.input))
        (tool,) = arithmetic(family).tools_for(None)
        assert await tool.run(f'{{"expression": "{expression}"}}') == answer
        assert await reward(family, task, f"The answer is {answer}.") == 1.0
        for text in (
            "",
            answer,
            f"The answer is {answer}",
            f"The answer is {answer}.\n",
            f" The answer is {answer}.",
            f"the answer is {answer}.",
            f"So: The answer is {answer}.",
            f"The answer is  {answer}.",
            f"The answer is {answer}..",
            f"The answer is {int(answer) + 1}.",
            f"The answer is {int(answer) + 1}. The answer is {answer}.",
            "The answer is N.",
        ):
            assert await reward(family, task, text) == 0.0, text


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_never_share_a_question(family: Any) -> None:
    train = {task.input for seed in (0, 1) for task in arithmetic_tasks(family, size=1500, seed=seed)}
    held_out = [task.input for task in arithmetic_tasks(family, size=256, seed=0, split="held_out")]
    assert not train & set(held_out)
    assert len(set(held_out)) > 200
    assert len(train) > 2_000  # neighbouring seeds are different tasks


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_stable(family: Any) -> None:
    tasks = arithmetic_tasks(family, size=100, seed=3)
    assert arithmetic_tasks(family, size=100, seed=3) == tasks
    assert arithmetic_tasks(family, size=10, seed=3) == tasks[:10]
    assert [task.id for task in tasks[:2]] == [f"{family}-train-3-0", f"{family}-train-3-1"]
    assert len({task.id for task in tasks}) == 100
    assert arithmetic_tasks(family, size=0, seed=3) == []


def test_the_families() -> None:
    sums = [str(task.input) for task in arithmetic_tasks("chain_sum", size=300, seed=0)]
    assert {len(re.findall(r"\d+", text)) for text in sums} == {2, 3}
    assert {len(number) for text in sums for number in re.findall(r"\d+", text)} == {1, 2}
    basic = " ".join(str(task.input) for task in arithmetic_tasks("basic_arithmetic", size=300, seed=0))
    assert {"(", "/", "*", "-("} <= set(basic.split())
    easy = arithmetic_tasks("chain_sum", size=5, seed=0, max_terms=2, max_digits=1)
    assert all(re.search(r": \d [+-] \d =$", str(task.input)) for task in easy)


def test_bad_families_and_splits() -> None:
    with pytest.raises(ConfigurationError, match="no family 'sums'; there are: chain_sum, basic_arithmetic"):
        arithmetic("sums")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no family 'sums'"):
        arithmetic_tasks("sums", size=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no split 'test'"):
        arithmetic_tasks(size=1, seed=0, split="test")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="reasoning-gym dataset chain_sum: min_terms"):
        arithmetic_tasks(size=1, seed=0, min_terms=0)


def test_tasks_of_any_dataset() -> None:
    tasks = reasoning_gym_tasks("countdown", 3, 5, instructions="Be brief.")
    assert [task.id for task in tasks] == ["countdown-5-0", "countdown-5-1", "countdown-5-2"]
    assert tasks[0].instructions == "Be brief."
    assert tasks[0].metadata["tags"] == ["countdown"]
    assert reasoning_gym_tasks("countdown", 3, 5, instructions="Be brief.") == tasks
    assert reasoning_gym_tasks("countdown", 0, 5) == []
    with pytest.raises(ConfigurationError, match="no dataset 'countup'"):
        reasoning_gym_tasks("countup", 1, 1)
    with pytest.raises(ConfigurationError, match=r"dataset countdown: .*unexpected keyword argument 'wings'"):
        reasoning_gym_tasks("countdown", 1, 1, wings=2)
    with pytest.raises(ConfigurationError, match="size must not be negative"):
        reasoning_gym_tasks("countdown", -1, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("2 + 3", "5"),
        ("2+3*4", "14"),
        ("-( 2 + -8 ) * 4", "24"),
        ("--5", "5"),
        ("+5", "5"),
        ("8 / 4", "2"),
        ("1 / 3", "0.333333333333"),
        ("-2 / 3", "-0.666666666667"),
        ("1 / 8", "0.125"),
        ("0.1 + 0.2", "0.3"),
        ("1.50", "1.5"),
        ("10 / 4 * 2", "5"),
        ("007 + 01", "8"),
        ("10.05", "10.05"),
        ("1. + .5", "1.5"),
        ("2 \u00d7 3 \u00f7 6 \u2212 1", "0"),
        ("1000000 / 3", "333333.333333"),
        ("10 / 100000", "0.0001"),
        ("9" * 90 + "*" + "9" * 90, str((10**90 - 1) ** 2)),
        ("\n 1 +\n 2 ", "3"),
    ],
)
async def test_calculator(expression: str, output: str) -> None:
    assert await calculator(expression) == output


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "the expression is empty"),
        ("1 / 0", "division by zero"),
        ("1 / (2 - 2)", "division by zero"),
        ("1 +", r"'1 \+' is not a complete arithmetic expression"),
        ("(1", "not a complete"),
        ("1 2", "not a complete"),
        ("1..2", "not a complete"),
        ("...", r"only \+ - \* / and brackets"),
        ("2 ** 9", r"no \*\* or //"),
        ("7 // 2", r"no \*\* or //"),
        ("2 (3)", r"write \* between"),
        ("()", r"only \+ - \* / and brackets"),
        ("x + 1", "'x' is not allowed"),
        ("__import__('os')", "'_' is not allowed"),
        ("1e9", "'e' is not allowed"),
        ("1, 2", "',' is not allowed"),
        ("2 = 2", "'=' is not allowed"),
        ("1+" * 101 + "1", "has 203 characters; the limit is 200"),
        ("(" * 100 + "1" + ")" * 99, "not a complete"),
    ],
)
async def test_calculator_errors_tell_the_model(expression: str, message: str) -> None:
    with pytest.raises(ToolError, match=message) as caught:
        await calculator(expression)
    assert caught.value.tool == "calculator"


def test_imports_stay_light() -> None:
    code = "import sys, gym_sdk.tools, gym_sdk.verifiers, gym_sdk.environments;print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    heavy = {"torch", "transformers", "openai", "aiohttp", "reasoning_gym", "math_verify", "jsonschema"}
    assert not heavy & set(loaded.stdout.split())


def test_nesting_is_bounded() -> None:
    assert evaluate("-" * 199 + "1") == -1
    assert evaluate("(" * 99 + "1" + ")" * 99) == 1


@settings(deadline=None)
@given(st.text() | st.text("0123456789.+-*/() "))
def test_any_text_is_a_value_or_a_calculation_error(text: str) -> None:
    try:
        assert isinstance(evaluate(text), Fraction)
    except CalculationError as error:
        assert str(error)  # noqa: PT017


_expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda child: (
        st.tuples(child, st.sampled_from("+-*/"), child).map(lambda t: f"({t[0]}{t[1]}{t[2]})")
        | child.map(lambda inner: f"-{inner}")
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(_expressions)
def test_the_value_is_pythons(expression: str) -> None:
    exact = re.sub(r"(\d+)", r"Fraction(\1)", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(CalculationError, match="division by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == expected
    assert abs(Fraction(format_number(expected)) - expected) <= abs(expected) * Fraction(1, 10**11)
