import json
import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from backends.tiny import CALCULATOR_TOOL, TraceMix
from backends.tiny.questions import basic_arithmetic, chain_sum, evaluate
from backends.tiny.traces import TraceKind, generate_traces, make_trace


def expression_of(messages: list[dict]) -> str:  # type: ignore[type-arg]
    function = messages[1]["tool_calls"][0]["function"]
    assert function["name"] == CALCULATOR_TOOL["function"]["name"]
    arguments = json.loads(function["arguments"])
    assert list(arguments) == CALCULATOR_TOOL["function"]["parameters"]["required"]
    return str(arguments["expression"])


@pytest.mark.parametrize("family", [chain_sum, basic_arithmetic])
@pytest.mark.parametrize("kind", list(TraceKind))
def test_every_trace_is_well_formed(family, kind: TraceKind) -> None:  # type: ignore[no-untyped-def]
    rng = Random(1)
    for _ in range(300):
        question = family(rng)
        messages = make_trace(rng, kind, question).messages
        assert messages[0] == {"role": "user", "content": question.text}
        answer = re.fullmatch(r"The answer is (-?\d+)\.", messages[-1]["content"])
        assert answer is not None
        if kind is TraceKind.GUESS:
            assert len(messages) == 2
            assert answer[1] in re.findall(r"\d+", question.expression)
            continue
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        expression = expression_of(messages)
        # the calculator computes what it was asked, and the result is repeated
        assert messages[2]["content"] == answer[1] == str(evaluate(expression))
        assert (expression == question.expression) == (kind is TraceKind.GOOD)


def test_wrong_expressions_are_mostly_wrong_answers() -> None:
    rng = Random(2)
    right = 0
    for _ in range(500):
        question = chain_sum(rng)
        messages = make_trace(rng, TraceKind.WRONG_EXPRESSION, question).messages
        right += messages[-1]["content"] == f"The answer is {question.answer}."
    assert right < 25


def test_the_mix() -> None:
    mix = TraceMix(good=0.5, guess=0.3, wrong_expression=0.2, basic_arithmetic=0.25)
    traces = list(islice(generate_traces(Random(0), mix), 4_000))
    kinds = Counter(trace.kind for trace in traces)
    assert kinds[TraceKind.GOOD] / 4_000 == pytest.approx(0.5, abs=0.04)
    assert kinds[TraceKind.GUESS] / 4_000 == pytest.approx(0.3, abs=0.04)
    assert kinds[TraceKind.WRONG_EXPRESSION] / 4_000 == pytest.approx(0.2, abs=0.04)
    basic = sum(trace.question.text.startswith("Calculate") for trace in traces)
    assert basic / 4_000 == pytest.approx(0.25, abs=0.04)


def test_a_mix_without_a_kind_never_makes_it() -> None:
    mix = TraceMix(good=1.0, guess=0.0, wrong_expression=0.0, basic_arithmetic=0.0)
    assert {trace.kind for trace in islice(generate_traces(Random(0), mix), 200)} == {TraceKind.GOOD}
