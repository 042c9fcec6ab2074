"""JSON schemas of all kinds: each is followed, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import Target, check, fuzz_settings
from support.mutants import HOSTILE, encoded

pytestmark = pytest.mark.slow

_TYPES = ["string", "integer", "number", "boolean", "null", "array", "object", "any"]
_NAMES = st.sampled_from(["a", "b", "", "é", "$ref", '"', "\ud800", "a b"])
_NUMBER = st.sampled_from([-1, 0, 1, 2, 3.5, 1e300, 10**30, 0.1])
_LIMITS = [
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties"),
]
_PATTERNS = ["a+", "^[0-9]{3}$", "(", "(?=a)b", "a{1000}", "(a*)*b", "\\p{L}", "[\ud800]", "$^", ""]
_FORMATS = ["date", "date-time", "uuid", "email", "ipv4", "uri", "hostname", "nonsense"]


def _more(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(_NAMES, inner, max_size=3)
    some = st.lists(inner, max_size=3)
    return st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": named},
            optional={
                "required": st.lists(_NAMES, max_size=3),
                "additionalProperties": st.booleans() | inner,
                "patternProperties": named,
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("array")}, optional={"items": inner, "prefixItems": some, "minItems": _NUMBER}
        ),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("anyOf", "oneOf", "allOf"), some)),
        st.fixed_dictionaries(
            {"$defs": named, "$ref": st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "http://a/b"])}
        ),
        st.fixed_dictionaries({"not": inner}),
    )


_SCHEMAS = st.recursive(
    st.one_of(
        st.booleans(),
        st.fixed_dictionaries(
            {"type": st.sampled_from(_TYPES) | st.lists(st.sampled_from(_TYPES), max_size=3)}
        ),
        st.fixed_dictionaries({"type": st.just("string"), "pattern": st.sampled_from(_PATTERNS)}),
        st.fixed_dictionaries({"type": st.just("string"), "format": st.sampled_from(_FORMATS)}),
        st.fixed_dictionaries({"enum": st.lists(_NUMBER | _NAMES | st.none(), max_size=3)}),
        st.fixed_dictionaries({"const": _NUMBER | _NAMES | HOSTILE}),
        st.dictionaries(st.sampled_from(_LIMITS), _NUMBER, min_size=1, max_size=3),
    ),
    _more,
    max_leaves=8,
)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_a_schema_is_followed_or_refused(server: Target, path: str) -> None:
    @fuzz_settings(80)
    @given(schema=_SCHEMAS)
    def attack(schema: Any) -> None:
        form = {"name": "a", "schema": schema, "strict": True}
        body: dict[str, Any] = {"input": "1", "max_output_tokens": 6}
        if path == "/v1/responses":
            body["text"] = {"format": {"type": "json_schema", **form}}
        else:
            body = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 6}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        check(path, server.ask("POST", path, encoded(body).encode()))

    attack()
    server.check_health()


def test_the_schemas_of_tools_are_followed_or_refused(server: Target) -> None:
    @fuzz_settings(80)
    @given(schema=_SCHEMAS, strict=st.booleans())
    def attack(schema: Any, strict: bool) -> None:
        tool = {"type": "function", "name": "add", "parameters": schema, "strict": strict}
        body = {"input": "1", "max_output_tokens": 6, "tools": [tool], "tool_choice": "required"}
        check("/v1/responses", server.ask("POST", "/v1/responses", encoded(body).encode()))

    attack()
    server.check_health()
