"""How a request is to be answered: prompt, sampling, and what ends the generation early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from backends.constraints import Constraints, Demand
from backends.demands import demand_of
from backends.engine import Engine, Generation, GenerationRequest, SamplingParams
from backends.history import Past, lost_response, read_history
from backends.ids import new_id
from backends.memory import CallMemory
from backends.prefix import Prompt, Thinking, next_prompt
from backends.reading import OutputReader
from backends.rendering import Renderer, TemplateRenderer
from backends.rendering.effort import effort_settings
from backends.rendering.renderer import Conversation
from backends.rendering.token_text import TokenText
from backends.requests import check_model, check_supported, refuse, stop_strings, wants_log_probs
from backends.sampled import Watch
from backends.tool_use import ToolUse
from backends.watches import CallWatch, StopWatch
from gym_sdk.errors import ContextOverflowError, PolicyError
from gym_sdk.schema import FunctionTool, Item, Message, ResponseRequest

__all__ = ["MANY_CHARACTERS", "Plan", "Planner", "sampling_params"]


MANY_CHARACTERS = 50_000
"""A text that is longer is tokenized in a thread: it takes a tenth of a second and more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one request is answered.

    Attributes:
        request: what is asked.
        conversation: what the prompt was made from.
        tool_use: the tools on offer.
        prompt: the next prompt.
        engine_request: what the engine is asked for.
        stop_watch: looks for stop strings, if there are any.
        watches: everything that may end the generation early.
        grammar_param: the field that asks for the grammar, if there is one.
    """

    request: ResponseRequest
    conversation: Conversation
    tool_use: ToolUse
    prompt: Prompt
    engine_request: GenerationRequest
    stop_watch: StopWatch | None
    watches: Sequence[Watch]
    grammar_param: str | None = None

    def stop_of(self, generation: Generation) -> str | None:
        """Return the stop string that ended a generation, if one did."""
        return None if self.stop_watch is None else self.stop_watch.stop_of(len(generation.token_ids))

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Have errors of the grammar name the field that asked for it."""
        try:
            yield
        except PolicyError as error:
            if error.param != "grammar" or self.grammar_param is None:
                raise
            raise PolicyError(
                f"{self.grammar_param}: {error}",
                status=error.status,
                code=error.code,
                param=self.grammar_param,
            ) from error


class Planner:
    """Plans the answers of one policy.

    Args:
        engine: what generates.
        renderer: the model family's format.
        reader: what reads generations.
        memory: earlier model calls.
        name: the model's name; requests that name another are refused.
        thinking: what becomes of thinking in earlier turns.
        strict_tools: whether calls are held to the tools' schemas where a tool is `strict`.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        reader: OutputReader,
        memory: CallMemory,
        *,
        name: str,
        thinking: Thinking,
        strict_tools: bool = False,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._reader = reader
        self._memory = memory
        self._name = name
        self._thinking: Thinking = thinking
        self._strict_tools = strict_tools
        self._efforts: dict[str, Mapping[str, Any]] = {}
        self._constraints = Constraints(renderer) if isinstance(renderer, TemplateRenderer) else None

    @cached_property
    def token_text(self) -> TokenText:
        """What the ids of the policy's tokenizer spell."""
        return TokenText(self._renderer.tokenizer)

    async def plan(
        self,
        request: ResponseRequest,
        past: Past,
        *,
        inherit: bool = False,
        counts: bool = False,
    ) -> Plan:
        """Plan one answer.

        Args:
            request: what is asked.
            past: earlier responses, and what keeps theirs apart.
            inherit: whether settings that the request does not send come from the previous response.
            counts: whether only the prompt is wanted, which may then be longer than the context.

        Raises:
            PolicyError: the request asks for something this server cannot do; `param` names it.
            ContextOverflowError: the prompt leaves no room for a token.
            GymError: what reads generations failed.
        """
        check_supported(request)
        check_model(request.model, self._name)
        conversation, tool_use = await self._conversation(request, past, inherit=inherit)
        renderer = await self._reader.prover(self._renderer, conversation)
        prompt = await self._prompt(conversation, renderer, past)
        if not counts and len(prompt.token_ids) >= self._engine.info.context_length:
            if request.truncation != "auto":
                raise _overflow(len(prompt.token_ids), self._engine.info.context_length)
            room = request.max_output_tokens or 1
            conversation = await asyncio.to_thread(self._truncated, conversation, renderer, room)
            prompt = await self._prompt(conversation, renderer, past)
        stops = stop_strings(request)
        stop_watch = StopWatch(stops, self.token_text) if stops else None
        watches: list[Watch] = [] if stop_watch is None else [stop_watch]
        if tool_use.max_calls is not None and tool_use.offered:
            watches.append(CallWatch(self._reader, prompt.token_ids, conversation.tools, tool_use.max_calls))
        demand = None if counts else self._demand(request, tool_use)
        grammar: str | None = None
        if demand is not None and self._constraints is not None:
            make = self._constraints.grammar
            grammar = await asyncio.to_thread(make, conversation, prompt.token_ids, demand)
        sampling = sampling_params(request, stop_token_ids=self._renderer.stop_token_ids, grammar=grammar)
        affinity = request.prompt_cache_key or prompt.affinity
        engine_request = GenerationRequest(new_id("gen"), prompt.token_ids, sampling, affinity)
        param = None if demand is None else demand.param
        return Plan(request, conversation, tool_use, prompt, engine_request, stop_watch, watches, param)

    async def _prompt(self, conversation: Conversation, renderer: Renderer, past: Past) -> Prompt:
        make = partial(
            next_prompt, conversation, renderer, self._memory, scope=past.scope, thinking=self._thinking
        )
        # tokenizers let go of the interpreter: others are served while a long text is tokenized
        return await asyncio.to_thread(make) if _size(conversation) > MANY_CHARACTERS else make()

    async def _conversation(
        self, request: ResponseRequest, past: Past, *, inherit: bool
    ) -> tuple[Conversation, ToolUse]:
        previous = past.call(request.previous_response_id) if inherit else None
        if inherit and request.previous_response_id is not None and previous is None:
            # its items may be kept, but not the settings that this request takes over
            raise lost_response(request.previous_response_id)
        items = await read_history(request, past)
        _check_token_ids(items, self._engine.info.vocab_size)
        tools: Sequence[FunctionTool] | None = None
        instructions, settings = request.instructions, request.chat_template_kwargs
        if previous is not None:
            tools = previous.settings.tools if request.tools is None else None
            instructions = previous.settings.instructions if instructions is None else instructions
            settings = dict(previous.settings.template_kwargs) if settings is None else settings
        if request.reasoning is not None and request.reasoning.effort is not None:
            settings = {**self._effort(request.reasoning.effort), **(settings or {})}
        tool_use = ToolUse.of(request, tools)
        return Conversation(items, tool_use.offered, instructions, settings or {}), tool_use

    def _effort(self, effort: str) -> Mapping[str, Any]:
        """Return the template settings that ask for an effort."""
        if not isinstance(self._renderer, TemplateRenderer):
            raise refuse("reasoning.effort", "this model's format has no setting for how much it thinks")
        if effort not in self._efforts:
            self._efforts[effort] = effort_settings(self._renderer.template, effort)
        return self._efforts[effort]

    def _truncated(self, conversation: Conversation, renderer: Renderer, room: int) -> Conversation:
        """Return the conversation without as many of its oldest turns as it takes to fit the context.

        System messages at its beginning stay, and so does everything from the last user message on.
        """
        length = self._engine.info.context_length
        most = length - min(room, length // 2)
        items = conversation.items
        kept = next((n for n, item in enumerate(items) if not _is_system(item)), len(items))
        turns = [n for n, item in enumerate(items) if n > kept and _is_user(item)]
        for start in turns:
            shorter = Conversation(
                [*items[:kept], *items[start:]],
                conversation.tools,
                conversation.instructions,
                conversation.template_kwargs,
            )
            if len(renderer.render(shorter).token_ids) <= most:
                return shorter
        raise _overflow(len(renderer.render(conversation).token_ids), length)

    def _demand(self, request: ResponseRequest, tool_use: ToolUse) -> Demand | None:
        """Return what the generation is held to; None if it is free."""
        demand = demand_of(request, tool_use, strict=self._strict_tools)
        if demand is None:
            return None
        if self._constraints is None:
            raise refuse(demand.param, "this model's format can't be constrained: it has no chat template")
        if demand.is_free_text and not self._constraints.marks_calls:
            return None
        return demand


def sampling_params(
    request: ResponseRequest, *, stop_token_ids: frozenset[int], grammar: str | None = None
) -> SamplingParams:
    """Return how a request is sampled; what it leaves open is OpenAI's default.

    Args:
        request: what is asked.
        stop_token_ids: end the generation.
        grammar: what it must spell.
    """
    return SamplingParams(
        max_new_tokens=request.max_output_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        seed=request.seed,
        stop_token_ids=stop_token_ids,
        top_log_probs=(request.top_logprobs or 0) if wants_log_probs(request) else 0,
        grammar=grammar,
    )


def _overflow(size: int, length: int) -> ContextOverflowError:
    return ContextOverflowError(
        f"the prompt has {size} tokens; the context holds {length} and must leave room for at least one "
        "more: shorten the input",
        prompt_tokens=size,
        context_length=length,
    )


def _size(conversation: Conversation) -> int:
    """Return how many characters of text a conversation has, about."""
    texts = (getattr(item, "text", "") for item in conversation.items)
    return len(conversation.instructions or "") + sum(map(len, texts))


def _is_system(item: Item) -> bool:
    return isinstance(item, Message) and item.role in ("system", "developer")


def _is_user(item: Item) -> bool:
    return isinstance(item, Message) and item.role == "user"


def _check_token_ids(items: Sequence[Item], vocab_size: int) -> None:
    for index, item in enumerate(items):
        for name in ("prompt_token_ids", "generation_token_ids"):
            ids = getattr(item, name)
            if ids and max(ids) >= vocab_size:
                param = f"input[{index}].{name}"
                raise PolicyError(
                    f"{param} holds the id {max(ids)}; this model's vocabulary has {vocab_size} ids",
                    code="invalid_value",
                    param=param,
                )
