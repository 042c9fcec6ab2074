"""Grammars of tool calls and answers, on every template: what the template writes passes, and whatever
passes is read as what was demanded."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
from support.grammars import accepts, walk
from support.template_tokenizers import renderers
from support.templates import trl_templates

from backends.constraints import ANY_OBJECT, Constraints, Demand
from backends.rendering import TemplateRenderer
from backends.rendering.renderer import Conversation
from backends.speech import Speech, Turn
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, FunctionTool, Item, Message, Reasoning

TEMPLATES = [*trl_templates(), "mistral", "tiny"]
CALLING = [
    name
    for name in TEMPLATES
    if re.match(
        r"deepseekv3|diffusion_gemma|gemma4|glm4moe|gptoss|lfm2_2|lfm2_v2|llama3_[12]|mistral|muse|nemotron|"
        r"qwen2_5(_training)?$|qwen3|tiny",
        name,
    )
]
"""Templates that write calls which a parser here reads."""
MARKED = [name for name in CALLING if not name.startswith("llama")]
"""Those whose calls can be told from text."""
ANSWERING = [name for name in TEMPLATES if not name.startswith("cohere2")]
FAMILIES = (
    "deepseekv3",
    "gemma4",
    "gemma4_v2",
    "gemma4_v5",
    "glm4moe",
    "gptoss",
    "lfm2_2_5",
    "lfm2_v2",
    "llama3_1",
    "mistral",
    "muse_glimmer",
    "nemotron_3_nano",
    "nemotron_3_ultra",
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_8",
    "tiny",
)
"""One template for each way to write calls and thinking."""

ADD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "note": {"type": "string", "description": "Anything."},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
    },
    "required": ["a", "colour"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/point"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
LOOK = {
    "type": "object",
    "properties": {"query": {"type": "string"}},
    "required": ["query"],
    "additionalProperties": False,
}
TOOLS = [
    FunctionTool(name="add", parameters=ADD),
    FunctionTool(name="add_up", parameters=LOOK),
    FunctionTool(name="now"),
]
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {"verdict": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["score"],
    "additionalProperties": False,
}
ADDING = ("add", {"a": 1, "colour": "red", "note": "a <note>"})
LOOKING = ("add_up", {"query": "Größe"})
NOW = ("now", {})

DEMANDS = {
    "required": Demand("required"),
    "one": Demand("required", max_calls=1),
    "named": Demand("required", names=frozenset({"add_up"})),
    "strict": Demand("auto"),
    "schema": Demand(schema=ANSWER),
    "any object": Demand(schema=ANY_OBJECT),
    "either": Demand("auto", schema=ANSWER),
}


def conversation(**settings: Any) -> Conversation:
    return Conversation([Message(role="user", content="Go on.")], TOOLS, template_kwargs=settings)


def prompt_of(renderer: TemplateRenderer, **settings: Any) -> list[int]:
    """The prompt; some templates write calls and show no tools."""
    tools = TOOLS if renderer.template.abilities.tools else ()
    items: list[Item] = [Message(role="user", content="Go on.")]
    return renderer.render(Conversation(items, tools, template_kwargs=settings)).token_ids


@cache
def constraints(name: str) -> Constraints:
    return Constraints(renderers()[name])


def built(name: str, demand: Demand, **settings: Any) -> tuple[TemplateRenderer, list[int], str]:
    """Return a renderer, a prompt and the grammar."""
    renderer = renderers()[name]
    prompt = prompt_of(renderer, **settings)
    return renderer, prompt, constraints(name).grammar(conversation(**settings), prompt, demand)


def turn(name: str, prompt: list[int], said: Turn, **settings: Any) -> list[int]:
    renderer = renderers()[name]
    tools = TOOLS if renderer.template.abilities.tools else ()
    return Speech(renderer).say(Conversation([], tools, template_kwargs=settings), prompt, said)


def says(name: str, prompt: list[int], said: Turn) -> list[int] | None:
    """Return the ids of a turn; None if the template has no place for it."""
    try:
        return turn(name, prompt, said)
    except PolicyError:
        return None


def check(items: list[Item], demand: Demand) -> None:
    """The items are what was demanded."""
    said = [item for item in items if not isinstance(item, Reasoning)]
    calls = [item for item in said if isinstance(item, FunctionCall)]
    for call in calls:
        assert demand.calls != "none"
        assert demand.names is None or call.name in demand.names
        tool = next(tool for tool in TOOLS if tool.name == call.name)
        closed = {"type": "object", "additionalProperties": False}
        jsonschema.validate(json.loads(call.arguments), tool.parameters or closed)
    assert demand.max_calls is None or len(calls) <= demand.max_calls
    if demand.calls == "required":
        assert calls
        assert calls == said
    elif demand.schema is not None and not calls:
        (message,) = said
        assert isinstance(message, Message)
        jsonschema.validate(json.loads(message.text), demand.schema)


def supported(name: str) -> list[str]:
    """Return the demands that a template's format can be held to."""
    refused = set() if name in ANSWERING else {"schema", "any object", "either"}
    if name not in CALLING:
        refused |= {"required", "one", "named"}
    if name not in MARKED:
        refused |= {"strict", "either"}
    if name.startswith(("llama3_1", "llama3_2")):
        refused |= {"any object"}
    return [kind for kind in DEMANDS if kind not in refused]


def thoughts(name: str, prompt: list[int]) -> tuple[str, ...]:
    """Return what to think in a turn: nothing where the prompt has closed thinking."""
    closed = renderers()[name].decode(prompt).rstrip().endswith("</think>")
    return ("",) if closed else ("", "Let me see: <b>.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_format_cannot_be_held_to_is_refused_by_name(name: str) -> None:
    prompt = prompt_of(renderers()[name])
    for kind in DEMANDS.keys() - set(supported(name)):
        with pytest.raises(PolicyError) as caught:
            constraints(name).grammar(conversation(), prompt, DEMANDS[kind])
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.param in ("tool_choice", "text.format.schema")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in CALLING
        for kind in ("required", "strict", "either")
        if kind in supported(name)
    ],
)
def test_calls_of_the_template_pass(name: str, kind: str) -> None:
    renderer, prompt, grammar = built(name, DEMANDS[kind])
    turns = [[ADDING], [NOW], [ADDING, LOOKING], [NOW, ADDING, NOW]]
    said = [
        ids
        for calls in turns
        for thinking in thoughts(name, prompt)
        if (ids := says(name, prompt, Turn("", thinking, calls))) is not None
    ]
    assert said
    for ids in said:
        assert accepts(renderer, grammar, ids), renderer.decode(ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in TEMPLATES
        for kind in ("schema", "any object", "either")
        if kind in supported(name)
    ],
)
def test_answers_of_the_template_pass(name: str, kind: str) -> None:
    renderer, prompt, grammar = built(name, DEMANDS[kind])
    for answer in ('{"verdict": "so so", "score": 3}', '{"score":3}', '{\n  "score": 3\n}'):
        for thinking in thoughts(name, prompt):
            ids = says(name, prompt, Turn(answer, thinking))
            assert ids is None or accepts(renderer, grammar, ids)
            assert ids is not None or thinking


@pytest.mark.parametrize("name", MARKED)
def test_free_text_passes_where_calls_are_only_strict(name: str) -> None:
    renderer, prompt, grammar = built(name, DEMANDS["strict"])
    ids = turn(name, prompt, Turn("It is {4}: <b>\n\nYes."))
    assert accepts(renderer, grammar, ids)
    wrong = says(name, prompt, Turn("", calls=[("add", {"a": "x", "colour": "red"})]))
    assert wrong is not None
    assert not accepts(renderer, grammar, wrong)


@pytest.mark.parametrize("name", CALLING)
def test_what_was_not_demanded_does_not_pass(name: str) -> None:
    renderer, prompt, grammar = built(name, DEMANDS["required"])
    wrong = [
        [("subtract", {"a": 1})],
        [("add", {"a": 1})],
        [("add", {"colour": "red", "a": "x"})],
        [("add", {"a": 1, "colour": "green"})],
        [("add", {"a": 1, "colour": "red", "more": 1})],
        [("now", {"a": 1})],
    ]
    for calls in wrong:
        ids = says(name, prompt, Turn("", calls=calls))
        assert ids is not None
        assert not accepts(renderer, grammar, ids)
    assert not accepts(renderer, grammar, turn(name, prompt, Turn("No.")))
    assert not accepts(renderer, grammar, turn(name, prompt, Turn('{"score": 3}')))


@pytest.mark.parametrize("name", CALLING)
def test_one_call_is_one_call(name: str) -> None:
    renderer, prompt, grammar = built(name, DEMANDS["one"])
    assert accepts(renderer, grammar, turn(name, prompt, Turn("", calls=[LOOKING])))
    two = says(name, prompt, Turn("", calls=[LOOKING, NOW]))
    assert two is None or not accepts(renderer, grammar, two)
    _, _, grammar = built(name, DEMANDS["named"])
    assert accepts(renderer, grammar, turn(name, prompt, Turn("", calls=[LOOKING])))
    assert not accepts(renderer, grammar, turn(name, prompt, Turn("", calls=[NOW])))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in FAMILIES for kind in supported(name)])
def test_whatever_passes_is_what_was_demanded(name: str, kind: str) -> None:
    demand = DEMANDS[kind]
    renderer, prompt, grammar = built(name, demand)
    for seed in range(4):
        ids = walk(renderer, grammar, seed)
        output = renderer.parse(ids, prompt=prompt, tools=TOOLS)
        assert output.unparsed_calls == 0, renderer.decode(ids)
        check(output.items, demand)
