from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gym_sdk.schema import Message, ModelCall, Rollout, Task, Timing


def make(text: str, answer: Any = None, **task: Any) -> Rollout:
    return Rollout(
        id="r1",
        task=Task("question", answer=answer, id="t1", **task),
        items=[Message(role="user", content="question"), Message(role="assistant", content=text)],
        input_items=1,
        model_calls=[ModelCall(response_id="resp_1", first_item=1, end_item=2)],
        timing=Timing(started_at=0.0),
    )


@pytest.fixture(scope="session")
def rollout() -> Callable[..., Rollout]:
    return make
