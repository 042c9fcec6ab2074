from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from gym_sdk.errors import ConfigurationError
from gym_sdk.tools import Tool, ToolContext, resolve_tools, tool

if TYPE_CHECKING:
    from collections import OrderedDict


# OpenAI's rules for strict function schemas, written apart from the code that meets them
KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref"),
    *("$defs", "description", "pattern", "format", "multipleOf", "minimum", "maximum", "exclusiveMinimum"),
    *("exclusiveMaximum", "minItems", "maxItems"),
}
TYPES = {"string", "number", "boolean", "integer", "object", "array", "null"}
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}


def check_strict(schema: dict[str, Any]) -> None:
    assert schema["type"] == "object"
    assert "anyOf" not in schema
    _check(schema, schema.get("$defs", {}), "#")


def _check(node: Any, defs: dict[str, Any], path: str) -> None:
    assert isinstance(node, dict), path
    assert node.keys() <= KEYWORDS, (path, node.keys() - KEYWORDS)
    if "$ref" in node:
        assert node.keys() == {"$ref"}, path
        assert node["$ref"].removeprefix("#/$defs/") in defs, path
        return
    for name, body in node.get("$defs", {}).items():
        _check(body, defs, f"#/$defs/{name}")
    if "anyOf" in node:
        assert node["anyOf"], path
        for i, branch in enumerate(node["anyOf"]):
            _check(branch, defs, f"{path}/anyOf/{i}")
        return
    kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
    assert set(kinds) <= TYPES, path
    if "object" in kinds:
        assert node["additionalProperties"] is False, path
        assert node["required"] == list(node["properties"]), path
        for name, child in node["properties"].items():
            _check(child, defs, f"{path}/{name}")
    if "array" in kinds:
        _check(node["items"], defs, f"{path}[]")
    if "format" in node:
        assert node["format"] in FORMATS, path


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    """A point."""

    x: int
    y: int = 3
    tags: list[str] = Field(default_factory=list)


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(default=9, ge=1)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str = Field(min_length=2)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    x: int


class Keys(TypedDict, total=False):
    title: str
    default: int


@dataclass
class Range:
    start: float
    end: float | None = None


def parameters(function: Any) -> dict[str, Any]:
    return resolve_tools([function])[function.__name__].schema.parameters or {}


def test_the_first_program() -> None:
    @tool
    async def add(a: int, b: int) -> int:
        """Add two integers."""
        return a + b

    assert add.schema.to_wire() == {
        "type": "function",
        "name": "add",
        "description": "Add two integers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    }


def test_every_supported_type_meets_the_strict_rules() -> None:
    def everything(
        a: int,
        b: str | None,
        c: Colour,
        d: Literal["x", "y"],
        e: list[Point],
        f: Cat | Dog,
        g: Annotated[Cat | Dog, Field(discriminator="kind", description="A pet.")],
        h: Range,
        i: Tree,
        j: datetime,
        k: UUID,
        m: Annotated[list[int], Field(min_length=1, max_length=3)],
        n: Literal["one", 2],
        o: set[int],
        p: bytes,
        q: Keys,
        r: Literal["only"],
        s: Annotated[Point, "Where."],
        t: Annotated[str, Field(pattern=r"^(?:a|b)$")],
        u: Annotated[int, Field(ge=0, lt=10)] = 4,
        v: Colour = Colour.RED,
        w: Point | None = None,
        x: Decimal = Decimal("1.5"),
        y: Point | list[Range] = Point(x=1),  # noqa: B008
        z: Any = None,
    ) -> None: ...

    with pytest.raises(ConfigurationError, match="z: a value of any type"):
        tool(strict=True)(everything)
    made = tool(strict=True)(functools.partial(everything, z=1))
    assert made.schema.parameters is not None
    check_strict(made.schema.parameters)
    assert set(made.schema.parameters["$defs"]) >= {"Point", "Tree", "Colour"}
    jsonschema.Draft202012Validator.check_schema(made.schema.parameters)


def test_defaults_become_nullable_and_say_what_null_means() -> None:
    def search(query: str, limit: int = 5, colour: Colour = Colour.RED, after: str | None = None) -> None: ...

    schema = parameters(search)
    check_strict(schema)
    assert schema["properties"]["limit"] == {
        "type": ["integer", "null"],
        "description": "Null means the default: 5.",
    }
    assert schema["properties"]["colour"] == {
        "anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}],
        "description": 'Null means the default: "red".',
    }
    assert schema["properties"]["after"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}


def test_texts_come_from_docstring_and_annotations() -> None:
    def look(
        where: str,
        what: Annotated[str, Field(description="From the field.")],
        how: Annotated[str, "From the text."],
        why: Annotated[str, Field(min_length=3, description="Said here")],
        who: str,
    ) -> str:
        """Look for something.

        It takes a while:
        not too long.

        Args:
            where: A place,
                over two lines.
            what (str): Overridden.
            who: Somebody. With: a colon.

        Returns:
            What was found.
        """
        return where + what + how + why + who

    made = Tool(look)
    assert made.description == "Look for something.\n\nIt takes a while:\nnot too long."
    properties = parameters(look)["properties"]
    assert {name: child["description"] for name, child in properties.items()} == {
        "where": "A place, over two lines.",
        "what": "From the field.",
        "how": "From the text.",
        "why": "Said here. minLength: 3.",
        "who": "Somebody. With: a colon.",
    }
    renamed = tool(name="peek", description="Other.", timeout_s=2)(look)
    assert (renamed.name, renamed.description, renamed.timeout_s) == ("peek", "Other.", 2)
    assert Tool(renamed, name="again").name == "again"


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (dict[str, int], "free-form keys"),
        (dict, "free-form keys"),
        (Any, "any type"),
        (tuple[int, str], "prefixItems"),
        (list, "any type"),
        (Open, "free-form keys"),
    ],
)
def test_schemas_without_a_strict_form_fall_back(annotation: Any, reason: str) -> None:
    def take(x, y: int = 1): ...  # type: ignore[no-untyped-def]

    take.__annotations__["x"] = annotation
    made = Tool(take)
    assert made.strict is False
    assert made.schema.strict is False
    assert made.schema.parameters is not None
    assert made.schema.parameters["required"] == ["x"]
    assert made.schema.parameters["properties"]["y"] == {"type": "integer", "default": 1}
    with pytest.raises(ConfigurationError, match=rf"tool take cannot be strict: (x|Open).*{reason}"):
        Tool(take, strict=True)


def test_strict_can_be_turned_off() -> None:
    def take(title: Point, default: int = 1) -> None: ...

    made = tool(strict=False)(take)
    assert made.schema.strict is False
    assert made.schema.parameters is not None
    assert set(made.schema.parameters["properties"]) == {"title", "default"}
    assert "title" not in made.schema.parameters


def test_no_arguments() -> None:
    def now() -> str:
        return "noon"

    assert parameters(now) == {
        "type": "object",
        "properties": {},
        "required": [],
        "additionalProperties": False,
    }


def test_names_that_pydantic_reserves_are_fine() -> None:
    def odd(schema: str, copy: int, _x: int, model_config: int, json: str) -> None: ...

    assert list(parameters(odd)["properties"]) == ["schema", "copy", "_x", "model_config", "json"]


def test_local_classes_under_postponed_annotations() -> None:
    class Local(BaseModel):
        x: int

    @tool
    def take(where: Local) -> None: ...

    @tool(name="other")
    def take_too(where: Local) -> None: ...

    check_strict(take.schema.parameters or {})
    check_strict(take_too.schema.parameters or {})


class Account:
    def __init__(self) -> None:
        self.balance = 0

    def deposit(self, amount: int) -> int:
        """Put money in."""
        self.balance += amount
        return self.balance

    async def __call__(self, amount: int) -> int:
        """Ask."""
        return amount


def test_bound_methods_partials_and_objects() -> None:
    account = Account()
    made = tool(account.deposit)
    assert (made.name, made.description) == ("deposit", "Put money in.")
    assert made(3) == 3
    assert list((made.schema.parameters or {})["properties"]) == ["amount"]

    def between(low: int, high: int, step: int = 1) -> None: ...

    assert list((tool(functools.partial(between, 1)).schema.parameters or {})["properties"]) == [
        "high",
        "step",
    ]
    half = tool(functools.partial(between, high=1))
    assert list((half.schema.parameters or {})["properties"]) == ["low", "step"]
    assert tool(name="ask")(account).description == "Ask."
    with pytest.raises(ConfigurationError, match=r"Account object has no name.*tool\(name="):
        tool(account)


def test_the_context_is_hidden() -> None:
    def first(context: ToolContext, x: int) -> None: ...
    def optional(context: ToolContext | None, x: int) -> None: ...
    def late(x: int, context: ToolContext) -> None: ...

    assert list(parameters(first)["properties"]) == ["x"]
    assert list(parameters(optional)["properties"]) == ["x"]
    with pytest.raises(ConfigurationError, match="`context` is a ToolContext, which must come first"):
        Tool(late)


class Method:
    def method(self, x: int) -> None: ...


def unannotated(x, y: int): ...  # type: ignore[no-untyped-def]
def many(*values: int) -> None: ...
def keywords(**values: int) -> None: ...
def hidden(x: OrderedDict[str, int]) -> None: ...
def opaque(ok: int, x: Account) -> None: ...
def textual(x: "not a type") -> None: ...  # type: ignore[valid-type]
def field_default(x: int = Field(default=3)) -> None: ...
def generator(x: int) -> Any:
    yield x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unannotated, "tool unannotated: argument `x` has no type annotation"),
        (many, r"tool many: `\*values` has no schema"),
        (keywords, r"tool keywords: `\*\*values` has no schema"),
        (hidden, "tool hidden: an annotation names 'OrderedDict'"),
        (opaque, "tool opaque: the type of argument `x` has no JSON schema"),
        (textual, "tool textual: an annotation is not a type"),
        (field_default, r"argument `x`: write Annotated\[type, Field"),
        (generator, "tool generator: a generator cannot be a tool"),
        (Method.method, r"decorate the bound method instead, as in tool\(object.method\)"),
        (Account, "tool Account: a class cannot be a tool"),
        (lambda x: x, "a lambda cannot be a tool"),
        ("add", "a tool is a function; got str"),
        ({"type": "function"}, "a tool is a function; got dict"),
    ],
)
def test_what_cannot_be_a_tool_says_why(function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tool(function)


@pytest.mark.parametrize("name", ["", "two words", "é", "x" * 65, "a.b"])
def test_names_follow_openais_rule(name: str) -> None:
    def f() -> None: ...

    with pytest.raises(ConfigurationError, match="1 to 64 letters"):
        tool(name=name)(f)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_timeouts_are_positive(timeout_s: float) -> None:
    def f() -> None: ...

    with pytest.raises(ConfigurationError, match="timeout_s must be positive"):
        tool(timeout_s=timeout_s)(f)


def test_a_return_type_that_is_not_there_does_not_matter() -> None:
    def f(x: int) -> OrderedDict[str, int]:
        raise NotImplementedError

    assert Tool(f).name == "f"


def test_resolve_tools() -> None:
    def add(a: int) -> int:
        return a

    made = tool(name="sub")(add)
    assert list(resolve_tools([add, made])) == ["add", "sub"]
    assert resolve_tools([made])["sub"] is made
    assert resolve_tools(None) == {}
    with pytest.raises(ConfigurationError, match="two tools are called 'add'"):
        resolve_tools([add, tool(add)])
    with pytest.raises(ConfigurationError, match="must be a list"):
        resolve_tools(made)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must be a list"):
        resolve_tools(add)  # type: ignore[arg-type]
