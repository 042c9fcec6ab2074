"""A generation that was read, as the Response that answers a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from backends.engine import FinishReason, Generation
from backends.ids import new_id
from gym_sdk.schema import (
    IncompleteDetails,
    InputTokensDetails,
    Item,
    OutputTokensDetails,
    ReasoningOptions,
    Response,
    ResponseRequest,
    TextFormat,
    TextOptions,
    Usage,
)
from gym_sdk.tokens import CallTokens

__all__ = ["answered", "begun"]

_STATUS = {
    FinishReason.STOP: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.ABORT: "cancelled",
}


def begun(request: ResponseRequest, *, model: str, response_id: str | None = None) -> Response:
    """Return the response to a request before anything is generated: `in_progress`.

    Args:
        request: what is asked; the response repeats it.
        model: the model's name.
        response_id: the response's id; a fresh one by default.
    """
    return Response.model_construct(
        id=response_id or new_id("resp"),
        object="response",
        created_at=int(time.time()),
        completed_at=None,
        model=model,
        status="in_progress",
        output=[],
        usage=None,
        error=None,
        incomplete_details=None,
        instructions=request.instructions,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        max_tool_calls=request.max_tool_calls,
        temperature=1.0 if request.temperature is None else request.temperature,
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_p=1.0 if request.top_p is None else request.top_p,
        top_logprobs=request.top_logprobs or 0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_output_tokens=request.max_output_tokens,
        text=_text_options(request),
        reasoning=_reasoning_options(request),
        truncation=request.truncation or "disabled",
        store=bool(request.store),
        background=bool(request.background),
        service_tier="default",
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
        user=request.user,
    )


def answered(
    response: Response,
    generation: Generation,
    output: Sequence[Item],
    tokens: CallTokens,
    *,
    reasoning_tokens: int = 0,
    open: bool = False,
) -> Response:
    """Return the response with a generation's output, status and usage.

    Args:
        response: what `begun` returned.
        generation: what was sampled.
        output: the items that it reads as.
        tokens: prompt and generation.
        reasoning_tokens: how many of the sampled tokens are thinking.
        open: whether the generation ended in the middle of the last item.
    """
    status = _STATUS[generation.finish_reason]
    items = list(output)
    prompt_count, count = tokens.prompt_length, len(tokens.generation_token_ids)
    fields: dict[str, Any] = {
        "status": status,
        "output": items,
        "usage": Usage(
            input_tokens=prompt_count,
            output_tokens=count,
            total_tokens=prompt_count + count,
            input_tokens_details=InputTokensDetails(cached_tokens=generation.cached_tokens),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
        ),
    }
    if status == "completed":
        fields["completed_at"] = int(time.time())
    elif open:
        items[-1] = items[-1].model_copy(update={"status": "incomplete"})
    if status == "incomplete":
        fields["incomplete_details"] = IncompleteDetails(reason="max_output_tokens")
    return response.model_copy(update=fields)


def _text_options(request: ResponseRequest) -> TextOptions:
    given = request.text or TextOptions()
    return TextOptions(format=given.format or TextFormat(), verbosity=given.verbosity or "medium")


def _reasoning_options(request: ResponseRequest) -> ReasoningOptions:
    given = request.reasoning or ReasoningOptions()
    return ReasoningOptions(effort=given.effort, summary=given.summary)
