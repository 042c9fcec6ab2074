"""What happens in the conversations that are rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from backends.speech import Turn

__all__ = ["SCRIPTS", "Act", "Scenario", "Stage"]


class Scenario(StrEnum):
    """What happens in a conversation."""

    PLAIN = "plain"
    """Users and the policy take turns."""
    TOOLS = "tools"
    """The policy calls a function, twice, and answers."""
    PARALLEL = "parallel"
    """It calls two functions at once; the outputs come back in another order."""
    THINKING = "thinking"
    """It thinks before each answer."""
    TRUNCATED = "truncated"
    """A generation is cut, and the user goes on."""
    FOREIGN = "foreign"
    """Assistant messages that the policy did not sample follow one that it did, and stand between users'."""
    EDITED = "edited"
    """The agent rewrites what the policy said: the next prompt has to fork."""


@dataclass(frozen=True, slots=True)
class Act:
    """A turn of the policy; `cut`: without its end."""

    turn: Turn
    cut: bool = False


class Stage(Protocol):
    """Where a conversation is played."""

    def argument(self, plain: str) -> str:
        """Return a text for a call, or another one if texts are drawn."""
        ...

    def user(self, plain: str) -> None:
        """Add a user message, or another one if texts are drawn."""
        ...

    def foreign(self, plain: str) -> None:
        """Add an assistant message that the policy did not sample."""
        ...

    def outputs(self) -> None:
        """Add the outputs of the newest turn's calls, the last call's first."""
        ...

    def rewrite(self, text: str) -> None:
        """Replace what the policy said last."""
        ...


def _plain(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2?")
    yield Act(Turn("It is 4."))
    stage.user("And 3 + 3?")
    yield Act(Turn("That is 6, I think."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


def _tools(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2?")
    yield Act(Turn("", calls=[("add", {"a": 2, "note": stage.argument("two")})]))
    stage.outputs()
    yield Act(Turn("", calls=[("subtract", {"a": 7, "note": stage.argument("seven")})]))
    stage.outputs()
    yield Act(Turn("It is 4."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


def _parallel(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2, and what is 7 - 3?")
    calls = [
        ("add", {"a": 2, "note": stage.argument("x")}),
        ("subtract", {"a": 7, "note": stage.argument("y")}),
    ]
    yield Act(Turn("", calls=calls))
    stage.outputs()
    yield Act(Turn("Both are 4."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


def _thinking(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2?")
    yield Act(Turn("It is 4.", thinking="Two and two."))
    stage.user("And 3 + 3?")
    yield Act(Turn("That is 6.", thinking="Three and three."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome.", thinking="Be polite."))


def _truncated(stage: Stage) -> Iterator[Act]:
    stage.user("Count to ten.")
    yield Act(Turn("One, two, three"), cut=True)
    stage.user("Go on.")
    yield Act(Turn("Four, five."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


def _foreign(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2?")
    yield Act(Turn("It is 4."))
    stage.foreign("A note of the agent's own.")
    stage.user("And 3 + 3?")
    yield Act(Turn("That is 6."))
    stage.user("And 4 + 4?")
    stage.foreign("It is 8.")
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


def _edited(stage: Stage) -> Iterator[Act]:
    stage.user("What is 2 + 2?")
    yield Act(Turn("It is 4."))
    stage.rewrite("It is five.")
    stage.user("Really?")
    yield Act(Turn("No, it is 4."))
    stage.user("Thanks!")
    yield Act(Turn("You're welcome."))


SCRIPTS: Mapping[Scenario, Callable[[Stage], Iterator[Act]]] = {
    Scenario.PLAIN: _plain,
    Scenario.TOOLS: _tools,
    Scenario.PARALLEL: _parallel,
    Scenario.THINKING: _thinking,
    Scenario.TRUNCATED: _truncated,
    Scenario.FOREIGN: _foreign,
    Scenario.EDITED: _edited,
}
"""The turns of each scenario."""
