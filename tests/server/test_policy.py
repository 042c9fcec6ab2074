"""The policy without HTTP: prompts extend what was sampled, or fork with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.replay import ReplayEngine

from backends.engine import Engine
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from gym_sdk.errors import ContextOverflowError, PolicyError
from gym_sdk.schema import FunctionCall, Response, ResponseRequest
from gym_sdk.tokens import merge_calls

TOOL = {
    "type": "function",
    "name": "calculator",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy)


def wire(response: Response, *, tokens: bool = True) -> list[dict[str, Any]]:
    return response.in_form("item" if tokens else "response")["output"]


async def ask(policy: Policy, items: Sequence[Any], **fields: Any) -> Response:
    return await policy.respond(ResponseRequest.model_validate({"input": list(items), **fields}))


def test_the_replay_engine_is_an_engine() -> None:
    assert isinstance(ReplayEngine([]), Engine)


@pytest.mark.asyncio
async def test_a_tool_call_with_odd_formatting_is_kept_token_for_token(renderer: TemplateRenderer) -> None:
    text = '<tool_call>\n{ "name":"calculator" ,"arguments":{"expression":"1 + 2"}}\n</tool_call><|im_end|>'
    engine = ReplayEngine([renderer.encode(text), renderer.encode("The answer is 3.<|im_end|>")])
    policy = Policy(engine, renderer)
    user = {"role": "user", "content": "1 + 2 ="}
    first = await ask(policy, [user], tools=[TOOL])
    call = first.output[0]
    assert isinstance(call, FunctionCall)
    assert (call.name, call.arguments) == ("calculator", '{"expression":"1 + 2"}')
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    second = await ask(policy, [user, *wire(first), output], tools=[TOOL])
    assert second.fork is None
    assert first.tokens is not None
    assert second.tokens is not None
    known = first.tokens.token_ids
    assert second.tokens.prompt_token_ids[: len(known)] == known
    tail = renderer.decode(second.tokens.prompt_token_ids[len(known) :])
    assert (
        tail == "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(merge_calls([first.tokens, second.tokens])) == 1
    assert second.output_text == "The answer is 3."


@pytest.mark.parametrize("echo", [True, False], ids=["fields echoed", "fields dropped"])
@pytest.mark.parametrize("forget", [False, True], ids=["remembered", "server restarted"])
@pytest.mark.asyncio
async def test_sampled_tokens_survive_clients_and_restarts(
    renderer: TemplateRenderer, echo: bool, forget: bool
) -> None:
    # spelled letter by letter: encoding the text again gives other ids
    odd = [token for letter in "answer" for token in renderer.encode(letter)]
    assert odd != renderer.encode("answer")
    odd += renderer.encode("<|im_end|>")
    engine = ReplayEngine([odd, odd, odd])
    policy = Policy(engine, renderer)
    history: list[Any] = []
    responses: list[Response] = []
    for turn in range(3):
        history.append({"role": "user", "content": f"turn {turn}"})
        if forget:
            policy = Policy(engine, renderer)
        responses.append(await ask(policy, history))
        history += wire(responses[-1], tokens=echo)
    calls = [response.tokens for response in responses if response.tokens is not None]
    assert len(calls) == 3
    if echo or not forget:
        assert len(merge_calls(calls)) == 1
        assert policy.stats.forks == 0
    else:
        # nobody knows these tokens any more; rendered anew, and not claimed to be what was sampled
        assert responses[0].fork is None
        assert all("not remembered any more" in str(response.fork) for response in responses[1:])
        assert len(merge_calls(calls)) == 3


@pytest.mark.asyncio
async def test_changed_instructions_fork(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("yes<|im_end|>")] * 2), renderer)
    user = {"role": "user", "content": "q"}
    first = await ask(policy, [user], instructions="Be kind.")
    second = await ask(policy, [user, *wire(first), user], instructions="Be brief.")
    assert second.fork is not None


@pytest.mark.asyncio
async def test_a_generation_that_was_cut_is_closed(renderer: TemplateRenderer) -> None:
    cut = renderer.encode("The answer")
    policy = Policy(ReplayEngine([cut, cut]), renderer)
    user = {"role": "user", "content": "q"}
    first = await ask(policy, [user], max_output_tokens=2)
    assert first.status == "incomplete"
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    second = await ask(policy, [user, *wire(first), {"role": "user", "content": "go on"}])
    assert first.tokens is not None
    assert second.tokens is not None
    tail = second.tokens.prompt_token_ids[len(first.tokens.token_ids) :]
    assert renderer.decode(tail).startswith("<|im_end|>\n<|im_start|>user\ngo on<|im_end|>")
    assert second.fork is None


token_texts = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", "{", '"name"', ": "),
            '{"name": "calculator", "arguments": {"expression": "1"}}',
        ]
    )
    | st.text(max_size=6),
    max_size=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(token_texts, st.booleans(), st.text(max_size=8)), min_size=1, max_size=4))
@pytest.mark.asyncio
async def test_prompts_extend_what_was_sampled_or_report_a_fork(
    renderer: TemplateRenderer, turns: list[tuple[list[str], bool, str]]
) -> None:
    """Whatever is sampled, token by token in any segmentation, no drift stays silent."""
    stop = renderer.encode("<|im_end|>")
    generations = [
        [token for text in texts for token in renderer.encode(text)] + stop * closed
        for texts, closed, _ in turns
    ]
    policy = Policy(ReplayEngine(generations), renderer)
    history: list[Any] = []
    known: list[int] = []
    for _, _, reply in turns:
        pending = [item["call_id"] for item in history if item["type"] == "function_call"]
        answered = {item["call_id"] for item in history if item["type"] == "function_call_output"}
        missing = [call_id for call_id in pending if call_id not in answered]
        history += [{"type": "function_call_output", "call_id": name, "output": reply} for name in missing]
        if not missing:
            history.append({"type": "message", "role": "user", "content": reply})
        response = await ask(policy, history, tools=[TOOL])
        assert response.tokens is not None
        extends = response.tokens.prompt_token_ids[: len(known)] == known
        assert extends or response.fork is not None
        assert extends, response.fork
        known = response.tokens.token_ids
        history += wire(response)


@pytest.mark.asyncio
async def test_a_prompt_longer_than_the_context(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([], context_length=8), renderer)
    with pytest.raises(ContextOverflowError, match="the context holds 8") as caught:
        await ask(policy, [{"role": "user", "content": "a long question, longer than that"}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.prompt_tokens is not None
    assert caught.value.prompt_tokens > 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-9"}, "model"),
        ({"stream": True}, "stream"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"background": True}, "background"),
        ({"include": ["everything"]}, "include[0]"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ],
)
@pytest.mark.asyncio
async def test_what_cannot_be_honoured_is_refused_by_name(
    renderer: TemplateRenderer, fields: dict[str, Any], param: str
) -> None:
    policy = Policy(ReplayEngine([]), renderer)
    with pytest.raises(PolicyError) as caught:
        await ask(policy, [{"role": "user", "content": "q"}], **fields)
    assert caught.value.param == param


@pytest.mark.asyncio
async def test_unsupported_items_and_ids_are_refused_by_name(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([], vocab_size=500), renderer)
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}
    with pytest.raises(PolicyError) as caught:
        await ask(policy, [image])
    assert caught.value.param == "input[0].content[0].type"
    with pytest.raises(PolicyError) as caught:
        await ask(policy, [{"type": "computer_call", "id": "x"}])
    assert caught.value.param == "input[0].type"
    with pytest.raises(PolicyError) as caught:
        await ask(policy, [])
    assert caught.value.param == "input"
    foreign = {
        "type": "message",
        "role": "assistant",
        "content": "x",
        "prompt_token_ids": [1],
        "generation_token_ids": [500],
        "generation_log_probs": [-1.0],
    }
    with pytest.raises(PolicyError, match="vocabulary has 500") as caught:
        await ask(policy, [{"role": "user", "content": "q"}, foreign])
    assert caught.value.param == "input[1].generation_token_ids"


@pytest.mark.asyncio
async def test_harmless_fields_are_accepted_and_echoed(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("yes<|im_end|>")]), renderer)
    response = await ask(
        policy,
        [{"role": "user", "content": "q"}],
        metadata={"run": "1"},
        user="me",
        text={"format": {"type": "text"}},
        truncation="disabled",
        tool_choice="auto",
        tools=[TOOL],
    )
    body = json.loads(response.to_wire_json())
    assert body["metadata"] == {"run": "1"}
    assert body["tools"][0]["name"] == "calculator"
    assert body["status"] == "completed"
