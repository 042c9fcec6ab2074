"""Requests that are mostly written beforehand say what they would say otherwise."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.scripted import say

from gym_sdk import Limits, Sampling, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.rollout.requests import RequestWriter
from gym_sdk.rollout.run import RolloutRun
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.schema import FunctionCallOutput, ResponseRequest, Turn


@tool
async def look(where: str) -> str:
    """Look somewhere."""
    return where


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "seed": st.integers(0, 2**40),
        "chat_template_kwargs": st.just({"thinking": False}),
        "unknown": st.just({"a": [1, None]}),
        "instructions": st.text(max_size=5),
    },
)


@given(
    text=st.text(max_size=20),
    settings=SETTINGS,
    seed=st.none() | st.integers(0, 9),
    instructions=st.none() | st.text(max_size=5),
    tools=st.sampled_from([[], [look]]),
    continues=st.booleans(),
)
def test_what_is_sent_is_the_request(
    text: str,
    settings: dict[str, Any],
    seed: int | None,
    instructions: str | None,
    tools: Any,
    continues: bool,
) -> None:
    spec = RolloutSpec(
        caller=None,  # type: ignore[arg-type]
        model="policy",
        environment=Environment(tools=tools),
        sampling=Sampling(seed=seed, top_k=3, extra={"user": "me"}),
        limits=Limits(),
    )
    task = Task(text, id="t", settings=settings, instructions=instructions)
    rollout = RolloutRun(task, spec).rollout
    writer = RequestWriter(rollout, spec, spec.tools_for(None))
    if continues:
        answered = Turn.of(say("hm"))
        answered.remembered = True
        rollout.items += [item.without_tokens() for item in answered.output]
        writer.note(answered)
        rollout.items.append(FunctionCallOutput(call_id="c", output=text))
    request = writer.write(1)
    sent = json.loads(request.to_wire_json())
    assert sent == json.loads(json.dumps(request.to_wire()))
    assert ResponseRequest.model_validate(sent).to_wire() == request.to_wire()
    assert ("previous_response_id" in sent) == continues
