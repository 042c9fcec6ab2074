"""What a judge is shown and how it is read, for any text; and the requests, for a real server."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.errors import VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.transport.local import LocalTransport
from gym_sdk.verifiers import Judge, JudgeOptions, run_verifier
from gym_sdk.verifiers.judge import choice, json_field, quote, score

pytestmark = pytest.mark.asyncio

Make = Callable[..., Rollout]

FORMS = [score(), choice({"yes": 1.0, "no": 0.0}), json_field()]
PIECES = st.sampled_from(
    ["Score:", "verdict = ", '{"score":', "}", "**", "10", "-3", "/10", "0.5", "yes", "NO.", "\n", " ", "e9"]
)
TEXTS = st.text(max_size=80) | st.lists(PIECES, max_size=12).map("".join)


@given(text=TEXTS, place=st.integers(0, 2))
async def test_any_text_is_a_reward_or_a_value_error(text: str, place: int) -> None:
    try:
        value = FORMS[place](text)
    except ValueError:
        return
    assert 0.0 <= value <= 1.0


@given(before=TEXTS, tenths=st.integers(0, 100))
async def test_the_last_line_decides(before: str, tenths: int) -> None:
    assert FORMS[0](f"{before}\nScore: {tenths / 10}") == pytest.approx(tenths / 100)
    assert FORMS[1](f"{before}\nVerdict: yes") == 1.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "piece", ["score:", "score ", "verdict\n", "\n", " ", "1", "*", '{"a":', '{"x": 1,', "[", "- 1/10"]
)
async def test_no_text_takes_long(form: Any, piece: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="there is no"):
        form(piece * 200_000 + "\nx")
    assert time.process_time() - started < 2.0  # milliseconds; quadratic would be minutes


@given(st.dictionaries(st.sampled_from(["TASK", "ANSWER", "ANSWER A"]), st.text(), min_size=1))
async def test_no_text_contains_its_mark(material: dict[str, str]) -> None:
    quoted = quote(material)
    mark = quoted[len("The mark is ") : quoted.index(".")]
    assert quote(material | {"TASK": quoted}).startswith(f"The mark is {mark}.") is False
    assert quoted.count(mark) == 1 + 2 * len(material)
    for name, text in material.items():
        (found,) = re.findall(rf"<<<{name} {mark}\n(.*?)\n{mark} {name}>>>", quoted, re.DOTALL)
        assert found == text


@pytest_asyncio.fixture
async def server_url(untrained_policy: Path) -> AsyncIterator[str]:
    transport = LocalTransport(untrained_policy)
    await transport.open()
    try:
        yield (await transport.serving()).base_url
    finally:
        await transport.aclose()


async def test_a_real_server_takes_the_requests(rollout: Make, server_url: str) -> None:
    options = JudgeOptions(max_output_tokens=4, asks=2, fields={"temperature": 0.5})
    for api in ("responses", "chat"):
        async with Judge(server_url, "policy", api=api, options=options) as judge:  # type: ignore[arg-type]
            verify = judge.verifier("Is it right?", parse=lambda text: None)  # an untrained policy babbles
            with pytest.raises(VerifierError, match="no answer of 2 could be read"):
                await run_verifier(verify, rollout("x", "y"))
        assert 2 <= judge.usage.output_tokens <= 8
        assert judge.usage.input_tokens > 200
