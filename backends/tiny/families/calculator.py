"""The calculator, as the tiny policy knows it."""

from __future__ import annotations

from typing import Any

__all__ = ["CALCULATOR_TOOL"]

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "The expression, e.g. 12 + 5 - 30."}
            },
            "required": ["expression"],
            "additionalProperties": False,
        },
    },
}
"""In the form of Chat Completions. The chat template shows its name and its parameters' names alone."""
