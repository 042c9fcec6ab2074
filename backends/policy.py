"""A Responses request into a Response: prompt, generate, parse. No HTTP in here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backends.answers import answered, begun
from backends.engine import (
    Engine,
    FinishReason,
    FolderWeights,
    Generation,
    PauseMode,
    RemoteEngine,
    TensorWeights,
    WeightsGroup,
    WeightSource,
)
from backends.history import History, Past
from backends.log_probs import with_log_probs
from backends.memory import CallMemory
from backends.plan import Plan, Planner
from backends.prefix import Prompt, Step, Thinking
from backends.reading import OutputReader, RendererReader
from backends.rendering import ParsedOutput, Renderer
from backends.requests import refuse, wants_log_probs, wants_sealed_reasoning
from backends.sampled import Sampled, sample
from backends.sealed import seal
from backends.snapshots import Pacer, Snapshot, StableIds
from backends.watches import trimmed
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Item, Reasoning, Response, ResponseRequest
from gym_sdk.tokens import CallTokens

if TYPE_CHECKING:
    import torch

__all__ = ["Policy", "PolicyStats"]


@dataclass(slots=True)
class PolicyStats:
    """Counts since the policy started."""

    responses: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
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
        strict_tools: whether calls are held to the tools' schemas where a tool is `strict`. By default the
            policy is free to call wrongly, and learns from it.
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
        strict_tools: bool = False,
    ) -> None:
        self.engine = engine
        self.renderer = renderer
        self.reader: OutputReader = RendererReader(renderer) if reader is None else reader
        self.name = name
        self.stats = PolicyStats()
        self._memory = CallMemory() if memory is None else memory  # an empty one is false
        self._planner = Planner(
            engine,
            renderer,
            self.reader,
            self._memory,
            name=name,
            thinking=thinking,
            strict_tools=strict_tools,
        )
        self.pacer = Pacer()

    async def respond(
        self,
        request: ResponseRequest,
        *,
        scope: str = "",
        inherit: bool = False,
        response_id: str | None = None,
        history: History | None = None,
    ) -> Response:
        """Answer one request.

        Args:
            request: in the shape of the Responses API.
            scope: what is remembered of past model calls is kept apart by it, e.g. the id of a rollout.
            inherit: whether a request with `previous_response_id` takes over the instructions, tools and
                template settings that it does not send.
            response_id: the response's id, if it was given out before; a fresh one by default.
            history: where responses are found that the policy does not remember.

        Returns:
            The response, which carries its tokens (`Response.tokens`).

        Raises:
            PolicyError: the request asks for something this server cannot do; `param` names it.
            ContextOverflowError: the prompt leaves no room for a token.
            GymError: the engine failed, or what reads generations.
        """
        if request.background:
            raise refuse("background", "this answers whoever waits; the background is the server's")
        past = Past(self._memory, history, scope=scope)
        plan = await self._planner.plan(request, past, inherit=inherit)
        with plan.worded():
            generation = await self._generation(plan)
        response = begun(request, model=self.name, response_id=response_id)
        return await self._finish(plan, response, generation, StableIds())

    async def stream(
        self,
        request: ResponseRequest,
        *,
        scope: str = "",
        inherit: bool = False,
        response_id: str | None = None,
        history: History | None = None,
    ) -> AsyncGenerator[Snapshot, None]:
        """Answer one request as it is generated; arguments and errors are those of `respond`.

        Yields:
            A snapshot when the request was accepted, more while tokens come, and one with the whole response.
            Leaving early aborts the generation.
        """
        past = Past(self._memory, history, scope=scope)
        plan = await self._planner.plan(request, past, inherit=inherit)
        response = begun(request, model=self.name, response_id=response_id)
        yield Snapshot(response)
        ids = StableIds()
        with plan.worded(), self.pacer.stream() as pace:
            async with aclosing(sample(self.engine, plan.engine_request, plan.watches)) as steps:
                async for sampled in steps:
                    if sampled.finish_reason is None and pace.is_due:
                        with pace.look():
                            snapshot = await self._look(plan, response, sampled, ids)
                        yield snapshot
        done = await self._finish(plan, response, sampled.generation(), ids)
        yield Snapshot(done, done.output, done=True)

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

    async def prompt_token_ids(
        self, request: ResponseRequest, *, scope: str = "", history: History | None = None
    ) -> list[int]:
        """Return the prompt of a request, which may be too long; raises as `respond` does otherwise."""
        plan = await self._planner.plan(request, Past(self._memory, history, scope=scope), counts=True)
        return plan.prompt.token_ids

    async def count_input_tokens(
        self, request: ResponseRequest, *, scope: str = "", history: History | None = None
    ) -> int:
        """Return how many tokens the prompt of a request has; raises as `respond` does."""
        return len(await self.prompt_token_ids(request, scope=scope, history=history))

    def forget(self, response_id: str) -> None:
        """Know a response by its id no more, nor its items; histories that hold them are still known."""
        self._memory.unname(response_id)

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

    async def _generation(self, plan: Plan) -> Generation:
        """Sample to the end, or to where a watch ends it."""
        if not plan.watches:
            return await self.engine.generate(plan.engine_request)
        async with aclosing(sample(self.engine, plan.engine_request, plan.watches)) as steps:
            return [sampled async for sampled in steps][-1].generation()

    async def _look(self, plan: Plan, response: Response, sampled: Sampled, ids: StableIds) -> Snapshot:
        """Return what is certain of a response so far."""
        parsed = await self.reader.read(
            sampled.token_ids, prompt=plan.prompt.token_ids, tools=plan.conversation.tools, partial=True
        )
        items = ids.apply(parsed.items)
        if parsed.open and plan.stop_watch is not None:
            items = [*items[:-1], plan.stop_watch.certain(items[-1])]
        presented = self._presented(
            plan, items, sampled.token_ids, sampled.log_probs, sampled.top_log_probs, open=parsed.open
        )
        return Snapshot(response, presented, parsed.open)

    async def _finish(
        self, plan: Plan, response: Response, generation: Generation, ids: StableIds
    ) -> Response:
        """Read a whole generation, remember it, and return the response."""
        prompt, conversation = plan.prompt, plan.conversation
        parsed = await self.reader.read(
            generation.token_ids, prompt=prompt.token_ids, tools=conversation.tools
        )
        items = ids.apply(parsed.items)
        stop = plan.stop_of(generation)
        if stop is not None:
            items = [*items[:-1], trimmed(items[-1], stop)]
        tokens = prompt.tokens_of(generation.token_ids, generation.log_probs, generation.weight_versions)
        output = self._presented(
            plan, items, generation.token_ids, generation.log_probs, generation.top_log_probs or ()
        )
        response = answered(
            response,
            generation,
            output,
            tokens,
            reasoning_tokens=parsed.reasoning_tokens,
            open=generation.finish_reason is not FinishReason.STOP
            and await self._ends_open(plan, generation, len(items)),
        )
        parent = prompt.parent.response_id if prompt.parent is not None else None
        extends = parent if parent == plan.request.previous_response_id else None
        response.carrying(tokens, extends=extends)
        self._memory.remember(prompt.call(conversation, items, tokens, response.id))
        self._count(prompt, parsed, tokens, generation.cached_tokens)
        if prompt.fork is not None:
            response.fork = prompt.fork
        if parsed.unparsed_calls:
            response.unparsed_calls = parsed.unparsed_calls
        if stop is not None:
            response.stop_sequence = stop
        return response

    async def _ends_open(self, plan: Plan, generation: Generation, count: int) -> bool:
        """Whether a generation that was cut ends in the middle of the last of its items."""
        settled = await self.reader.read(
            generation.token_ids, prompt=plan.prompt.token_ids, tools=plan.conversation.tools, partial=True
        )
        return settled.open or len(settled.items) < count

    def _presented(
        self,
        plan: Plan,
        items: Sequence[Item],
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        top: Sequence[Sequence[tuple[int, float]]],
        *,
        open: bool = False,
    ) -> list[Item]:
        """Return sampled items as the client asked for them."""
        if wants_log_probs(plan.request):
            items = with_log_probs(items, self._planner.token_text, token_ids, log_probs, top, open=open)
        if wants_sealed_reasoning(plan.request):
            whole = len(items) - open
            items = [*map(_sealed, items[:whole]), *items[whole:]]
        return [plan.tool_use.presented(item) for item in items]

    def _count(self, prompt: Prompt, parsed: ParsedOutput, tokens: CallTokens, cached: int) -> None:
        self.stats.responses += 1
        self.stats.prompt_tokens += tokens.prompt_length
        self.stats.cached_tokens += cached
        self.stats.generated_tokens += len(tokens.generation_token_ids)
        self.stats.bridges += prompt.step is Step.BRIDGE
        self.stats.splices += prompt.step is Step.SPLICE
        self.stats.forks += prompt.fork is not None
        self.stats.unparsed_calls += parsed.unparsed_calls


def _sealed(item: Item) -> Item:
    if not isinstance(item, Reasoning):
        return item
    return item.model_copy(update={"encrypted_content": seal(item.text)})
