"""What a chat template takes, found out by trying: each ability with a template that has it or lacks it."""

from __future__ import annotations

from typing import Any

import pytest
from support.trained import byte_level_tokenizer

from backends.rendering.chat_template import Abilities, ChatTemplate
from gym_sdk.errors import ConfigurationError, PolicyError

USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %};{% endfor %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(byte_level_tokenizer(template=source))


def abilities(source: str) -> Abilities:
    return template(source).abilities


def calling(source: str, arguments: str = "c.function.arguments | tojson") -> Abilities:
    return abilities(CALLS.replace("CALL", source + "{{ c.function.name }}({{ " + arguments + " }})"))


def call(arguments: Any, call_id: str = "call_0123456789") -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    tool_calls = [{"id": call_id, "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def test_a_plain_template_takes_messages_and_outputs_but_no_calls_tools_or_thinking() -> None:
    found = abilities(PLAIN)
    assert (found.system, found.outputs, found.calls, found.tools) == (True, True, False, False)
    assert (found.parts, found.thinking_key, found.keep_thinking) == (False, None, None)


def test_a_template_that_refuses_system_messages_is_known() -> None:
    assert not abilities(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    ).system


def test_contents_become_parts_where_a_template_asks_for_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert abilities(source).parts
    assert template(source).render([USER]) == "hi"


def test_arguments_go_in_as_a_mapping_if_the_template_prints_them_as_json() -> None:
    assert calling("").call_arguments == "mapping"


def test_arguments_go_in_as_text_if_the_template_concatenates_them() -> None:
    found = calling("", "'' + c.function.arguments")
    assert (found.calls, found.call_arguments) == (True, "json")


def test_the_content_of_a_turn_that_only_calls_is_none_if_the_template_asks() -> None:
    check = "{% if m.content is string %}{{ raise_exception('no') }}{% endif %}"
    assert calling(check).call_content is None


def test_call_ids_are_shortened_where_nine_characters_are_asked_for() -> None:
    check = "{% if c.id | length != 9 %}{{ raise_exception('no') }}{% endif %}"
    assert calling(check).short_ids
    made = template(CALLS.replace("CALL", check + "{{ c.id }}"))
    one, other = made.render([USER, call({})]), made.render([USER, call({}, "call_another")])
    assert one != other
    assert one == made.render([USER, call({})])
    assert "abcdefghi" in made.render([USER, call({}, "abcdefghi")])


def test_tools_count_if_the_template_shows_them() -> None:
    assert abilities("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + PLAIN).tools


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thinking_reaches_the_field_that_the_template_reads(key: str) -> None:
    source = PLAIN.replace("{{ m.content }}", "{{ m." + key + " or '' }}{{ m.content }}")
    assert abilities(source).thinking_key
    turn = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert "hm" in template(source).render([USER, turn])


def test_a_switch_that_keeps_thinking_is_found() -> None:
    shown = "{% if clear_thinking is false or loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"
    assert abilities(PLAIN.replace("{{ m.content }}", shown)).keep_thinking == {"clear_thinking": False}


def test_a_switch_that_keeps_nothing_is_not_taken() -> None:
    shown = "{# clear_thinking #}{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"
    assert abilities(PLAIN.replace("{{ m.content }}", shown)).keep_thinking is None


def test_a_template_that_shows_no_user_message_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not render a user message"):
        template("nothing")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        ChatTemplate(byte_level_tokenizer())


@pytest.mark.parametrize(
    "failure", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ m.x.y.z }}", "{{ '' + 1 }}"]
)
def test_whatever_a_template_fails_with_is_a_policy_error(failure: str) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + failure
        + "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(PolicyError, match="cannot render this conversation"):
        template(source).render([USER, {"role": "assistant", "content": "a"}])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "continue_final_message"])
def test_a_request_cannot_set_what_is_no_setting_of_the_template(name: str) -> None:
    with pytest.raises(PolicyError, match="no setting of a chat template") as caught:
        template(PLAIN).render([USER], settings={name: "x"})
    assert caught.value.param == f"chat_template_kwargs.{name}"
