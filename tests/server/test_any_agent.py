"""Whatever an agent does with what it got: its next prompt extends what was sampled, or forks aloud."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, ResponseRequest
from gym_sdk.tokens import CallTokens, TokenReport, merge_calls

pytestmark = pytest.mark.asyncio

TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
SAYINGS = [
    "Plain words.<|im_end|>",
    "<think>\nhm, well\n</think>\n\nThought of it.<|im_end|>",
    '<tool_call>\n{ "name":"add",  "arguments":{"a":1 , "b": "é"}}\n</tool_call><|im_end|>',
    '<think>\nso\n</think>\n\nFirst.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call><|im_end|>',
    "<tool_call>\nno call at all\n</tool_call> and then some<|im_end|>",
    "cut off in the mid",
    "<|im_end|>",
]


@dataclass(frozen=True)
class Turn:
    """What is said, and what the agent does before it asks again."""

    saying: int
    cuts: int
    echo: Literal["item", "ids", "words", "previous"]
    drop_thinking: bool
    write_json_anew: bool
    then: Literal["go on", "edit", "edit older", "insert", "instruct", "forget", "truncate", "again"]
    restart: bool


turns = st.builds(
    Turn,
    saying=st.integers(0, len(SAYINGS) - 1),
    cuts=st.integers(0, 2**16),
    echo=st.sampled_from(["item", "ids", "words", "previous"]),
    drop_thinking=st.booleans(),
    write_json_anew=st.booleans(),
    then=st.sampled_from(
        ["go on", "go on", "go on", "edit", "edit older", "insert", "instruct", "forget", "truncate", "again"]
    ),
    restart=st.integers(0, 7).map(lambda number: number == 0),
)


@pytest.fixture(scope="module")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy)


def sampled(renderer: TemplateRenderer, turn: Turn) -> list[int]:
    """Return the ids of what is said, cut into other tokens than the tokenizer's."""
    ids: list[int] = []
    bits = turn.cuts
    for piece in renderer.special.split(SAYINGS[turn.saying]):
        half = len(piece) // 2
        if piece not in renderer.special and half and bits & 1:
            ids += renderer.encode(piece[:half]) + renderer.encode(piece[half:])
        else:
            ids += renderer.encode(piece)
        bits >>= 1
    return ids


class Agent:
    """Keeps a history in its own way, and asks a policy with it."""

    def __init__(self, renderer: TemplateRenderer, plan: list[Turn], scope: str) -> None:
        self.scope = scope
        self._renderer = renderer
        self._engine = ReplayEngine([sampled(renderer, turn) for turn in plan] * 2)
        self.policy = Policy(self._engine, renderer)
        self.history: list[dict[str, Any]] = []
        self.instructions: str | None = None
        self.calls: list[CallTokens] = []
        self.forks: list[str | None] = []
        self.last: Response | None = None
        self.since: int | None = None
        """Where the items that follow the last response begin, if the next request only sends those."""

    async def ask(self, turn: Turn) -> Response:
        if turn.restart:
            self.policy = Policy(self._engine, self._renderer)
        fields: dict[str, Any] = {"input": self.history}
        if self.since is not None and self.last is not None:
            fields = {"input": self.history[self.since :], "previous_response_id": self.last.id}
        body = {**fields, "tools": [TOOL], "instructions": self.instructions}
        try:
            response = await self._send(body)
        except PolicyError as error:
            if error.code != "previous_response_not_found" or not turn.restart:
                raise
            body.pop("previous_response_id")
            response = await self._send({**body, "input": self.history})
        assert response.tokens is not None
        self.calls.append(response.tokens)
        self.forks.append(response.fork)
        self.last = response
        return response

    async def _send(self, body: dict[str, Any]) -> Response:
        return await self.policy.respond(ResponseRequest.model_validate(body), scope=self.scope)

    def take(self, response: Response, turn: Turn) -> None:
        """Add the output to the history, as this agent keeps it."""
        items = response.in_form("item" if turn.echo == "item" else "response")["output"]
        self.since = None
        for item in items:
            if turn.drop_thinking and item["type"] == "reasoning":
                continue
            if turn.echo == "words":
                item.pop("id", None)
                item.pop("status", None)
            if turn.write_json_anew and item["type"] == "function_call":
                item["arguments"] = json.dumps(json.loads(item["arguments"]), indent=1)
            self.history.append(item)
        if turn.echo == "previous":
            self.since = len(self.history)

    def act(self, turn: Turn) -> None:
        """Do something to the history, then say what the policy answers to."""
        answered = {item["call_id"] for item in self.history if item.get("type") == "function_call_output"}
        called = [item["call_id"] for item in self.history if item.get("type") == "function_call"]
        for name in reversed([name for name in called if name not in answered]):
            self.history.append({"type": "function_call_output", "call_id": name, "output": "3"})
        if turn.then == "again":
            return
        if turn.then in ("edit", "edit older", "forget", "truncate"):
            self.since = None
        said = [item for item in self.history if item.get("role") == "assistant"]
        if turn.then == "edit" and said:
            said[-1]["content"] = "Not what it said."
        elif turn.then == "edit older" and said:
            said[0]["content"] = "Not what it said first."
        elif turn.then == "insert":
            self.history.append({"type": "message", "role": "assistant", "content": "Inserted."})
        elif turn.then == "instruct":
            self.instructions = f"{self.instructions or ''}Be nice. "
        elif turn.then == "forget":
            kept = [item for item in self.history if item.get("role") == "user"]
            self.history = [{"type": "message", "role": "user", "content": "In short."}, *kept[-1:]]
        elif turn.then == "truncate":
            self.history = [item for item in self.history if item.get("role") == "user"] or self.history
        self.history.append({"type": "message", "role": "user", "content": f"and {len(self.history)}?"})


def extends(call: CallTokens, earlier: CallTokens) -> bool:
    return call.prompt_token_ids[: earlier.total_tokens] == earlier.token_ids


@pytest.mark.parametrize("scope", ["agent", ""], ids=["captured", "plain route"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(turns, min_size=2, max_size=6))
async def test_no_agent_drifts_in_silence(renderer: TemplateRenderer, scope: str, plan: list[Turn]) -> None:
    agent = Agent(renderer, plan, scope)
    agent.history.append({"type": "message", "role": "user", "content": "Begin."})
    told, nameless, changed = True, False, False
    for number, turn in enumerate(plan):
        response = await agent.ask(turn)
        if number:
            # Words without ids are only words: after a restart, and on the route that all clients share if
            # what stands before them changed as well. Nobody can see there who said them.
            nameless |= plan[number - 1].echo == "words"
            changed |= plan[number - 1].then not in ("go on", "again", "insert")
            told = told and not (nameless and (turn.restart or (changed and not scope)))
            sampled_here = any(item.get("role") != "user" for item in agent.history)
            extended = extends(agent.calls[-1], agent.calls[-2])
            assert extended or response.fork or not sampled_here or not told, agent.history
        agent.take(response, turn)
        agent.act(turn)
    check_rows(agent)


def check_rows(agent: Agent) -> None:
    """Nothing is trained twice, and the report has every fork, also those that no server could see."""
    rows = merge_calls(agent.calls)
    trained = [call for row in rows for call in row.calls]
    assert len(trained) == len(set(trained))
    report = TokenReport.of(agent.calls, reasons=agent.forks)
    seen = {fork.call for fork in report.forks}
    for number, call in enumerate(agent.calls[1:], 1):
        prompt = call.prompt_token_ids
        earlier = agent.calls[:number]
        fresh = not any(extends(call, other) or other.prompt_token_ids == prompt for other in earlier)
        assert number in seen or not fresh
