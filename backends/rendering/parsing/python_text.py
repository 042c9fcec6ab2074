"""Calls written in Python, read without running them."""

from __future__ import annotations

import ast
import warnings
from typing import Any

from backends.rendering.parsing.json_text import json_text
from backends.rendering.parsing.parts import Call, is_sound

__all__ = ["read_python_calls"]

_JSON_NAMES = {"true": True, "false": False, "null": None}
"""Policies that write JSON more than Python write these."""


def read_python_calls(text: str) -> list[Call]:
    """Read `[f(a=1), g(b="x")]` or a single call; arguments become JSON text.

    Raises:
        ValueError: the text is something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the policy's odd escapes are no business of this process
            tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        if not calls:
            raise ValueError("there is no call")
        return [_call(node) for node in calls]
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("the text is not Python") from error


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("arguments without names")
    members: list[str] = []
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments without names")
        # Written member by member: a name that stands twice is the reader's to judge.
        members.append(f"{json_text(keyword.arg)}: {json_text(_value(keyword.value))}")
    name = _dotted(node.func)
    if not is_sound(name):
        raise ValueError("the call has no name")
    return Call(name, "{" + ", ".join(members) + "}")


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("the call has no name")


def _value(node: ast.expr) -> Any:
    """Return the value of a literal that JSON can express."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    if not isinstance(key, str):
        raise ValueError("JSON's keys are strings")
    return key
