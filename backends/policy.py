"""A Responses request into a Response: prompt, generate, parse. No HTTP in here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from backends.engine import (
    Engine,
    FinishReason,
    FolderWeights,
    Generation,
    GenerationRequest,
    PauseMode,
    RemoteEngine,
    SamplingParams,
    TensorWeights,
    WeightsGroup,
    WeightSource,
)
from backends.ids import new_id
from backends.memory import CallMemory, KnownCall
from backends.prefix import Prompt, Step, Thinking, next_prompt
from backends.reading import OutputReader, RendererReader
from backends.rendering import ParsedOutput, Renderer
from backends.rendering.renderer import Conversation
from backends.requests import check_supported, function_tools
from gym_sdk.errors import ConfigurationError, ContextOverflowError, PolicyError
from gym_sdk.schema import (
    FunctionTool,
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseRequest,
    Usage,
    as_items,
)
from gym_sdk.tokens import CallTokens

if TYPE_CHECKING:
    import torch

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
    bridges: int = 0
    splices: int = 0
    forks: int = 0
    unparsed_calls: int = 0


class Policy:
    """Answers Responses requests from one engine and one renderer.

    Args:
        engine: generates; the policy closes it in `aclose`.
        renderer: the model family's format.
        name: the model's name on the wire; requests that name another are refused.
        memory: what is remembered of past model calls.
        thinking: whether the thinking of earlier turns is kept, or forks where the chat template drops it.
        reader: what reads generations; the renderer's parser by default.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        *,
        name: str = "policy",
        memory: CallMemory | None = None,
        thinking: Thinking = "keep",
        reader: OutputReader | None = None,
    ) -> None:
        self.engine = engine
        self.renderer = renderer
        self.reader: OutputReader = RendererReader(renderer) if reader is None else reader
        self.name = name
        self.thinking: Thinking = thinking
        self.stats = PolicyStats()
        self._memory = CallMemory() if memory is None else memory  # an empty one is false

    async def respond(
        self,
        request: ResponseRequest,
        *,
        scope: str = "",
        inherit: bool = False,
        response_id: str | None = None,
    ) -> Response:
        """Answer one request.

        Args:
            request: in the shape of the Responses API.
            scope: what is remembered of past model calls is kept apart by it, e.g. the id of a rollout.
            inherit: whether a request with `previous_response_id` takes over the instructions, tools and
                template settings that it does not send.
            response_id: the response's id, if it was given out before; a fresh one by default.

        Returns:
            The response, which carries its tokens (`Response.tokens`).

        Raises:
            PolicyError: the request asks for something this server cannot do; `param` names it.
            ContextOverflowError: the prompt leaves no room for a token.
            GymError: the engine failed, or what reads generations.
        """
        check_supported(request)
        self._check_model(request.model)
        previous = self._previous(request)
        conversation = _conversation(request, previous, inherit=inherit)
        _check_token_ids(conversation, self.engine.info.vocab_size)
        renderer = await self.reader.prover(self.renderer, conversation)
        prompt = next_prompt(conversation, renderer, self._memory, scope=scope, thinking=self.thinking)
        generation = await self._generate(request, prompt)
        parsed = await self.reader.read(
            generation.token_ids, prompt=prompt.token_ids, tools=conversation.tools
        )
        tokens = prompt.tokens_of(generation.token_ids, generation.log_probs, generation.weight_versions)
        response = _response(request, self.name, generation, parsed, tokens)
        response.id = response_id or response.id
        parent = prompt.parent.response_id if prompt.parent is not None else None
        extends = parent if parent == request.previous_response_id else None
        response.carrying(tokens, extends=extends)
        self._memory.remember(prompt.call(conversation, parsed.items, tokens, response.id))
        self._count(prompt, parsed, tokens)
        if prompt.fork is not None:
            response.fork = prompt.fork
        if parsed.unparsed_calls:
            response.unparsed_calls = parsed.unparsed_calls
        return response

    async def update_weights(
        self, source: WeightSource | str | Path | Mapping[str, torch.Tensor], *, version: str
    ) -> None:
        """Replace the engine's weights by those of a folder, tensors or another source.

        Raises as `Engine.update_weights` does.
        """
        if isinstance(source, str | Path):
            source = FolderWeights(Path(source))
        elif isinstance(source, Mapping):
            source = TensorWeights(source)
        await self.engine.update_weights(source, version=version)

    async def weight_ranks(self) -> int:
        """Return how many ranks the engine takes in a weights group.

        Raises:
            ConfigurationError: it cannot be in one.
        """
        return self._remote().ranks

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have the engine join a group; see `RemoteEngine.join_group`."""
        await self._remote().join_group(group)

    async def leave_weights_group(self, name: str) -> None:
        """Have the engine leave a group; see `RemoteEngine.leave_group`."""
        await self._remote().leave_group(name)

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Pause the engine; see `Engine.pause`."""
        await self.engine.pause(mode)

    async def continue_generation(self) -> None:
        """Resume the engine; see `Engine.continue_generation`."""
        await self.engine.continue_generation()

    async def aclose(self) -> None:
        """Close the engine; everything in flight is aborted."""
        await self.engine.aclose()

    def _remote(self) -> RemoteEngine:
        if not isinstance(self.engine, RemoteEngine):
            raise ConfigurationError(
                "this engine runs in the process of its server and joins no group; push tensors (TensorSync) "
                "or a folder (FolderSync)"
            )
        return self.engine

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise PolicyError(
                f"the model {model!r} does not exist here; this server serves {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _previous(self, request: ResponseRequest) -> KnownCall | None:
        name = request.previous_response_id
        if name is None:
            return None
        call = self._memory.named(name)
        if call is None or call.response_id != name:
            raise PolicyError(
                f"the response {name!r} is not remembered here (any more); send the whole history in `input`",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return call

    async def _generate(self, request: ResponseRequest, prompt: Prompt) -> Generation:
        ids, info = prompt.token_ids, self.engine.info
        if len(ids) >= info.context_length:
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens; the context holds {info.context_length} and "
                "must leave room for at least one more: shorten the input",
                prompt_tokens=len(ids),
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
        return await self.engine.generate(GenerationRequest(new_id("gen"), ids, sampling, prompt.affinity))

    def _count(self, prompt: Prompt, parsed: ParsedOutput, tokens: CallTokens) -> None:
        self.stats.responses += 1
        self.stats.prompt_tokens += tokens.prompt_length
        self.stats.generated_tokens += len(tokens.generation_token_ids)
        self.stats.bridges += prompt.step is Step.BRIDGE
        self.stats.splices += prompt.step is Step.SPLICE
        self.stats.forks += prompt.fork is not None
        self.stats.unparsed_calls += parsed.unparsed_calls


def _conversation(request: ResponseRequest, previous: KnownCall | None, *, inherit: bool) -> Conversation:
    try:
        items = as_items(request.input)
    except ValidationError as error:
        raise PolicyError(f"input: {error}", param="input") from error
    tools: Sequence[FunctionTool] = function_tools(request)
    instructions, settings = request.instructions, request.chat_template_kwargs
    if previous is not None:
        items = [*previous.history(), *items]
        if inherit:
            tools = previous.settings.tools if request.tools is None else tools
            instructions = previous.settings.instructions if instructions is None else instructions
            settings = dict(previous.settings.template_kwargs) if settings is None else settings
    if not items:
        raise PolicyError("input is empty; send at least one item", param="input")
    return Conversation(items, () if request.tool_choice == "none" else tools, instructions, settings or {})


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
    if status == "incomplete":
        output[-1] = output[-1].model_copy(update={"status": "incomplete"})
    prompt_count, count = tokens.prompt_length, len(tokens.generation_token_ids)
    fields: dict[str, Any] = {
        "id": new_id("resp"),
        "created_at": time.time(),
        "model": name,
        "status": status,
        "output": output,
        "previous_response_id": request.previous_response_id,
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
