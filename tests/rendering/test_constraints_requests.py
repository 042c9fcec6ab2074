"""What requests bring to grammars: all kinds of schemas, odd names, open thinking; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.grammars import accepts, walk
from support.template_tokenizers import MISTRAL, renderers
from support.templates import trl_templates
from support.trained import byte_level_tokenizer, metaspace_tokenizer
from tokenizers import AddedToken

from backends.constraints import ANY_OBJECT, Constraints, Demand
from backends.engine import FinishReason, GenerationRequest, SamplingParams
from backends.rendering import TemplateRenderer
from backends.rendering.renderer import Conversation
from backends.speech import Speech, Turn
from backends.transformers import TransformersEngine
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, FunctionTool, Message

USER = Message(role="user", content="Go on.")
PEOPLE: dict[str, Any] = {
    "type": "object",
    "properties": {"people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 3}},
    "required": ["people"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                "parent": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
            },
            "required": ["name", "age", "parent"],
            "additionalProperties": False,
        }
    },
}
BLANKS = "   \n \n    "
_ENDLESS = re.compile(r"\d[eE]\+?\d{3}")
"""Numbers beyond all floats, which are JSON, and which calls in Python cannot hold."""


def with_tool(parameters: dict[str, Any] | None, name: str = "f") -> Conversation:
    return Conversation([USER], [FunctionTool(name=name, parameters=parameters)])


def grammar_of(
    name: str, conversation: Conversation, demand: Demand
) -> tuple[TemplateRenderer, list[int], str]:
    """Return a template's renderer, the prompt and the grammar."""
    renderer = renderers()[name]
    prompt = renderer.render(conversation).token_ids
    return renderer, prompt, Constraints(renderer).grammar(conversation, prompt, demand)


def text_of(renderer: TemplateRenderer, text: str) -> list[int]:
    """The ids of a generation; special tokens count."""
    return [token for piece in renderer.special.split(text) for token in renderer.encode(piece)]


@pytest.mark.parametrize("name", ["tiny", "gptoss", "gemma", "phi3"])
def test_recursive_schemas_hold(name: str) -> None:
    renderer, prompt, grammar = grammar_of(name, Conversation([USER]), Demand(schema=PEOPLE))
    for seed in range(6):
        (*_, message) = renderer.parse(walk(renderer, grammar, seed), prompt=prompt).items
        assert isinstance(message, Message)
        jsonschema.validate(json.loads(message.text), PEOPLE)


def test_white_space_is_bounded() -> None:
    renderer, _, grammar = grammar_of("tiny", Conversation([USER]), Demand(schema=ANY_OBJECT))
    for text in ("{}", '{"a":[1,2]}', '{"a": [1, 2]}', json.dumps({"a": [1, {"b": None}]}, indent=4)):
        assert accepts(renderer, grammar, text_of(renderer, f"{text}<|im_end|>"))
    for text in (f"{BLANKS}{{}}", f'{{{BLANKS}"a": 1}}', f'{{"a":{BLANKS}1}}'):
        assert not accepts(renderer, grammar, text_of(renderer, f"{text}<|im_end|>"))


def test_a_schema_does_not_set_how_it_is_read() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": "x+", "lenient": True}}
    renderer, _, grammar = grammar_of("tiny", Conversation([USER]), Demand(schema=schema))
    assert accepts(renderer, grammar, text_of(renderer, '{ "a": 1}<|im_end|>'))
    assert not accepts(renderer, grammar, text_of(renderer, '{xx"a": 1}<|im_end|>'))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": "object", "properties": 3},
        {"type": "object", "required": "a"},
        {"type": "string", "pattern": "(?=a)"},
        {"type": "string", "format": "no such format"},
        {"not": {"type": "string"}},
        {"$ref": "#/$defs/nowhere"},
        {"type": "string", "const": "\ud800"},
        {"minimum": float("nan")},
    ],
)
def test_schemas_that_cannot_be_used_are_named(schema: dict[str, Any]) -> None:
    with pytest.raises(PolicyError) as caught:
        grammar_of("tiny", Conversation([USER]), Demand(schema=schema))
    assert (caught.value.param, caught.value.status) == ("text.format.schema", 400)
    renderer = renderers()["tiny"]
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = [FunctionTool(name="fine"), FunctionTool(name="f", parameters=parameters)]
    with pytest.raises(PolicyError) as caught:
        Constraints(renderer).grammar(Conversation([USER], tools), [], Demand("required"))
    assert caught.value.param == "tools[1].parameters"


def test_a_schema_nests_as_deeply_as_python_reads_it() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(PolicyError, match="schema"):
        grammar_of("tiny", Conversation([USER]), Demand(schema=schema))


@pytest.mark.parametrize("name", ["tiny", "qwen3_8"])
def test_arguments_that_are_no_object_are_refused(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        grammar_of(name, with_tool({"type": "array"}), Demand("required"))
    assert caught.value.param == "tools[0].parameters"


@pytest.mark.parametrize(
    "prop",
    [
        {"type": "string", "pattern": "a+"},
        {"type": "string", "enum": ["a", " b"]},
        {"type": "string", "const": "a</parameter>"},
        {"anyOf": [{"enum": ["1", "x"]}, {"type": "integer"}]},
        {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]},
    ],
)
def test_bare_strings_that_cannot_be_held_are_refused(prop: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"a": prop}}
    with pytest.raises(PolicyError) as caught:
        grammar_of("qwen3_8", with_tool(parameters), Demand("required"))
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools[0].parameters")
    grammar_of("tiny", with_tool(parameters), Demand("required"))


@pytest.mark.parametrize("name", ["qwen3_8", "glm4moe", "muse_glimmer", "gemma4_v5", "lfm2_2_5", "lfm2_v2"])
@pytest.mark.parametrize(
    "prop",
    [
        {"enum": ["1", "true", "x"]},
        {"type": ["integer", "null"]},
        {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
        {"anyOf": [{"enum": ["low", "high"]}, {"type": "number"}]},
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        {"enum": [1, "a", None]},
        {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        {"$ref": "#/$defs/word"},
        {},
    ],
)
def test_values_written_one_by_one_hold(name: str, prop: dict[str, Any]) -> None:
    parameters = {
        "type": "object",
        "properties": {"first": {"type": "boolean"}, "a": prop, "z": {"type": "string"}},
        "required": ["a"],
        "$defs": {"word": {"type": "string"}},
    }
    conversation = with_tool(parameters)
    renderer, prompt, grammar = grammar_of(name, conversation, Demand("required", max_calls=1))
    for seed in range(5):
        ids = walk(renderer, grammar, seed)
        if _ENDLESS.search(renderer.decode(ids)):
            continue
        *_, call = renderer.parse(ids, prompt=prompt, tools=conversation.tools).items
        assert isinstance(call, FunctionCall), renderer.decode(ids)
        jsonschema.validate(json.loads(call.arguments), parameters)


@pytest.mark.parametrize(
    ("name", "tool", "key"), [("lfm2_v2", "f", "class"), ("lfm2_v2", "f-g", "a"), ("qwen3_8", "f", "a>b")]
)
def test_names_that_cannot_be_written_are_refused(name: str, tool: str, key: str) -> None:
    conversation = with_tool({"type": "object", "properties": {key: {"type": "integer"}}}, tool)
    with pytest.raises(PolicyError) as caught:
        grammar_of(name, conversation, Demand("required"))
    assert caught.value.param == "tools[0]"


@pytest.mark.parametrize("name", ["tiny", "qwen3", "qwen3_8", "glm4moe", "nemotron_3_nano"])
def test_thinking_is_open_closed_or_free_as_the_prompt_has_it(name: str) -> None:
    renderer = renderers()[name]
    constraints = Constraints(renderer)
    for thinks in (True, False):
        conversation = Conversation([USER], template_kwargs={"enable_thinking": thinks})
        prompt = renderer.render(conversation).token_ids
        grammar = constraints.grammar(conversation, prompt, Demand(schema=ANY_OBJECT))
        opened = renderer.decode(prompt).rstrip().endswith("<think>")
        thought = "Let me see." if opened else "<think>Let me see."
        ids = text_of(renderer, f"{thought}</think>\n\n{{}}")
        *_, stop = Speech(renderer).say(conversation, prompt, Turn("."))
        assert accepts(renderer, grammar, [*ids, stop]) is thinks
        assert accepts(renderer, grammar, [*text_of(renderer, "{}"), stop]) is not opened


def test_long_thinking_goes_on() -> None:
    renderer, _, grammar = grammar_of("tiny", Conversation([USER]), Demand(schema=ANY_OBJECT))
    thought = text_of(renderer, "<think>") + renderer.encode("Perhaps so, perhaps not {}.\n") * 2000
    ids = [*thought, *text_of(renderer, "</think>\n\n{}<|im_end|>")]
    assert accepts(renderer, grammar, ids)


def test_marks_that_are_spelled_out_count() -> None:
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>"], template=trl_templates()["qwen3"])
    renderer = TemplateRenderer(tokenizer)
    tools = [FunctionTool(name="f", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})]
    conversation = Conversation([USER], tools)
    prompt = renderer.render(conversation).token_ids
    for demand in (Demand("required"), Demand("auto"), Demand("auto", schema=PEOPLE)):
        grammar = Constraints(renderer).grammar(conversation, prompt, demand)
        for thinking in ("", "Hm <b>"):
            said = Turn("", thinking, [("f", {"a": 1}), ("f", {})])
            assert accepts(renderer, grammar, Speech(renderer).say(conversation, prompt, said))
        wrong = Turn("", "", [("g", {"a": 1})])
        assert not accepts(renderer, grammar, Speech(renderer).say(conversation, prompt, wrong))


def test_marks_that_are_tokens_like_any_other_are_no_text() -> None:
    tokenizer = byte_level_tokenizer(["<s>", "[INST]", "[/INST]"], template=MISTRAL, eos="</s>")
    tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=False, normalized=False)])
    renderer = TemplateRenderer(tokenizer)
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammar = Constraints(renderer).grammar(with_tool(parameters), [], Demand("auto"))
    for seed in range(20):
        output = renderer.parse(walk(renderer, grammar, seed))
        assert output.unparsed_calls == 0
        for item in output.items:
            assert not isinstance(item, FunctionCall) or "a" in json.loads(item.arguments)
    junk = [*renderer.encode("[TOOL_CALLS] [1]"), *text_of(renderer, "</s>")]
    assert not accepts(renderer, grammar, junk)


def test_mistral_writes_ids_of_nine_characters() -> None:
    conversation = with_tool(None)
    renderer, prompt, grammar = grammar_of("mistral", conversation, Demand("required", max_calls=2))
    for seed in range(6):
        for call in renderer.parse(walk(renderer, grammar, seed), prompt=prompt).items:
            assert isinstance(call, FunctionCall)
            assert len(call.call_id) == 9
            assert call.call_id.isalnum()
            assert json.loads(call.arguments) == {}


def test_what_reads_as_a_call_is_no_answer() -> None:
    """Llama 3 writes calls as bare JSON."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    renderer, _, grammar = grammar_of("llama3_1", Conversation([USER]), Demand(schema=schema))
    assert accepts(renderer, grammar, text_of(renderer, '{"name": "x"}<|eot_id|>'))
    assert not accepts(renderer, grammar, text_of(renderer, '{"name": "x", "parameters": {}}<|eot_id|>'))
    both = {"type": "object", "properties": {"name": {}, "parameters": {}}}
    with pytest.raises(PolicyError) as caught:
        grammar_of("llama3_1", Conversation([USER]), Demand(schema=both))
    assert caught.value.param == "text.format.schema"


def test_tokenizers_that_llguidance_cannot_read_are_refused() -> None:
    tokenizer = metaspace_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.chat_template = trl_templates()["qwen3"]
    renderer = TemplateRenderer(tokenizer)
    for demand, param in ((Demand("required"), "tool_choice"), (Demand(schema={}), "text.format.schema")):
        with pytest.raises(PolicyError, match="tokenizer") as caught:
            Constraints(renderer).grammar(with_tool(None), [], demand)
        assert caught.value.param == param


def test_errors_name_the_fields_of_the_request() -> None:
    demand = Demand("required", names=frozenset({"g"}), calls_param="tool_choice.name")
    with pytest.raises(PolicyError) as caught:
        grammar_of("tiny", with_tool(None), demand)
    assert caught.value.param == "tool_choice.name"
    demand = Demand(schema={"type": "strin"}, schema_param="response_format.json_schema.schema")
    with pytest.raises(PolicyError, match="Invalid type: strin") as caught:
        grammar_of("tiny", Conversation([USER]), demand)
    assert caught.value.param == "response_format.json_schema.schema"
    with pytest.raises(ValueError, match="one or more"):
        Demand("required", max_calls=0)


def test_the_same_request_gets_the_same_grammar() -> None:
    renderer = renderers()["tiny"]
    constraints = Constraints(renderer)
    one = constraints.grammar(with_tool(None), [], Demand("required"))
    assert constraints.grammar(with_tool(None), [], Demand("required")) is one
    for number in range(300):  # more than are remembered
        constraints.grammar(with_tool(None), [], Demand("required", max_calls=number + 1))
    again = constraints.grammar(with_tool(None), [], Demand("required"))
    assert again == one
    assert again is not one


@pytest.mark.asyncio
async def test_an_untrained_policy_calls_as_it_has_to(untrained_policy: Path) -> None:
    """The embedded engine samples nothing but what the grammars allow."""
    renderer = TemplateRenderer.from_folder(untrained_policy)
    constraints = Constraints(renderer)
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["m", "km"]}},
        "required": ["n", "unit"],
        "additionalProperties": False,
    }
    tools = [FunctionTool(name="measure", parameters=parameters), FunctionTool(name="now")]
    conversation = Conversation([USER], tools, template_kwargs={"enable_thinking": False})
    prompt = renderer.render(conversation).token_ids
    async with TransformersEngine.from_folder(untrained_policy, device="cpu") as engine:
        for seed in range(4):
            for demand in (Demand("required", max_calls=2), Demand(schema=parameters)):
                grammar = constraints.grammar(conversation, prompt, demand)
                sampling = SamplingParams(
                    max_new_tokens=300, seed=seed, grammar=grammar, stop_token_ids=renderer.stop_token_ids
                )
                generation = await engine.generate(GenerationRequest(f"{seed}{demand}", prompt, sampling))
                assert generation.finish_reason == FinishReason.STOP
                items = renderer.parse(generation.token_ids, prompt=prompt, tools=tools).items
                if demand.schema is not None:
                    assert isinstance(items[0], Message)
                    jsonschema.validate(json.loads(items[0].text), parameters)
                    continue
                assert 1 <= len(items) <= 2
                for call in items:
                    assert isinstance(call, FunctionCall)
                    empty = {"type": "object", "maxProperties": 0}
                    schema = parameters if call.name == "measure" else empty
                    jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("name", ["tiny", "qwen3", "gptoss", "glm4moe"])
def test_text_without_calls_is_free(name: str) -> None:
    conversation = with_tool({"type": "object", "properties": {"a": {"type": "integer"}}})
    renderer, prompt, grammar = grammar_of(name, conversation, Demand())
    speech = Speech(renderer)
    said = speech.say(conversation, prompt, Turn("It is <b>4</b>, {} and [f()]."))
    assert accepts(renderer, grammar, said)
    called = speech.say(conversation, prompt, Turn("", calls=[("f", {"a": 1})]))
    assert not accepts(renderer, grammar, called)
    for seed in range(10):
        parsed = renderer.parse(walk(renderer, grammar, seed), prompt=prompt, tools=conversation.tools)
        assert not any(isinstance(item, FunctionCall) for item in parsed.items)
