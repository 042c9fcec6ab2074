"""A LangGraph agent over langchain-openai, unmodified, against a captured policy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from support.agents import calculate, call_text, say_text
from support.capturing import Serve

from gym_sdk import GymClient, Outcome, Task

graphs: Any = import_module("langgraph.graph")
prebuilt: Any = import_module("langgraph.prebuilt")
models: Any = import_module("langchain_openai")
langchain_tools: Any = import_module("langchain_core.tools")

pytestmark = pytest.mark.asyncio

THINKS = "<think>\nwell\n</think>\n\n"
SAYS = {
    "usual": [call_text("1 + 2"), call_text("3+4"), say_text("It is 7.")],
    # what this framework writes anew, or drops
    "odd": [
        THINKS + call_text("1 + 2").replace(": ", " :  "),
        THINKS + call_text("3+4").replace('": "', '":"'),
        THINKS + say_text("It is 7."),
    ],
}


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_turns_with_tools_are_one_sequence(
    serve: Serve, route: str, stream: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")

    @langchain_tools.tool
    def calculator(expression: str) -> str:
        """Evaluate an expression."""
        return calculate(f'{{"expression": "{expression}"}}')

    url = await serve(SAYS[says])
    async with GymClient(url, model="policy") as client, client.capture(Task("q")) as session:
        model = models.ChatOpenAI(
            model=session.model,
            base_url=session.base_url,
            api_key="none",
            use_responses_api=route == "responses",
            streaming=stream,
        ).bind_tools([calculator])

        async def ask(state: Any) -> Any:
            return {"messages": [await model.ainvoke(state["messages"])]}

        graph = graphs.StateGraph(graphs.MessagesState)
        graph.add_node("ask", ask)
        graph.add_node("tools", prebuilt.ToolNode([calculator]))
        graph.add_edge(graphs.START, "ask")
        graph.add_conditional_edges("ask", prebuilt.tools_condition)
        graph.add_edge("tools", "ask")
        result = await graph.compile().ainvoke({"messages": [("user", "What is 1 + 2 + 4?")]})
        rollout = await session.finish()
    assert result["messages"][-1].text.strip() == "It is 7."
    assert rollout.outcome is Outcome.COMPLETED
    assert len(rollout.sequences()) == 1
    assert rollout.metrics == {"turns": 3, "tool_calls": 2}
