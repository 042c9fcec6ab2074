"""Bodies that were right before something in them was changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Raw:
    """JSON, or what only looks like it, that `json.dumps` would not write."""

    text: str

    def __repr__(self) -> str:
        return f"Raw({self.text[:20]!r}, {len(self.text)} characters)"


def encoded(value: Any) -> str:
    """Return a value as JSON; what is `Raw` is written as it is."""
    match value:
        case Raw():
            return value.text
        case dict():
            return (
                "{" + ",".join(f"{json.dumps(name)}:{encoded(field)}" for name, field in value.items()) + "}"
            )
        case list():
            return "[" + ",".join(map(encoded, value)) + "]"
    return json.dumps(value)


_NUMBERS = [*(0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63) - 1, 0.5, -0.5, 1e308), Raw("1" * 400), Raw("-0.0")]
_NOT_NUMBERS = [Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999")]
_WORDS = ["auto", "none", "required", "user", "assistant", "system", "tool", "function", "text", "custom"]
_KINDS = [
    *("message", "function_call", "function_call_output", "reasoning", "item_reference", "output_text"),
    *(
        "json_schema",
        "json_object",
        "tool_use",
        "tool_result",
        "thinking",
        "image",
        "input_image",
        "ephemeral",
    ),
]
_TEXTS = [
    *(
        "",
        " ",
        "\x00",
        "\ud800",
        "a\udfffb",
        "\ufeff",
        "\u202e",
        "é" * 50,
        "\U0001d54f",
        "a" * 5000,
        "{}",
        "null",
        "NaN",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<tool_call>",
        "</think>",
        "{{ 1 // 0 }}",
        "../../etc/passwd",
        "1" * 5000,
    ),
]
_DEEP = [Raw("[" * size + "]" * size) for size in (100, 1000, 100_000)]
_DEEP += [Raw('{"a":' * size + "1" + "}" * size) for size in (100, 1000, 100_000)]
_FORM = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
_OBJECTS = [{}, [], [[]], [None], [{}], {"": ""}, {"type": None}, {"role": "user", "content": "hi"}, _FORM]

HOSTILE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_NOT_NUMBERS),
    st.sampled_from(_WORDS + _KINDS),
    st.sampled_from(_TEXTS),
    st.sampled_from(_DEEP),
    st.sampled_from(_OBJECTS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
).map(copy.deepcopy)
"""Values that a field may not expect."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of everything within a value."""
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield (*path, name)
        yield from _places(value[name], (*path, name))


def _holder(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path[:-1]:
        value = value[name]
    return value


@dataclass(frozen=True)
class Seeds:
    """What mutants are made from.

    Attributes:
        path: of the route.
        bodies: right ones.
        fields: names of fields to add.
    """

    path: str
    bodies: Sequence[Mapping[str, Any]] = field(repr=False)
    fields: Sequence[str] = field(repr=False)


@st.composite
def mutants(draw: st.DrawFn, seeds: Seeds) -> bytes:
    """Draw a body that was right before something in it was changed."""
    body: Any = copy.deepcopy(draw(st.sampled_from(seeds.bodies)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from([*_places(body), None]))
        if path is None:
            body[draw(st.sampled_from(seeds.fields) | st.text(max_size=8))] = draw(HOSTILE)
            continue
        holder, change = _holder(body, path), draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove" and len(body) > 1:
            del holder[path[-1]]
        elif change == "add" and isinstance(holder, list):
            holder.append(draw(st.sampled_from(holder) | HOSTILE))
        elif change == "add":
            holder[draw(st.sampled_from(_WORDS + _KINDS) | st.text(max_size=8))] = draw(HOSTILE)
        else:
            holder[path[-1]] = draw(HOSTILE)
    return _spoiled(draw, encoded(body), body)


def _spoiled(draw: st.DrawFn, text: str, body: Mapping[str, Any]) -> bytes:
    """Return JSON as bytes, sometimes with a flaw that only its text can have."""
    match draw(st.sampled_from([None] * 20 + ["twice", "cut", "more", "bytes"])):
        case "twice":
            name = draw(st.sampled_from([*body]))
            return f"{text[:-1]},{json.dumps(name)}:{encoded(draw(HOSTILE))}}}".encode()
        case "cut":
            return text[: draw(st.integers(0, len(text) - 1))].encode()
        case "more":
            return text.encode() + draw(st.sampled_from([b"}", b"\x00", b" {}", b"\xff", b","]))
        case "bytes":
            place = draw(st.integers(0, len(text)))
            return text[:place].encode() + draw(st.binary(min_size=1, max_size=4)) + text[place:].encode()
    return text.encode()
