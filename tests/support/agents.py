"""Agents as users write them: a bare loop around the openai package, streaming and not."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

TOOL = {
    "type": "function",
    "name": "calculator",
    "description": "Evaluate an expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    "strict": True,
}
CHAT_TOOL = {"type": "function", "function": {name: TOOL[name] for name in TOOL if name != "type"}}


def call_text(expression: str) -> str:
    """What the policy samples to call the calculator."""
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return f"<tool_call>\n{call}\n</tool_call><|im_end|>"


def say_text(text: str) -> str:
    return f"{text}<|im_end|>"


def calculate(arguments: str) -> str:
    return str(sum(int(number) for number in json.loads(arguments)["expression"].split("+")))


async def responses_agent(client: AsyncOpenAI, question: str, *, stream: bool, **fields: Any) -> str:
    """Ask until there is no call left; history is echoed as the package gives it."""
    history: list[Any] = [{"role": "user", "content": question}]
    for _ in range(8):
        request = {"model": "policy", "input": history, "tools": [TOOL], **fields}
        if stream:
            async with client.responses.stream(**request) as events:
                response: Any = await events.get_final_response()
        else:
            response = await client.responses.create(**request)
        history += [
            item.model_dump(exclude_unset=True, exclude={"parsed_arguments"}) for item in response.output
        ]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        history += [
            {"type": "function_call_output", "call_id": call.call_id, "output": calculate(call.arguments)}
            for call in calls
        ]
    raise AssertionError("the policy never stopped calling")


async def chat_agent(client: AsyncOpenAI, question: str, *, stream: bool, **fields: Any) -> str:
    """The same over Chat Completions; only the documented fields are echoed."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(8):
        request = {"model": "policy", "messages": messages, "tools": [CHAT_TOOL], **fields}
        if stream:
            async with client.chat.completions.stream(**request) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await client.chat.completions.create(**request)
        message = completion.choices[0].message
        calls = message.tool_calls or []
        echo = {"role": "assistant", "content": message.content}
        if calls:
            echo["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in calls
            ]
        messages.append(echo)
        if not calls:
            return str(message.content)
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": calculate(call.function.arguments)}
            for call in calls
        ]
    raise AssertionError("the policy never stopped calling")


AGENTS = {"responses": responses_agent, "chat": chat_agent}
