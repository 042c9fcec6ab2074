"""Rehearsals: conversations in the template's own words, and what they tell of a template."""

from __future__ import annotations

import random

import pytest
from support.template_tokenizers import renderers
from support.trained import byte_level_tokenizer

from backends.prefix import Step
from backends.rehearsal import Scenario, check, rehearse
from backends.rendering import TemplateRenderer
from backends.rendering.renderer import Conversation
from backends.speech import Speech, Turn
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Message

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = Conversation([Message(role="user", content="a")])


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "mistral", "tiny", "lfm2_v2"])
def test_a_family_that_is_read_has_no_problems(name: str) -> None:
    found = check(renderers()[name])
    assert found.problems == []
    assert found.takes_tools
    assert str(found).startswith("plain bridge, tools bridge, parallel bridge, ")
    assert str(found).endswith(f"; parser {renderers()[name].parser.name}")


def test_bridged_prompts_are_the_template_s_own_where_those_extend() -> None:
    play = rehearse(renderers()["qwen2_5"], Scenario.TOOLS)
    assert (play.breaks, play.agrees, play.drifts) == (0, True, 0)


def test_a_parser_that_does_not_read_the_calls_is_a_problem() -> None:
    qwen = renderers()["qwen3"].template
    tokenizer = byte_level_tokenizer(["<tool_call>", "</tool_call>"], template=qwen.source)
    found = check(TemplateRenderer(tokenizer, parser="none"))
    assert found.problems == ["tools: the parser 'none' does not read calls as the template writes them"]
    play = rehearse(TemplateRenderer(tokenizer, parser="none"), Scenario.TOOLS)
    assert play.unread
    assert play.summary == "refused"


def test_a_template_that_closes_no_turns_is_a_problem() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = check(TemplateRenderer(byte_level_tokenizer(template=source)))
    assert found.problems == [
        "plain: the template ends a turn with no stop token",
        "truncated: the template ends a turn with no stop token",
    ]


def test_bridged_prompts_that_differ_from_the_template_s_are_a_problem() -> None:
    late = "m.role == 'user' and not loop.first and 'What' in messages[0].content"
    marked = "{{ m.role }}{{ '!' if " + late + " else '' }}"
    opened = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    renderer = TemplateRenderer(byte_level_tokenizer(template=PLAIN.replace("{{ m.role }}", marked) + opened))
    play = rehearse(renderer, Scenario.PLAIN)
    assert (play.agrees, play.drifts) == (False, 0)
    assert "plain: bridged prompts differ from the template's own" in check(renderer).problems


@pytest.mark.parametrize("name", ["gptoss", "llama3_1"])
def test_parallel_calls_that_a_template_cannot_write_are_not_blamed_on_the_parser(name: str) -> None:
    play = rehearse(renderers()[name], Scenario.PARALLEL)
    assert play.refused is not None
    assert not play.unread
    assert "does not write the call" in play.refused or "single tool-calls" in play.refused


def test_tools_that_a_template_does_not_show_are_described() -> None:
    renderer = renderers()["deepseekv3"]
    assert not renderer.template.abilities.tools
    assert rehearse(renderer, Scenario.TOOLS).summary == "bridge"


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "nemotron_3_nano"])
def test_noise_changes_nothing(name: str) -> None:
    for seed in range(8):
        for scenario in (Scenario.PLAIN, Scenario.TOOLS, Scenario.THINKING, Scenario.FOREIGN):
            play = rehearse(renderers()[name], scenario, rng=random.Random(seed))
            assert (play.summary, play.drifts) == ("bridge", 0)


def test_the_same_seed_plays_the_same() -> None:
    plays = [rehearse(renderers()["qwen3"], Scenario.TOOLS, rng=random.Random(3)) for _ in range(2)]
    assert plays[0] == plays[1]


def test_an_edited_history_forks_once() -> None:
    play = rehearse(renderers()["qwen3"], Scenario.EDITED)
    assert play.steps == [Step.START, Step.FORK, Step.BRIDGE]


def test_texts_for_calls_spell_no_special_tokens() -> None:
    renderer = renderers()["qwen3"]
    speech = Speech(renderer, random.Random(0))
    drawn = [speech.text("plain", literal=False) for _ in range(200)]
    assert not any(renderer.special.occur_in(text) for text in drawn)
    assert any(renderer.special.occur_in(speech.text("plain")) for _ in range(200))


def test_thinking_does_not_hide_the_token_that_ends_a_turn() -> None:
    renderer = renderers()["glm4moe"]
    prompt = renderer.render(ASKED).token_ids
    ids = Speech(renderer).say(ASKED, prompt, Turn("Yes.", thinking="Hm."))
    assert renderer.decode(ids).endswith("</think>\nYes.<|user|>")


def test_a_turn_without_its_end_has_no_stop_token() -> None:
    renderer = renderers()["qwen3"]
    prompt = renderer.render(ASKED).token_ids
    ids = Speech(renderer).say(ASKED, prompt, Turn("One, two, three"), cut=True)
    assert not renderer.stop_token_ids & {*ids}


def test_a_turn_that_the_template_cannot_write_is_refused() -> None:
    renderer = TemplateRenderer(byte_level_tokenizer(template=PLAIN))
    speech = Speech(renderer)
    with pytest.raises(PolicyError, match="no place for thinking"):
        speech.say(ASKED, [], Turn("Yes.", thinking="Hm."))
    with pytest.raises(PolicyError, match="does not write the call of 'f'"):
        speech.say(ASKED, [], Turn("", calls=[("f", {})]))
