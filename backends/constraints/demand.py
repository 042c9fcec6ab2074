"""What a request demands of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ANY_OBJECT", "Demand"]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of `json_object`: any JSON object."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a generation has to be; thinking before it stays free.

    `none` with a schema: an answer that matches; without one: free text, and no call. `auto` with a schema:
    an answer that matches, or calls; without one: free text, which may go over into calls; whatever is
    called, the arguments match. `required`: calls and nothing else.

    Attributes:
        calls: whether functions may or must be called.
        names: the functions that may be called; None: all that are on offer.
        max_calls: how many calls at most, one or more; None: any number.
        schema: JSON schema of the answer; see `ANY_OBJECT`.
        calls_param: the request's field that a refusal of constrained calls names.
        schema_param: the request's field that an error of the schema names.
    """

    calls: Literal["none", "auto", "required"] = "none"
    names: frozenset[str] | None = None
    max_calls: int | None = None
    schema: Mapping[str, Any] | None = None
    calls_param: str = "tool_choice"
    schema_param: str = "text.format.schema"

    @property
    def is_free_text(self) -> bool:
        """Whether all that is asked for is that nothing is called."""
        return self.calls == "none" and self.schema is None

    @property
    def param(self) -> str:
        """The request's field that asks for it."""
        return self.calls_param if self.schema is None else self.schema_param.removesuffix(".schema")

    def __post_init__(self) -> None:
        if self.max_calls is not None and self.max_calls < 1:
            raise ValueError('max_calls is one or more; no calls at all are `calls="none"`')
