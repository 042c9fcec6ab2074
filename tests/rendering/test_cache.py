"""Renderings that are remembered: the same ids, never those of another conversation."""

from __future__ import annotations

import pytest

from backends.rendering import TemplateRenderer
from backends.rendering.cache import RenderCache
from backends.rendering.renderer import Conversation, Rendered
from backends.tiny.tokenizer import build_tokenizer
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionTool, Message, as_items
from gym_sdk.tokens import CallTokens

ADD = FunctionTool(name="add", description="Add.", parameters={"type": "object", "properties": {}})


class Counting:
    """Renders a conversation to as many tokens as it has items, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, conversation: Conversation) -> Rendered:
        self.count += 1
        return Rendered([7] * len(conversation.items), lambda: [0] * len(conversation.items))


def said(*texts: str) -> Conversation:
    return Conversation([Message(role="user", content=text) for text in texts])


def test_the_same_conversation_is_rendered_once() -> None:
    render = Counting()
    cache = RenderCache(render)
    first, second = cache.render(said("a", "b"), {}), cache.render(said("a", "b"), {})
    assert render.count == 1
    assert first.token_ids == second.token_ids == [7, 7]
    assert first.owners == second.owners == [0, 0]
    first.token_ids.append(8)
    assert cache.render(said("a", "b"), {}).token_ids == [7, 7]


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (said("b"), {}),
        (said("a", ""), {}),
        (Conversation(as_items([{"role": "system", "content": "a"}])), {}),
        (Conversation(as_items([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}])), {}),
        (Conversation(said("a").items, (ADD,)), {}),
        (Conversation(said("a").items, (), "Be brief."), {}),
        (said("a"), {"enable_thinking": False}),
        (said("a"), {"enable_thinking": object()}),  # no JSON
    ],
)
def test_another_conversation_is_not_taken_for_it(other: Conversation, settings: dict[str, object]) -> None:
    render = Counting()
    cache = RenderCache(render)
    cache.render(said("a"), {})
    cache.render(other, settings)
    assert render.count == 2


def test_tokens_that_items_carry_do_not_matter() -> None:
    render = Counting()
    cache = RenderCache(render)
    answer = Message(role="assistant", content="b")
    cache.render(Conversation([answer]), {})
    cache.render(Conversation([answer.with_tokens(CallTokens([1], [2], [-0.5]))]), {})
    assert render.count == 1


def test_the_least_recently_used_go_first() -> None:
    render = Counting()
    cache = RenderCache(render, max_tokens=4)
    for texts in ("ab", "cd", "ab", "ef"):
        cache.render(said(*texts), {})
    assert (len(cache), cache.tokens, render.count) == (2, 4, 3)
    cache.render(said(*"ab"), {})
    assert render.count == 3
    cache.render(said(*"cd"), {})
    assert render.count == 4
    cache.render(said(*"too long"), {})
    assert (len(cache), cache.tokens) == (2, 4)


def test_refusals_are_not_remembered() -> None:
    answers = [PolicyError("no"), Rendered([7])]

    def render(conversation: Conversation) -> Rendered:
        answer = answers.pop(0)
        if isinstance(answer, PolicyError):
            raise answer
        return answer

    cache = RenderCache(render)
    with pytest.raises(PolicyError):
        cache.render(said("a"), {})
    assert cache.render(said("a"), {}).token_ids == [7]


def test_a_template_that_tells_the_time_is_rendered_anew() -> None:
    tokenizer = build_tokenizer(1024)
    tokenizer.chat_template = "{{ strftime_now('%f') }}" + str(tokenizer.chat_template)
    renderer = TemplateRenderer(tokenizer)
    prompts = {tuple(renderer.render(said("a")).token_ids) for _ in range(20)}
    assert len(prompts) > 1
