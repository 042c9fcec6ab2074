"""Conversations played against a renderer without an engine: what it can bridge, and what forks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.memory import CallMemory
from backends.prefix import Prompt, Step, Thinking, next_prompt
from backends.rendering.chat import is_policy_item
from backends.rendering.renderer import Conversation
from backends.rendering.template import TemplateRenderer
from backends.scenarios import SCRIPTS, Act, Scenario
from backends.speech import Speech
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, FunctionCallOutput, FunctionTool, Item, Message

__all__ = ["Play", "Scenario", "TemplateCheck", "check", "rehearse"]


@dataclass(slots=True)
class Play:
    """What came of one conversation.

    Attributes:
        scenario: what happened in it.
        steps: how each prompt was made.
        reasons: why prompts forked.
        breaks: prompts that would not have extended the call before them if everything had been rendered
            again.
        drifts: prompts that do not extend the call before them, though no fork was reported. A bug, if not 0.
        agrees: whether the bridged prompts equal renderings of everything, where those extend the call before
            them; None if none does.
        refused: why the conversation could not be played.
        unread: whether that is because the parser does not read calls as the template writes them.
    """

    scenario: Scenario
    steps: list[Step] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    breaks: int = 0
    drifts: int = 0
    agrees: bool | None = None
    refused: str | None = None
    unread: bool = False

    @property
    def summary(self) -> str:
        """The least exact step that was needed: `bridge`, `splice`, `fork`, or `refused`."""
        if self.refused is not None:
            return "refused"
        return next(
            (step.value for step in (Step.FORK, Step.SPLICE, Step.BRIDGE) if step in self.steps), "start"
        )


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """What a renderer does in each scenario.

    Attributes:
        plays: one conversation for each scenario, in plain texts.
        parser: the name of the renderer's parser.
        takes_tools: whether the template shows tools and writes calls and their outputs.
    """

    plays: Sequence[Play]
    parser: str
    takes_tools: bool

    @property
    def problems(self) -> list[str]:
        """What ought to work and does not: each costs rollouts their exactness, or can't be served at all."""
        needed = {Scenario.PLAIN, Scenario.TRUNCATED} | ({Scenario.TOOLS} if self.takes_tools else set())
        found: list[str] = []
        for play in self.plays:
            if play.drifts:
                found.append(f"{play.scenario}: {play.drifts} prompts drift; this is a bug of gym-sdk")
            if play.agrees is False:
                found.append(f"{play.scenario}: bridged prompts differ from the template's own")
            if play.scenario not in needed:
                continue
            if play.refused is not None:
                found.append(f"{play.scenario}: {play.refused}")
            elif play.reasons:
                found.append(f"{play.scenario}: forks, since {play.reasons[0]}")
        return found

    def __str__(self) -> str:
        cells = ", ".join(f"{play.scenario} {play.summary}" for play in self.plays)
        return f"{cells}; parser {self.parser}"


def check(renderer: TemplateRenderer, *, thinking: Thinking = "keep") -> TemplateCheck:
    """Play each scenario once, to tell what a model's template can do before it is served.

    Args:
        renderer: the model family's format.
        thinking: what becomes of thinking in earlier turns.
    """
    abilities = renderer.template.abilities
    return TemplateCheck(
        [rehearse(renderer, scenario, thinking=thinking) for scenario in Scenario],
        renderer.parser.name,
        abilities.tools and abilities.calls and abilities.outputs,
    )


_TOOLS = [
    FunctionTool(
        name=name,
        description="Compute.",
        parameters={
            "type": "object",
            "properties": {"a": {"type": "integer"}, "note": {"type": "string"}},
            "required": ["a", "note"],
        },
    )
    for name in ("add", "subtract")
]
_DESCRIBED = "You may call the functions add(a, note) and subtract(a, note)."


def rehearse(
    renderer: TemplateRenderer,
    scenario: Scenario,
    *,
    rng: random.Random | None = None,
    thinking: Thinking = "keep",
) -> Play:
    """Play a conversation: what the policy says is what the template itself writes for its turns.

    Args:
        renderer: the model family's format.
        scenario: what happens.
        rng: draws texts, odd JSON and tokens as a policy samples them, which is not as a tokenizer cuts them;
            None: plain texts and the tokenizer's own tokens.
        thinking: what becomes of thinking in earlier turns.
    """
    stage = _Stage(renderer, scenario, rng, thinking)
    try:
        for act in SCRIPTS[scenario](stage):
            stage.play(act)
    except PolicyError as error:
        stage.result.refused = str(error)
    return stage.result


class _Stage:
    """One conversation being played."""

    def __init__(
        self,
        renderer: TemplateRenderer,
        scenario: Scenario,
        rng: random.Random | None,
        thinking: Thinking,
    ) -> None:
        self.result = Play(scenario)
        self._items: list[Item] = []
        self._speech = Speech(renderer, rng)
        self._renderer = renderer
        self._thinking: Thinking = thinking
        self._tools = _TOOLS if scenario in (Scenario.TOOLS, Scenario.PARALLEL) else []
        described = self._tools and not renderer.template.abilities.tools
        self._instructions = _DESCRIBED if described else None
        self._memory = CallMemory()
        self._last: list[int] | None = None

    def argument(self, plain: str) -> str:
        """Return a text for a call, or another one if texts are drawn."""
        return self._speech.text(plain, literal=False)

    def user(self, plain: str) -> None:
        """Add a user message."""
        self._items.append(Message(role="user", content=self._speech.text(plain)))

    def foreign(self, plain: str) -> None:
        """Add an assistant message that the policy did not sample."""
        self._items.append(Message(role="assistant", content=self._speech.text(plain)))

    def outputs(self) -> None:
        """Add the outputs of the newest turn's calls, the last call's first."""
        calls: list[FunctionCall] = []
        for item in reversed(self._items):
            if not is_policy_item(item):
                break
            if isinstance(item, FunctionCall):
                calls.append(item)
        for call in calls:
            output = self._speech.text('{"result": 4}')
            self._items.append(FunctionCallOutput(call_id=call.call_id, output=output))

    def rewrite(self, text: str) -> None:
        """Replace what the policy said last."""
        said = getattr(self._items[-1], "id", None)
        self._items[-1] = Message(id=said, role="assistant", content=text)

    def play(self, act: Act) -> None:
        """Make the next prompt, say the policy's turn, and check both."""
        conversation = Conversation(list(self._items), self._tools, self._instructions)
        prompt = next_prompt(conversation, self._renderer, self._memory, thinking=self._thinking)
        self._compare(conversation, prompt)
        ids = self._speech.say(conversation, prompt.token_ids, act.turn, cut=act.cut)
        output = self._renderer.parse(ids, prompt=prompt.token_ids, tools=self._tools).items
        called = [item.name for item in output if isinstance(item, FunctionCall)]
        if called != [name for name, _ in act.turn.calls]:
            self.result.unread = True
            name = self._renderer.parser.name
            raise PolicyError(f"the parser {name!r} does not read calls as the template writes them")
        tokens = prompt.tokens_of(ids, [0.0] * len(ids))
        self._memory.remember(prompt.call(conversation, output, tokens))
        self._last = tokens.token_ids
        self._items += output

    def _compare(self, conversation: Conversation, prompt: Prompt) -> None:
        """Count what extends the call before, and what a rendering of everything would have given."""
        result = self.result
        result.steps.append(prompt.step)
        if prompt.fork is not None:
            result.reasons.append(prompt.fork)
        if self._last is None:
            return
        result.drifts += prompt.fork is None and not _extends(prompt.token_ids, self._last)
        try:
            rendered = self._renderer.render(conversation).token_ids
        except PolicyError:
            rendered = []
        if not _extends(rendered, self._last):
            result.breaks += 1
        elif prompt.fork is None:
            result.agrees = rendered == prompt.token_ids and result.agrees is not False


def _extends(prompt: Sequence[int], known: Sequence[int]) -> bool:
    return list(prompt[: len(known)]) == list(known)
