"""Hand-written renderers of families: bridges extend, parsing loses nothing, what is missing is said."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parsed import shown
from support.templates import trl_templates
from support.trained import byte_level_tokenizer

from backends.rendering import TemplateRenderer
from backends.rendering.families import FamilyRenderer, family_names, family_of, make_family_renderer
from backends.rendering.families.marks import words
from backends.rendering.renderer import Conversation
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import FunctionCall, FunctionCallOutput, FunctionTool, Item, Message, Reasoning

_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>")
_KIMI = tuple(f"<|im_{name}|>" for name in ("user", "assistant", "system", "middle", "end"))
_SECTION = tuple(
    f"<|tool_{name}|>"
    for name in ("calls_section_begin", "calls_section_end", "call_begin", "call_end", "call_argument_begin")
)
_ARGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_BAR = "\uff5c"
_HY3 = (
    *("|hy_begin_of_sentence", "|hy_eos", "|hy_User", "|hy_Assistant", "|reasoning_mode"),
    *("think", "/think", "tool_calls", "/tool_calls", "tool_call", "/tool_call", "tool_sep"),
    *("arg_key", "/arg_key", "arg_value", "/arg_value"),
    *("tool_responses", "/tool_responses", "tool_response", "/tool_response"),
)
MARKS: dict[str, tuple[str, ...]] = {
    "qwen3": ("<|endoftext|>", *_THINK, *_CALL, "<tool_response>", "</tool_response>"),
    "gemma4": (
        *("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>'),
        *("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"),
    ),
    "glm-4.5": (
        *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        *(*_THINK, *_CALL, *_ARGS),
    ),
    "minimax-m2": (
        *("]~!b[", "]~b]", "[e~[", *_THINK),
        *("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    "kimi-k2": (*_KIMI, *_SECTION),
    "kimi-k2.5": (
        *(*_KIMI, *_SECTION, *_THINK, "<|endoftext|>"),
        *(f"<|media_{name}|>" for name in ("begin", "content", "end", "pad")),
    ),
    "hy3": tuple(
        f"<{name}:opensource{name[0] if name[0] == '|' else ''}>".replace("|", _BAR) for name in _HY3
    ),
    "inkling": (
        *("<|message_user|>", "<|message_model|>", "<|message_system|>", "<|message_tool|>"),
        *("<|content_text|>", "<|content_thinking|>", "<|content_image|>", "<|content_audio_input|>"),
        *("<|content_xml|>", "<|content_invoke_tool_json|>", "<|content_invoke_tool_text|>"),
        *("<|content_model_end_sampling|>", "<|end_message|>", "<|audio_end|>", "<|endoftext|>"),
        *("<|unused_200053|>", "<|unused_200054|>"),
    ),
    "laguna-xs.2": ("〈|EOS|〉", "<assistant>", "</assistant>", *_THINK, *_CALL),
    "deepseek-v4": (
        *(
            f"<{_BAR}{name}{_BAR}>"
            for name in (
                *("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "latest_reminder"),
                *("action", "query", "authority", "domain", "title", "read_url"),
            )
        ),
        *(f"{_BAR}DSML{_BAR}", *_THINK),
    ),
}
ADD = FunctionTool(
    name="add",
    description="Add.",
    parameters={"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
)


@cache
def family(name: str) -> FamilyRenderer:
    tokenizer: Any = byte_level_tokenizer(MARKS[name])
    tokenizer.name_or_path = f"local/{name}"
    return make_family_renderer(name, tokenizer)


def message(role: Any, text: str) -> Message:
    return Message(role=role, content=text)


def sampled(name: str, turn: dict[str, Any], follower: dict[str, Any]) -> list[int]:
    """Return the ids that a policy of the family samples for a turn, the stop token included."""
    renderer = family(name)
    package = renderer._variant(Conversation(())).renderer
    user = {"role": "user", "content": "."}
    rendered = package.render([user, {"role": "assistant", **turn}, follower])
    parts = zip(rendered.token_ids, rendered.message_indices, rendered.sampled_mask, strict=True)
    ids = [token for token, index, own in parts if index == 1 and own]
    if name == "minimax-m2":  # its prompts open the thinking
        ids = [*renderer.encode("Hm.\n</think>\n\n"), *ids]
    stops = package.get_stop_token_ids()
    return ids if ids[-1] in stops else [*ids, stops[0]]


def say(name: str, text: str) -> list[int]:
    return sampled(name, {"content": text}, {"role": "user", "content": "."})


def call(name: str, numbers: Sequence[int]) -> list[int]:
    calls = [
        {
            "id": f"functions.add:{index}",
            "type": "function",
            "function": {"name": "add", "arguments": {"a": number, "note": f"it's {number}"}},
        }
        for index, number in enumerate(numbers)
    ]
    output = {"role": "tool", "tool_call_id": "functions.add:0", "name": "add", "content": "."}
    return sampled(name, {"content": "", "tool_calls": calls}, output)


def outputs(items: Sequence[Item]) -> list[Item]:
    return [
        FunctionCallOutput(call_id=item.call_id, output=f"out of {item.call_id}")
        for item in items
        if isinstance(item, FunctionCall)
    ]


@pytest.mark.parametrize("name", MARKS)
def test_prompts_extend_what_was_sampled(name: str) -> None:
    renderer = family(name)
    items: list[Item] = [message("user", "Add, please.")]
    prompt = renderer.render(Conversation(items, [ADD], "Be brief.")).token_ids
    for generation, calls in (
        (call(name, [1]), 1),
        (call(name, [2] if name == "deepseek-v4" else [2, 3]), 1 if name == "deepseek-v4" else 2),
        (say(name, "It is done."), 0),
        (say(name, "You are welcome."), 0),
    ):
        known = [*prompt, *generation]
        parsed = renderer.parse(generation, prompt=prompt, tools=[ADD])
        assert sum(isinstance(item, FunctionCall) for item in parsed.items) == calls, shown(parsed.items)
        assert parsed.unparsed_calls == 0
        items += parsed.items
        start = len(items)
        items += outputs(parsed.items) or [message("user", "Thank you.")]
        conversation = Conversation(items, [ADD], "Be brief.")
        bridge = renderer.bridge(known, conversation, start)
        assert bridge.token_ids is not None, bridge.reason
        assert bridge.token_ids[: len(known)] == known
        tail = renderer.decode(bridge.token_ids[len(known) :])
        assert renderer.decode(renderer.render(conversation).token_ids).endswith(tail)
        prompt = bridge.token_ids


@pytest.mark.parametrize("name", MARKS)
def test_a_generation_that_was_cut_off_is_extended_or_refused(name: str) -> None:
    renderer = family(name)
    items: list[Item] = [message("user", "Hi."), message("assistant", "It is"), message("user", "Go on.")]
    known = [*renderer.render(Conversation(items[:1])).token_ids, *renderer.encode("It is")]
    bridge = renderer.bridge(known, Conversation(items), 2)
    assert bridge.token_ids is not None, bridge.reason
    assert bridge.token_ids[: len(known)] == known


@pytest.mark.parametrize("name", MARKS)
def test_what_cannot_be_extended_has_a_reason(name: str) -> None:
    renderer = family(name)
    items = [message("user", "Hi."), message("assistant", "Yes."), message("assistant", "Not mine.")]
    known = [*renderer.render(Conversation(items[:1])).token_ids, *say(name, "Yes.")]
    conversation = Conversation([*items, message("user", "So?")])
    assert "assistant items" in (renderer.bridge(known, conversation, 2).reason or "")
    assert "no new items" in (renderer.bridge(known, conversation, 4).reason or "")
    assert "generation prompt" in (renderer.bridge(renderer.encode("So?"), conversation, 3).reason or "")
    assert renderer.splice(known, conversation, 2).token_ids is None
    assert renderer.splice(known, conversation, 2).reason


@cache
def chunks(name: str) -> st.SearchStrategy[list[int]]:
    renderer = family(name)
    pieces = [renderer.encode(mark) for mark in MARKS[name]]
    pieces += [renderer.encode(text) for text in WORDS]
    pieces += [call(name, [1]), call(name, [1])[:-1], call(name, [4, 5])[:-1], say(name, "Yes, 5.")]
    numbers = st.integers(0, max(chain.from_iterable(pieces))).map(lambda number: [number])
    return st.lists(st.one_of(numbers, st.sampled_from(pieces)), max_size=12).map(
        lambda parts: list(chain.from_iterable(parts))
    )


WORDS = (
    '{"name": "add", "arguments": {"a":1,  "note": "x"}}',
    '{"name": "add", "arguments": {"a": 1}, "why": "because"}',
    '<invoke name="add">\n<parameter name="a">1</parameter>\nbetween\n</invoke>',
    "call:add{a:1,note:free}",
    "functions.add:0",
    "add\n",
    "thought\n",
    "東京 Größe",
    "[" * 1_500,
    '{"a": "\\ud800"}',
    " \n",
)
MARKUP = words(
    "think thought channel function arg_key arg_value tool_call tool_calls invoke parameter name arguments"
    " args call functions opensource tool_sep minimax DSML \uff5c string true false"
)


@pytest.mark.parametrize("name", MARKS)
def test_any_ids_parse_and_nothing_is_lost(name: str) -> None:
    renderer = family(name)

    @settings(deadline=None)  # the package reads DeepSeek V4's markup in quadratic time
    @given(ids=chunks(name), prompted=st.booleans(), offered=st.booleans())
    def check(ids: list[int], prompted: bool, offered: bool) -> None:
        tools = [ADD] if offered else []
        prompt = renderer.render(Conversation([message("user", "Hi.")], tools)).token_ids if prompted else []
        parsed = renderer.parse(ids, prompt=prompt, tools=tools)
        assert parsed.items
        assert shown(parsed.items) == shown(renderer.parse(ids, prompt=prompt, tools=tools).items)
        kept: set[str] = set(MARKUP)
        for item in parsed.items:
            if isinstance(item, FunctionCall):
                arguments = json.loads(item.arguments)
                assert isinstance(arguments, dict)
                kept |= words(f"{item.name} {item.call_id} {item.arguments} {list(_values(arguments))}")
                kept |= set(chain.from_iterable(words(str(value)) for value in _values(arguments)))
            else:
                assert isinstance(item, Message | Reasoning)
                kept |= words(item.text)
        sampled_text = renderer.decode(ids)
        for mark in renderer._encoder.special.ids:
            sampled_text = sampled_text.replace(mark, " ")
        assert words(sampled_text) - {"�"} <= kept

    check()


@pytest.mark.parametrize("name", MARKS)
def test_any_ids_are_extended_exactly_or_refused(name: str) -> None:
    renderer = family(name)
    asked, answered = message("user", "Hi."), message("assistant", "What?")
    called = FunctionCall(call_id="functions.add:0", name="add", arguments="{}")
    output = FunctionCallOutput(call_id="functions.add:0", output="5")

    @settings(deadline=None)  # the package reads DeepSeek V4's markup in quadratic time
    @given(ids=chunks(name), text=st.text(), tool=st.booleans())
    def check(ids: list[int], text: str, tool: bool) -> None:
        items = [asked, called, output] if tool else [asked, answered, message("user", text)]
        prompt = renderer.render(Conversation(items[:1], [ADD])).token_ids
        known = [*prompt, *ids]
        bridge = renderer.bridge(known, Conversation(items, [ADD]), 2)
        if bridge.token_ids is None:
            assert bridge.reason
        else:
            assert bridge.token_ids[: len(known)] == known
            assert len(bridge.token_ids) > len(known)

    check()


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *chain.from_iterable(map(_values, value.values()))]
    if isinstance(value, list):
        return list(chain.from_iterable(map(_values, value)))
    return [value]


def test_text_around_calls_keeps_its_place() -> None:
    renderer = family("qwen3")
    one = '<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>'
    two = '<tool_call>\n{"name": "add", "arguments": {"a": }}\n</tool_call>'
    text = f"<think>\nHm.\n</think>\n\nFirst {one} then {two} and {one} last.<|im_end|>"
    parsed = renderer.parse(renderer.encode(text), tools=[ADD])
    assert shown(parsed.items) == [
        ("think", "Hm."),
        ("text", "First"),
        ("call", "add", '{"a":1}'),
        ("text", f"then {two} and"),
        ("call", "add", '{"a":1}'),
        ("text", "last."),
    ]
    assert parsed.unparsed_calls == 1
    assert parsed.reasoning_tokens == len(renderer.encode("<think>\nHm."))


def test_what_the_package_drops_from_a_call_makes_it_text() -> None:
    renderer = family("minimax-m2")
    invoke = '<invoke name="add">\n<parameter name="a">1</parameter>\n</invoke>'
    good = renderer.encode(f"<minimax:tool_call>\n{invoke}\n{invoke}\n</minimax:tool_call>[e~[")
    assert shown(renderer.parse(good, tools=[ADD]).items) == [("call", "add", '{"a": 1}')] * 2
    bad = f"<minimax:tool_call>\n{invoke}\nsecretly\n{invoke}\n</minimax:tool_call>"
    parsed = renderer.parse(renderer.encode(bad + "[e~["), tools=[ADD])
    assert shown(parsed.items) == [("text", bad)]
    assert parsed.unparsed_calls == 1


@pytest.mark.parametrize(
    ("name", "switches", "text"),
    [
        ("qwen3", {}, "<think>\nHm.\n</think>\n\nHi."),
        ("hy3", {"reasoning_effort": "high"}, "Hm.</think:opensource>Hi."),
        ("deepseek-v4", {"enable_thinking": True}, "Hm.</think>Hi."),
        ("laguna-xs.2", {"enable_thinking": True}, "Hm.\n</think>\nHi."),
        ("minimax-m2", {}, "Hm.\n</think>\n\nHi."),
        ("gemma4", {"enable_thinking": True}, "<|channel>thought\nHm.\n<channel|>Hi."),
    ],
)
def test_thinking_is_read_wherever_it_was_opened(name: str, switches: dict[str, Any], text: str) -> None:
    renderer = make_family_renderer(name, byte_level_tokenizer(MARKS[name]), template_kwargs=switches)
    items = [message("user", "So?"), message("assistant", "Hi."), message("user", "Go on.")]
    prompt = renderer.render(Conversation(items[:1])).token_ids
    parsed = renderer.parse(renderer.encode(text), prompt=prompt)
    assert shown(parsed.items) == [("think", "Hm."), ("text", "Hi.")]
    cut = text.partition("Hm.")[0] + "Hm."
    parsed = renderer.parse(renderer.encode(cut), prompt=prompt)
    assert shown(parsed.items) == [("think", "Hm.")]
    known = [*prompt, *renderer.encode(cut)]
    bridge = renderer.bridge(known, Conversation(items), 2)
    assert bridge.token_ids is not None
    assert bridge.token_ids[: len(known)] == known


def test_a_parser_that_fails_leaves_everything_text(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = make_family_renderer("qwen3", byte_level_tokenizer(MARKS["qwen3"]))
    package = renderer._variant(Conversation(())).renderer
    monkeypatch.setattr(type(package), "parse_response", lambda *_, **__: 1 / 0)
    parsed = renderer.parse(renderer.encode("Yes <tool_call> no<|im_end|>"))
    assert shown(parsed.items) == [("text", "Yes <tool_call> no")]
    assert parsed.unparsed_calls == 1


def test_owners_are_items() -> None:
    renderer = family("qwen3")
    items: list[Item] = [
        message("user", "one"),
        message("assistant", "two"),
        FunctionCall(call_id="c", name="add", arguments="{}"),
        FunctionCallOutput(call_id="c", output="three"),
    ]
    rendered = renderer.render(Conversation(items, [ADD], "zero"))
    texts: dict[int, list[int]] = {}
    for token, owner in zip(rendered.token_ids, rendered.owners, strict=True):
        texts.setdefault(owner, []).append(token)
    said = {owner: renderer.decode(ids) for owner, ids in texts.items()}
    assert set(said) == {-1, 0, 1, 3}
    assert "zero" in said[-1]
    assert said[-1].endswith("<|im_start|>assistant\n")
    assert [word in said[owner] for owner, word in ((0, "one"), (1, "two"), (1, "add"), (3, "three"))]


@pytest.mark.parametrize("roles", ["u", "uau", "suau", "uauau"])
def test_qwen3_writes_what_its_template_writes(roles: str) -> None:
    tokenizer = byte_level_tokenizer(MARKS["qwen3"], template=trl_templates()["qwen3"])
    own, theirs = make_family_renderer("qwen3", tokenizer), TemplateRenderer(tokenizer)
    names = {"u": "user", "a": "assistant", "s": "system"}
    items: list[Item] = [message(names[role], f"text {index}") for index, role in enumerate(roles)]
    for tools in ([], [ADD]):
        conversation = Conversation(items, tools)
        assert own.render(conversation).token_ids == theirs.render(conversation).token_ids
    assert own.deviation() is None
    assert own.stop_token_ids >= theirs.stop_token_ids


def test_a_template_of_another_family_is_noticed() -> None:
    tokenizer = byte_level_tokenizer(MARKS["qwen3"], template=trl_templates()["qwen2_5"])
    assert "the chat template writes" in (make_family_renderer("qwen3", tokenizer).deviation() or "")


def test_gemma4_writes_what_its_template_writes() -> None:
    tokenizer = byte_level_tokenizer(MARKS["gemma4"], template=trl_templates()["gemma4"])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert make_family_renderer("gemma4", tokenizer).deviation() is None


def test_thinking_is_kept_unless_the_template_is_to_decide() -> None:
    tokenizer = byte_level_tokenizer(MARKS["qwen3"])
    items = [message("user", "Hi."), message("assistant", "Yes."), message("user", "So?")]
    conversation = Conversation(items)
    keeping = make_family_renderer("qwen3", tokenizer)
    known = [*keeping.render(Conversation(items[:1])).token_ids, *say("qwen3", "Yes.")]
    assert keeping.bridge(known, conversation, 2).token_ids is not None
    assert keeping.drops_thinking(conversation, 2)
    leaving = make_family_renderer("qwen3", tokenizer, keep_thinking=False)
    assert "does not extend" in (leaving.bridge(known, conversation, 2).reason or "")
    gemma = byte_level_tokenizer(MARKS["gemma4"])
    assert make_family_renderer("gemma4", gemma, template_kwargs={"preserve_thinking": False})


def test_settings_of_a_request_count() -> None:
    renderer = family("qwen3")
    off = Conversation([message("user", "Hi.")], template_kwargs={"enable_thinking": False})
    assert renderer.decode(renderer.render(off).token_ids).endswith("<think>\n\n</think>\n\n")
    unknown = Conversation([message("user", "Hi.")], template_kwargs={"no_such": 1})
    with pytest.raises(PolicyError, match="no_such") as caught:
        renderer.render(unknown)
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(ConfigurationError, match="no_such"):
        make_family_renderer("qwen3", byte_level_tokenizer(MARKS["qwen3"]), template_kwargs={"no_such": 1})


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(PolicyError, match="cannot render") as caught:
        family("qwen3").render(Conversation([]))
    assert caught.value.param == "input"


def test_our_parser_reads_on_request() -> None:
    renderer = make_family_renderer("qwen3", byte_level_tokenizer(MARKS["qwen3"]), parser="hermes")
    assert renderer.parser.name == "hermes"
    assert family("qwen3").parser.name == "qwen3"
    parsed = renderer.parse(call("qwen3", [1]), tools=[ADD])
    assert [row[:2] for row in shown(parsed.items)] == [("call", "add")]


def test_families_are_found_by_exact_names_only(tmp_path: Path) -> None:
    assert family_of("Qwen/Qwen3-0.6B") == "qwen3"
    assert family_of("google/gemma-4-31B-it") == "gemma4"
    assert family_of("somebody/Qwen3-0.6B") is None
    assert family_of("/cache/models--zai-org--GLM-4.5-Air/snapshots/0123") == "glm-4.5"
    (tmp_path / "config.json").write_text('{"_name_or_path": "tencent/Hy3", "model_type": "hy_v3"}')
    assert family_of(tmp_path) == "hy3"
    assert family_of(str(tmp_path), {"model_type": "gemma4"}) is None
    (tmp_path / "config.json").write_text("[]")
    assert family_of(tmp_path) is None
    tokenizer = byte_level_tokenizer()
    tokenizer.name_or_path = "MiniMaxAI/MiniMax-M2"
    assert family_of(tokenizer) == "minimax-m2"


def test_mistakes_say_what_to_do() -> None:
    assert {"qwen3", "gemma4", "deepseek-v4"} <= set(family_names())
    with pytest.raises(ConfigurationError, match="choose one of deepseek-r1, "):
        make_family_renderer("qwen", byte_level_tokenizer())
    with pytest.raises(ConfigurationError, match="this tokenizer"):
        make_family_renderer("gemma4", byte_level_tokenizer())
    with pytest.raises(ConfigurationError, match="no parser"):
        make_family_renderer("qwen3", byte_level_tokenizer(MARKS["qwen3"]), parser="nope")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "renderers"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "renderers", None)
    importlib.import_module("backends.rendering.families")
    with pytest.raises(ConfigurationError, match=r"pip install 'gym-sdk\[renderers\]'"):
        make_family_renderer("qwen3", byte_level_tokenizer())
    with pytest.raises(ConfigurationError, match=r"gym-sdk\[renderers\]"):
        family_of("Qwen/Qwen3-0.6B")
