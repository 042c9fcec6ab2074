"""Agents as users write them around the anthropic package, and an engine that streams token by token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from anthropic import AsyncAnthropic
from anthropic.types import Message

from backends.engine import GenerationChunk, GenerationRequest
from support.agents import TOOL, calculate, call_text
from support.replay import ReplayEngine

THINKS = "<think>\nSo.\n</think>\n\nLet me see.\n" + call_text("1 + 2")
"""What the policy samples to think, speak and call."""

CALCULATOR = {
    "name": TOOL["name"],
    "description": TOOL["description"],
    "input_schema": TOOL["parameters"],
}


class TokenwiseEngine(ReplayEngine):
    """Streams what it replays in pieces of one token."""

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        whole = await self.generate(request)
        last = len(whole.token_ids) - 1
        for place, token in enumerate(whole.token_ids):
            await asyncio.sleep(0)
            ending = whole.finish_reason if place == last else None
            yield GenerationChunk([token], [whole.log_probs[place]], "0", ending)


async def ask(client: AsyncAnthropic, *, stream: bool, **body: Any) -> Message:
    """Ask once; streams are put together by the package."""
    asked = {"model": "policy", "max_tokens": 256, **body}
    if not stream:
        message: Message = await client.messages.create(**asked)
        return message
    async with client.messages.stream(**asked) as events:
        whole: Message = await events.get_final_message()
        return whole


async def claude_agent(
    client: AsyncAnthropic, question: str, *, stream: bool, dumps: bool = False, **body: Any
) -> str:
    """Ask until no tool is used.

    Args:
        client: of the package.
        question: the user's.
        stream: whether answers are streamed.
        dumps: whether content goes back as dicts with all that the package knows, instead of as its objects.
        **body: further fields.
    """
    history: list[Any] = [{"role": "user", "content": question}]
    for _ in range(8):
        message = await ask(client, stream=stream, messages=history, tools=[CALCULATOR], **body)
        content: Any = [block.model_dump() for block in message.content] if dumps else message.content
        for block in content if dumps else ():
            block.pop("parsed_output", None)  # the package's own, which it does not send either
        history.append({"role": "assistant", "content": content})
        uses = [block for block in message.content if block.type == "tool_use"]
        if not uses:
            return "".join(block.text for block in message.content if block.type == "text")
        results = [
            {
                "type": "tool_result",
                "tool_use_id": use.id,
                "content": [{"type": "text", "text": calculate_input(use.input)}],
            }
            for use in uses
        ]
        history.append({"role": "user", "content": results})
    raise AssertionError("the policy never stopped calling")


def calculate_input(fields: Any) -> str:
    """Run the calculator on a parsed input."""
    return calculate(json.dumps(fields))
