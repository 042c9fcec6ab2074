"""Rollouts and curves for human eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gym_sdk.errors import TokenContractError
from gym_sdk.schema import (
    Failure,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ModelCall,
    Outcome,
    Reasoning,
    Rollout,
    Task,
    TextPart,
    Timing,
)
from gym_sdk.tokens import CallTokens
from gym_sdk.view import describe_rollout, save_learning_curve, show_tokens


def rollout(tokens: CallTokens | None) -> Rollout:
    items = [
        Message(role="user", content="1 + 1\n="),
        Reasoning(content=[TextPart(text="easy")]),
        FunctionCall(call_id="c", name="add", arguments='{"a": 1}'),
        FunctionCallOutput(call_id="c", output="2"),
        Message(role="assistant", content="<b>2</b>"),
    ]
    call = ModelCall(response_id="resp_1", first_item=1, end_item=5, tokens=tokens)
    return Rollout(
        id="ro_1",
        task=Task("1 + 1 =", id="<sum>"),
        items=items,
        input_items=1,
        model_calls=[call],
        reward=1.0,
        timing=Timing(started_at=0.0),
    )


def decode(token_ids: Sequence[int]) -> str:
    return "".join("<&\n"[token_id] for token_id in token_ids)


def test_tokens_are_escaped_and_coloured_by_log_prob() -> None:
    view = show_tokens(rollout(CallTokens([0], [1, 2], [0.0, -9.0])), decode)
    html = view._repr_html_()
    assert "&lt;sum&gt;" in html
    assert '<span style="color:#888">&lt;</span>' in html
    assert 'hsl(120,80%,85%);color:#111">&amp;</span>' in html
    assert 'hsl(0,80%,85%);color:#111">⏎\n</span>' in html
    assert "log-prob -9.000" in html
    with pytest.raises(TokenContractError):
        show_tokens(rollout(None), decode)


def test_a_rollout_reads_line_by_line() -> None:
    text = describe_rollout(rollout(None))
    assert [line.split("|")[0].strip() for line in text.splitlines()[:-1]] == [
        "user",
        "thinking",
        "call",
        "output",
        "assistant",
    ]
    assert 'add({"a": 1})' in text
    assert text.endswith("= completed, reward 1")
    failed = rollout(None)
    failed.outcome, failed.reward = Outcome.FAILED, None
    failed.failure = Failure(error="DeadlineError", message="too slow", where="verifier")
    assert describe_rollout(failed).endswith("reward none (DeadlineError in verifier: too slow)")


def test_the_learning_curve_is_a_picture(tmp_path: Path) -> None:
    path = save_learning_curve([0.1, 0.5, 0.9], tmp_path / "deep" / "reward.png", held_out={0: 0.1, 3: 0.9})
    assert path.read_bytes().startswith(b"\x89PNG")
