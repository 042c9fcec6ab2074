"""What differs between the ways in which a model call is asked for over HTTP."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from backends.server.calls import Answerer
from backends.server.errors import Problem
from backends.snapshots import Snapshot
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, TokenForm

__all__ = ["Asked", "Events", "Surface", "renamed", "stream_options"]


class Events(Protocol):
    """Turns the model calls of one HTTP request into the bytes of a stream."""

    @property
    def keep_alive(self) -> bytes:
        """What says, in a stream without news, that it is alive."""
        ...

    def opening(self, responses: Sequence[Response]) -> bytes:
        """Return what goes out when all choices are accepted."""
        ...

    def progress(self, choice: int, snapshot: Snapshot) -> bytes:
        """Return what is new in a choice; its last snapshot ends the choice."""
        ...

    def closing(self) -> bytes:
        """Return the end of the stream, after all choices have ended."""
        ...

    def failure(self, problem: Problem) -> bytes:
        """Return the end of a stream whose calls failed after the opening."""
        ...


def _same(error: PolicyError) -> PolicyError:
    return error


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read.

    Attributes:
        requests: one for each choice.
        write: makes the answer's JSON of the responses.
        events: what the answer is streamed as, if it is.
        inherit: see `Policy.respond`.
        store: whether the response is kept.
        background: whether it is made while nobody waits.
        answerer: takes the requests, where they are none of the Responses API.
        worded: says in this surface's words what a policy refuses in those of the Responses API.
    """

    requests: Sequence[Any]
    write: Callable[[Sequence[Response]], dict[str, Any]]
    events: Events | None = None
    inherit: bool = False
    store: bool = False
    background: bool = False
    answerer: Answerer | None = None
    worded: Callable[[PolicyError], PolicyError] = _same


class Surface(Protocol):
    """One way to ask for a model call."""

    @property
    def name(self) -> str:
        """Its path under `/v1`."""
        ...

    @property
    def has_forms(self) -> bool:
        """Whether the tokens may come in other forms than on the item."""
        ...

    def read(self, body: dict[str, Any], *, model: str, form: TokenForm) -> Asked:
        """Read a request's body.

        Args:
            body: the JSON object.
            model: the model's name.
            form: in which form the tokens are asked for.

        Raises:
            PolicyError: it asks for what this server cannot do; `param` names it.
            ValidationError: it does not fit the schema.
        """
        ...


def stream_options(body: dict[str, Any], *known: str) -> dict[str, Any]:
    """Take the options of streams out of a body.

    Raises:
        PolicyError: they are no object, or there are others than the known ones.
    """
    options = body.pop("stream_options", None)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise PolicyError("stream_options must be an object", code="invalid_value", param="stream_options")
    for name, value in options.items():
        param = f"stream_options.{name}"
        if name not in known and value is not None:
            raise PolicyError(
                f"the stream option {name!r} is not supported here", code="unsupported_parameter", param=param
            )
        if not isinstance(value, bool | None):
            raise PolicyError(f"{param} must be true or false", code="invalid_value", param=param)
    return options


def renamed(error: PolicyError, name: Callable[[str], str]) -> PolicyError:
    """Return an error that calls the field at fault by another name, in its message, too.

    Args:
        error: names a field, or none.
        name: turns the field's name into the other one.
    """
    if error.param is None:
        return error
    param = name(error.param)
    other = copy.copy(error)
    other.param = param
    field = rf"(?<![\w.]){re.escape(error.param)}(?!\w)"
    other.args = (re.sub(field, lambda _: param, str(error)),)
    return other
