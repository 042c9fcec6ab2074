import json
import re
from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest

from backends.tiny import RECIPES, ArithmeticMix, LockersMix, SpellingMix, TraceMix
from backends.tiny.families.arithmetic import ArithmeticTrace, arithmetic_trace
from backends.tiny.families.calculator import CALCULATOR_TOOL
from backends.tiny.families.lockers import LockersTrace, draw_trail, lockers_trace
from backends.tiny.families.questions import basic_arithmetic, chain_sum, evaluate
from backends.tiny.families.spelling import SpellingTrace, spelling_trace


def arguments_of(messages: list[dict[str, Any]], tool: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the arguments of each call, all of which must be calls of the tool."""
    found = []
    for message in messages:
        for call in message.get("tool_calls", []):
            assert call["function"]["name"] == tool["function"]["name"]
            arguments = json.loads(call["function"]["arguments"])
            assert list(arguments) == tool["function"]["parameters"]["required"]
            found.append(arguments)
    return found


def roles(messages: list[dict[str, Any]]) -> list[str]:
    return [message["role"] for message in messages]


@pytest.mark.parametrize("family", [chain_sum, basic_arithmetic])
@pytest.mark.parametrize("kind", list(ArithmeticTrace))
def test_every_arithmetic_trace_is_well_formed(family: Any, kind: ArithmeticTrace) -> None:
    rng = Random(1)
    for _ in range(300):
        question = family(rng)
        messages = arithmetic_trace(rng, kind, question)
        assert messages[0] == {"role": "user", "content": question.text}
        answer = re.fullmatch(r"The answer is (-?\d+)\.", messages[-1]["content"])
        assert answer is not None
        if kind is ArithmeticTrace.GUESS:
            assert len(messages) == 2
            assert answer[1] in re.findall(r"\d+", question.expression)
            continue
        assert roles(messages) == ["user", "assistant", "tool", "assistant"]
        ((expression,),) = (arguments.values() for arguments in arguments_of(messages, CALCULATOR_TOOL))
        # the calculator computes what it was asked, and the result is repeated
        assert messages[2]["content"] == answer[1] == str(evaluate(expression))
        assert (expression == question.expression) == (kind is ArithmeticTrace.GOOD)


def test_wrong_expressions_are_mostly_wrong_answers() -> None:
    rng = Random(2)
    right = 0
    for _ in range(500):
        question = chain_sum(rng)
        messages = arithmetic_trace(rng, ArithmeticTrace.WRONG_EXPRESSION, question)
        right += messages[-1]["content"] == f"The answer is {question.answer}."
    assert right < 25


def test_lockers_are_followed_to_the_end_or_not_beyond_the_first() -> None:
    rng = Random(3)
    for _ in range(200):
        trail = draw_trail(rng)
        names = [name for name, _ in trail]
        assert len(set(names)) == len(names)
        opened = {
            LockersTrace.FOLLOW: names,
            LockersTrace.HASTY: names[:1],
            LockersTrace.STUCK: names[:1] * 2,
        }
        for kind, expected in opened.items():
            messages = lockers_trace(kind, trail)
            calls = arguments_of(messages, LockersMix.tool or {})
            assert [arguments["locker"] for arguments in calls] == expected
            assert messages[-1]["role"] == "assistant"
            digits = "".join(digit for _, digit in trail)
            said = digits if kind is LockersTrace.FOLLOW else digits[0]
            assert messages[-1]["content"] == f"The code is {said}."
            # only one that follows has the code: each trail is longer than one locker
            assert (said == digits) == (kind is LockersTrace.FOLLOW)


def test_words_are_spelled() -> None:
    answers = {kind: spelling_trace(kind, "abcde")[-1]["content"] for kind in SpellingTrace}
    assert answers == {"backward": "edcba", "half": "edc", "forward": "abcde"}


@pytest.mark.parametrize(
    ("mix", "messages"),
    [
        (ArithmeticMix(good=1.0, guess=0.0, wrong_expression=0.0), {4}),
        (ArithmeticMix(good=0.0, guess=1.0, wrong_expression=0.0), {2}),
        (LockersMix(follow=1.0, hasty=0.0, stuck=0.0), {6, 8, 10}),
        (LockersMix(follow=0.0, hasty=1.0, stuck=0.0), {4}),
        (LockersMix(follow=0.0, hasty=0.0, stuck=1.0), {6}),
    ],
)
def test_a_mix_of_one_kind_never_makes_another(mix: TraceMix, messages: set[int]) -> None:
    assert {len(trace) for trace in islice(mix.traces(Random(0)), 200)} == messages


def test_the_mix_of_arithmetic() -> None:
    mix = ArithmeticMix(good=0.5, guess=0.3, wrong_expression=0.2, basic_arithmetic=0.25)
    traces = list(islice(mix.traces(Random(0)), 4_000))
    kinds = Counter(len(messages) for messages in traces)
    assert kinds[2] / 4_000 == pytest.approx(0.3, abs=0.04)
    basic = sum(messages[0]["content"].startswith("Calculate") for messages in traces)
    assert basic / 4_000 == pytest.approx(0.25, abs=0.04)


def test_the_mix_of_lockers() -> None:
    traces = list(islice(LockersMix(follow=0.5, hasty=0.3, stuck=0.2).traces(Random(0)), 4_000))
    locked = sum(any(message["content"] == "locked" for message in messages) for messages in traces)
    assert locked / 4_000 == pytest.approx(0.2, abs=0.04)
    assert sum(len(messages) == 4 for messages in traces) / 4_000 == pytest.approx(0.3, abs=0.04)


def test_the_mix_of_spelling() -> None:
    traces = list(islice(SpellingMix(backward=0.5, half=0.3, forward=0.2).traces(Random(0)), 4_000))
    words = [(trace[0]["content"].rsplit(" ", 1)[1], trace[1]["content"]) for trace in traces]
    assert sum(len(said) < len(word) for word, said in words) / 4_000 == pytest.approx(0.3, abs=0.04)
    assert sum(said == word[::-1] for word, said in words) / 4_000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", list(RECIPES))
def test_drills_give_a_line_and_ask_for_what_follows_from_it(name: str) -> None:
    rng = Random(0)
    for _ in range(100):
        given, *asked = RECIPES[name].mix.drill(rng)
        assert (
            asked
            == {
                "arithmetic": [given, given],
                "lockers": [re.sub(r"[a-z]", "", given), given],
                "spelling": [given[::-1]],
            }[name]
        )
