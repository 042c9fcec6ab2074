"""The prefix rule: what is known, what is proven, and why a prompt forks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.replay import ReplayEngine

from backends.memory import CallMemory
from backends.policy import Policy
from backends.prefix import Thinking
from backends.rendering import TemplateRenderer
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, ResponseRequest
from gym_sdk.tokens import TokenReport, merge_calls

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "q"}
GO_ON = {"role": "user", "content": "go on"}
THOUGHT = "<think>\nhm\n</think>\n\nyes<|im_end|>"


@pytest.fixture(scope="module")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy)


@pytest.fixture
def make_policy(renderer: TemplateRenderer) -> Callable[..., Policy]:
    def make(*says: str | list[int], thinking: Thinking = "keep", max_tokens: int = 10**6) -> Policy:
        generations = [renderer.encode(text) if isinstance(text, str) else text for text in says]
        memory = CallMemory(max_tokens)
        return Policy(ReplayEngine(generations), renderer, memory=memory, thinking=thinking)

    return make


async def ask(policy: Policy, items: Sequence[Any], scope: str = "", **fields: Any) -> Response:
    request = ResponseRequest.model_validate({"input": list(items), **fields})
    return await policy.respond(request, scope=scope)


def echo(response: Response, *drop: str, form: Any = "response") -> list[dict[str, Any]]:
    """Return the output as an agent sends it back, without some of its fields."""
    items = response.in_form(form)["output"]
    return [{name: value for name, value in item.items() if name not in drop} for item in items]


def extends(later: Response, earlier: Response) -> bool:
    assert later.tokens is not None
    assert earlier.tokens is not None
    return later.tokens.parent is earlier.tokens


def spelled(renderer: TemplateRenderer, text: str) -> list[int]:
    """Return the ids of a text, letter by letter."""
    return [token for letter in text for token in renderer.encode(letter)] + renderer.encode("<|im_end|>")


async def test_an_agent_that_drops_all_ids_is_known_by_what_it_says(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>", "well<|im_end|>")
    first = await ask(policy, [USER])
    second = await ask(policy, [USER, *echo(first, "id", "status"), GO_ON])
    assert extends(second, first)
    assert policy.stats.bridges == 1


async def test_thinking_that_an_agent_drops_is_kept(make_policy: Any) -> None:
    policy = make_policy(THOUGHT, THOUGHT, "done<|im_end|>")
    first = await ask(policy, [USER])
    assert [item.type for item in first.output] == ["reasoning", "message"]
    spoken = [echo(first, "id")[-1], GO_ON]
    second = await ask(policy, [USER, *spoken])
    assert second.fork is None
    assert extends(second, first)
    third = await ask(policy, [USER, *spoken, echo(second, "id")[-1], GO_ON])
    assert extends(third, second)
    # dropped in one turn, kept in the other: still the same conversation
    fourth = await ask(make_policy("x<|im_end|>"), [USER])
    assert fourth.fork is None


async def test_thinking_of_another_content_is_another_history(make_policy: Any) -> None:
    policy = make_policy(THOUGHT, "no<|im_end|>")
    first = await ask(policy, [USER])
    thought, said = echo(first)
    thought["content"][0]["text"] = "other"
    second = await ask(policy, [USER, thought, said, GO_ON])
    assert "edited since" in str(second.fork)


async def test_thinking_that_the_template_drops_forks_if_asked(make_policy: Any) -> None:
    policy = make_policy(THOUGHT, "no<|im_end|>", thinking="template")
    first = await ask(policy, [USER])
    second = await ask(policy, [USER, *echo(first), GO_ON])
    assert second.fork == "the chat template drops the thinking of earlier turns"
    plain = make_policy("yes<|im_end|>", "no<|im_end|>", thinking="template")
    first = await ask(plain, [USER])
    assert (await ask(plain, [USER, *echo(first), GO_ON])).fork is None


async def test_generations_that_read_alike_are_told_apart_by_their_ids(
    renderer: TemplateRenderer, make_policy: Any
) -> None:
    one, other = spelled(renderer, "yes"), renderer.encode("yes<|im_end|>")
    policy = make_policy(one, other, *["ok<|im_end|>"] * 3)
    first, second = await ask(policy, [USER]), await ask(policy, [USER])
    assert extends(await ask(policy, [USER, *echo(first), GO_ON]), first)
    assert extends(await ask(policy, [USER, *echo(second), GO_ON]), second)
    nameless = await ask(policy, [USER, *echo(second, "id"), GO_ON])
    assert nameless.fork == "2 remembered generations read like input[1]"


async def test_generations_with_equal_tokens_need_no_ids(make_policy: Any) -> None:
    policy = make_policy(*["yes<|im_end|>"] * 3)
    await ask(policy, [USER])
    first = await ask(policy, [USER])
    assert (await ask(policy, [USER, *echo(first, "id"), GO_ON])).fork is None


async def test_scopes_do_not_see_each_other(renderer: TemplateRenderer, make_policy: Any) -> None:
    one, other = spelled(renderer, "yes"), renderer.encode("yes<|im_end|>")
    policy = make_policy(one, other, "a<|im_end|>", "b<|im_end|>")
    first, second = await ask(policy, [USER], "x"), await ask(policy, [USER], "y")
    assert extends(await ask(policy, [USER, *echo(first, "id"), GO_ON], "x"), first)
    assert extends(await ask(policy, [USER, *echo(first, "id"), GO_ON], "y"), second)


async def test_a_foreign_message_right_after_a_sampled_turn_is_new_text(
    renderer: TemplateRenderer, make_policy: Any
) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>", "fine<|im_end|>")
    first = await ask(policy, [USER])
    note = {"role": "assistant", "content": "a note of the agent"}
    second = await ask(policy, [USER, *echo(first), note, GO_ON])
    assert extends(second, first)
    assert second.tokens is not None
    tail = renderer.decode(second.tokens.new_prompt_ids)
    assert tail.startswith("\n<|im_start|>assistant\na note of the agent<|im_end|>\n<|im_start|>user")
    third = await ask(policy, [USER, *echo(first), note, GO_ON, *echo(second), note, GO_ON])
    assert extends(third, second)


async def test_the_same_history_asked_again_opens_another_turn(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>", "again<|im_end|>")
    first = await ask(policy, [USER])
    assert extends(await ask(policy, [USER, *echo(first)]), first)


def edited(items: list[Any]) -> list[Any]:
    items[1]["content"][0]["text"] = "edited"
    return items


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda items: [{"role": "user", "content": "another"}, *items[1:]],
            "the history before it was edited",
        ),
        (edited, "it was edited since"),
        (lambda items: items[1:], "the history before it was edited"),
        (
            lambda items: [{"role": "user", "content": "summary: q, yes"}, items[1], items[2]],
            "was edited since",
        ),
    ],
    ids=["question", "answer", "truncated", "summarised"],
)
@pytest.mark.parametrize("form", ["item", "response"])
async def test_an_edited_history_forks_and_says_why(
    renderer: TemplateRenderer, make_policy: Any, change: Any, reason: str, form: str
) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>", "fine<|im_end|>")
    first = await ask(policy, [USER])
    history = change([USER, *echo(first, form=form), GO_ON])
    second = await ask(policy, history)
    assert second.fork is not None
    assert reason in second.fork or (form == "item" and "not proven" in second.fork)
    assert policy.stats.forks == 1
    calls = [response.tokens for response in (first, second) if response.tokens is not None]
    assert len(merge_calls(calls)) == 2
    # after the fork, the conversation goes on from it
    third = await ask(policy, [*history, *echo(second, form=form), GO_ON])
    assert extends(third, second)


@pytest.mark.parametrize("ids", [True, False])
async def test_a_later_turn_that_was_edited_forks_from_the_one_before(make_policy: Any, ids: bool) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>", "fine<|im_end|>", "good<|im_end|>")
    drop = () if ids else ("id",)
    first = await ask(policy, [USER])
    second = await ask(policy, [USER, *echo(first, *drop), GO_ON])
    changed = echo(second, *drop)
    changed[0]["content"][0]["text"] = "edited"
    history = [USER, *echo(first, *drop), GO_ON, *changed, GO_ON]
    third = await ask(policy, history)
    assert third.fork == (
        "input[3] was sampled here, and it was edited since"
        if ids
        else "input[3] stands where the policy was asked, and is not what it said"
    )
    assert extends(third, first)  # what was sampled before it is still not tokenized again
    assert policy.stats.forks == 1
    calls = [response.tokens for response in (first, second, third) if response.tokens is not None]
    assert len(merge_calls(calls)) == 2
    report = TokenReport.of(calls, reasons=[None, None, third.fork])
    assert (len(report.forks), report.unreported_forks) == (1, 0)
    fourth = await ask(policy, [*history, *echo(third, *drop), GO_ON])
    assert (extends(fourth, third), fourth.fork) == (True, None)


async def test_tokens_that_are_not_proven_fork_from_what_is(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>", "fine<|im_end|>")
    first = await ask(policy, [USER])
    second = await ask(policy, [USER, *echo(first, form="item"), GO_ON])
    wrong = echo(second, "id", form="item")
    wrong[0]["content"][0]["text"] = "edited"
    third = await ask(policy, [USER, *echo(first, form="item"), GO_ON, *wrong, GO_ON])
    assert "the generation does not read as the items" in str(third.fork)
    assert extends(third, first)


@pytest.mark.parametrize(
    "fields",
    [{"instructions": "Be brief."}, {"chat_template_kwargs": {"enable_thinking": False}}],
    ids=["instructions", "template settings"],
)
async def test_changed_settings_fork(make_policy: Any, fields: dict[str, Any]) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>")
    first = await ask(policy, [USER])
    second = await ask(policy, [USER, *echo(first), GO_ON], **fields)
    assert second.fork == "the instructions, tools or template settings changed"


async def test_few_shot_examples_are_no_fork(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>")
    shots = [USER, {"role": "assistant", "content": "an example"}, USER]
    assert (await ask(policy, shots)).fork is None


async def test_a_forgotten_call_is_a_reported_fork(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>", "no<|im_end|>", "ok<|im_end|>", max_tokens=1)
    first = await ask(policy, [USER])
    await ask(policy, [GO_ON])  # pushes the first out
    second = await ask(policy, [USER, *echo(first), GO_ON])
    assert second.fork == "input[1] was sampled here, but its tokens are not remembered any more"
    calls = [response.tokens for response in (first, second) if response.tokens is not None]
    report = TokenReport.of(calls, reasons=[None, second.fork])
    assert report.unreported_forks == 0


async def test_previous_response_id_continues_without_the_history(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>", "ok<|im_end|>", "fine<|im_end|>", "other<|im_end|>")
    first = await ask(policy, [USER], instructions="Be kind.")
    fields = {"instructions": "Be kind."}
    second = await ask(policy, [GO_ON], previous_response_id=first.id, **fields)
    third = await ask(policy, [GO_ON], previous_response_id=second.id, **fields)
    assert extends(second, first)
    assert extends(third, second)
    assert third.previous_response_id == second.id
    branch = await ask(policy, [USER], previous_response_id=first.id, **fields)
    assert extends(branch, first)


async def test_settings_are_taken_over_only_if_asked(make_policy: Any) -> None:
    policy = make_policy(*["yes<|im_end|>"] * 4)
    first = await ask(policy, [USER], instructions="Be kind.")
    request = ResponseRequest.model_validate({"input": [GO_ON], "previous_response_id": first.id})
    assert extends(await policy.respond(request, inherit=True), first)
    forked = await policy.respond(request)
    assert forked.fork == "the instructions, tools or template settings changed"


async def test_an_unknown_previous_response_is_a_typed_miss(make_policy: Any) -> None:
    policy = make_policy("yes<|im_end|>")
    first = await ask(policy, [USER])
    for name in ("resp_unknown", first.output[0].id):  # type: ignore[union-attr]
        with pytest.raises(PolicyError, match="send the whole history") as caught:
            await ask(policy, [GO_ON], previous_response_id=name)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"
