"""What a tiny policy is warm-started on, whatever the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from random import Random
from typing import Any, ClassVar, Protocol, TypeAlias

from backends.tiny.vocabulary import Vocabulary
from gym_sdk.errors import ConfigurationError

__all__ = ["Messages", "TraceMix", "check_shares"]

Messages: TypeAlias = list[dict[str, Any]]
"""One conversation, in the form of Chat Completions."""


class TraceMix(Protocol):
    """The traces of one family of tasks; a frozen dataclass whose fields are the shares of their kinds.

    Attributes:
        family: the family's name.
        vocabulary: what its tokenizer is made of.
        tool: the tool that the traces use, in the form of Chat Completions; None for tasks without one.
    """

    family: ClassVar[str]
    vocabulary: ClassVar[Vocabulary]
    tool: ClassVar[dict[str, Any] | None]

    def drill(self, rng: Random) -> list[str]:
        """Write lines of an exercise that comes before the traces: the first is given, the rest are learned.

        It trains what a trace has too little of for a model that starts from nothing, e.g. copying numbers.
        """
        ...

    def traces(self, rng: Random) -> Iterator[Messages]:
        """Yield conversations in the mix's proportions, without end.

        Some are deliberately poor, so that there is something left to learn.
        """
        ...


def check_shares(mix: Any, *kinds: str) -> None:
    """Check that every field of a mix is a share, and that some of them are shares of one whole.

    Args:
        mix: a dataclass, all of whose fields are numbers.
        kinds: names of the fields that must add up to 1.

    Raises:
        ConfigurationError: a share is not in [0, 1], or they don't add up.
    """
    if not all(0.0 <= getattr(mix, field.name) <= 1.0 for field in fields(mix)):
        raise ConfigurationError(f"every share must be in [0, 1]: {mix}")
    if not math.isclose(sum(getattr(mix, kind) for kind in kinds), 1.0, abs_tol=1e-9):
        raise ConfigurationError(f"{', '.join(kinds[:-1])} and {kinds[-1]} must add up to 1: {mix}")
