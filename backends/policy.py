"""A Responses request into a Response: prompt, generate, parse. No HTTP in here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backends.engine import (
    Engine,
    FinishReason,
    FolderWeights,
    Generation,
    GenerationRequest,
    PauseMode,
    SamplingParams,
    WeightSource,
)
from backends.memory import CallMemory, extend_key
from backends.prefix import next_prompt
from backends.rendering import ParsedOutput, Renderer
from backends.rendering.parsing import new_id
from backends.rendering.renderer import Conversation
from backends.requests import check_supported, function_tools
from gym_sdk.errors import ContextOverflowError, PolicyError
from gym_sdk.schema import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseRequest,
    Usage,
    as_items,
)
from gym_sdk.tokens import CallTokens

__all__ = ["Policy", "PolicyStats"]

_STATUS = {
    FinishReason.STOP: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.ABORT: "cancelled",
}


@dataclass(slots=True)
class PolicyStats:
    """Counts since the policy started."""

    responses: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    forks: int = 0
    unparsed_calls: int = 0


class Policy:
    """Answers Responses requests from one engine and one renderer.

    Args:
        engine: generates; the policy closes it in `aclose`.
        renderer: the model family's format.
        name: the model's name on the wire; requests that name another are refused.
        memory: what is remembered of past model calls.
    """

    def __init__(
        self, engine: Engine, renderer: Renderer, *, name: str = "policy", memory: CallMemory | None = None
    ) -> None:
        self.engine = engine
        self.renderer = renderer
        self.name = name
        self.stats = PolicyStats()
        self._memory = memory or CallMemory()

    async def respond(self, request: ResponseRequest) -> Response:
        """Answer one request.

        Raises:
            PolicyError: the request asks for something this server cannot do; `param` names it.
            ContextOverflowError: the prompt leaves no room for a token.
            GymError: the engine failed.
        """
        check_supported(request)
        self._check_model(request.model)
        conversation = _conversation(request)
        _check_token_ids(conversation, self.engine.info.vocab_size)
        prompt = next_prompt(conversation, self.renderer, self._memory)
        generation = await self._generate(request, prompt.token_ids)
        parsed = self.renderer.parse(generation.token_ids)
        tokens = CallTokens(
            prompt.token_ids, generation.token_ids, generation.log_probs, generation.weight_versions
        )
        self._memory.remember(extend_key(prompt.key, parsed.items), tokens)
        self._count(prompt.fork, parsed, tokens)
        response = _response(request, self.name, generation, parsed, tokens)
        if prompt.fork is not None:
            response.fork = prompt.fork
        if parsed.unparsed_calls:
            response.unparsed_calls = parsed.unparsed_calls
        return response

    async def update_weights(self, source: WeightSource | str | Path, *, version: str) -> None:
        """Replace the engine's weights; see `Engine.update_weights`."""
        if isinstance(source, str | Path):
            source = FolderWeights(Path(source))
        await self.engine.update_weights(source, version=version)

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Pause the engine; see `Engine.pause`."""
        await self.engine.pause(mode)

    async def continue_generation(self) -> None:
        """Resume the engine; see `Engine.continue_generation`."""
        await self.engine.continue_generation()

    async def aclose(self) -> None:
        """Close the engine; everything in flight is aborted."""
        await self.engine.aclose()

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise PolicyError(
                f"the model {model!r} does not exist here; this server serves {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    async def _generate(self, request: ResponseRequest, prompt: list[int]) -> Generation:
        info = self.engine.info
        if len(prompt) >= info.context_length:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens; the context holds {info.context_length} and "
                "must leave room for at least one more: shorten the input",
                prompt_tokens=len(prompt),
                context_length=info.context_length,
            )
        sampling = SamplingParams(
            max_new_tokens=request.max_output_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            seed=request.seed,
            stop_token_ids=self.renderer.stop_token_ids,
        )
        return await self.engine.generate(GenerationRequest(new_id("gen"), prompt, sampling))

    def _count(self, fork: str | None, parsed: ParsedOutput, tokens: CallTokens) -> None:
        self.stats.responses += 1
        self.stats.prompt_tokens += len(tokens.prompt_token_ids)
        self.stats.generated_tokens += len(tokens.generation_token_ids)
        self.stats.forks += fork is not None
        self.stats.unparsed_calls += parsed.unparsed_calls


def _conversation(request: ResponseRequest) -> Conversation:
    try:
        items = as_items(request.input)
    except ValidationError as error:
        raise PolicyError(f"input: {error}", param="input") from error
    if not items:
        raise PolicyError("input is empty; send at least one item", param="input")
    tools = [] if request.tool_choice == "none" else function_tools(request)
    return Conversation(items, tools, request.instructions, request.chat_template_kwargs or {})


def _check_token_ids(conversation: Conversation, vocab_size: int) -> None:
    for index, item in enumerate(conversation.items):
        for name in ("prompt_token_ids", "generation_token_ids"):
            ids = getattr(item, name)
            if ids and max(ids) >= vocab_size:
                param = f"input[{index}].{name}"
                raise PolicyError(
                    f"{param} holds the id {max(ids)}; this model's vocabulary has {vocab_size} ids",
                    code="invalid_value",
                    param=param,
                )


def _response(
    request: ResponseRequest, name: str, generation: Generation, parsed: ParsedOutput, tokens: CallTokens
) -> Response:
    status = _STATUS[generation.finish_reason]
    output: list[Any] = list(parsed.items)
    output[-1] = output[-1].with_tokens(tokens)
    if status == "incomplete":
        output[-1].status = "incomplete"
    prompt_count, count = len(tokens.prompt_token_ids), len(tokens.generation_token_ids)
    fields: dict[str, Any] = {
        "id": new_id("resp"),
        "created_at": time.time(),
        "model": name,
        "status": status,
        "output": output,
        "usage": Usage(
            input_tokens=prompt_count,
            output_tokens=count,
            total_tokens=prompt_count + count,
            input_tokens_details=InputTokensDetails(cached_tokens=generation.cached_tokens),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=parsed.reasoning_tokens),
        ),
        "instructions": request.instructions,
        "metadata": request.metadata or {},
        "parallel_tool_calls": True,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "max_output_tokens": request.max_output_tokens,
    }
    if status == "incomplete":
        fields["incomplete_details"] = IncompleteDetails(reason="max_output_tokens")
    return Response.model_construct(**{**_UNSET, **fields})


_UNSET: dict[str, Any] = {"object": "response", "error": None, "incomplete_details": None}
