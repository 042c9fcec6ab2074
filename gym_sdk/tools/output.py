"""What a tool returned, as the text that the model reads."""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic_core import to_json

__all__ = ["output_of"]


def output_of(value: Any) -> str:
    """Write a result as text.

    Text stays as it is, None is empty, everything else is compact JSON (pydantic models, dataclasses,
    dicts, lists, sets, numbers, booleans, dates).

    Raises:
        ValueError: the value has no JSON form (`pydantic_core.PydanticSerializationError`).
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        return ""
    if isinstance(value, str):
        # a lone surrogate (undecodable bytes of a file name, say) could not be sent as JSON
        return value.encode("utf-8", "replace").decode("utf-8")
    return to_json(value, inf_nan_mode="constants").decode("utf-8")
