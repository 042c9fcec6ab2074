"""Completions: prompts of text and ids, continued as they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from support.capturing import Serve
from support.chatting import StepEngine, chunks_of, error_of, post
from support.held import HeldEngine, until

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.rendering.token_text import TokenText
from backends.server import make_app

pytestmark = pytest.mark.asyncio

FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs", "weight_versions")


async def complete(url: str, **body: Any) -> dict[str, Any]:
    """Return a completion that openai's own type takes."""
    status, answer = await post(f"{url}/completions", body)
    assert status == 200, answer
    Completion.model_validate(answer)
    completion: dict[str, Any] = answer
    return completion


def joined(chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the choices together as clients do."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        # openai's type knows no choice that goes on, but openai's own server sends them
        Completion.model_validate(
            {**chunk, "choices": [{**part, "finish_reason": part["finish_reason"] or "stop"}]}
        )
        known = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
        assert known["finish_reason"] is None, "a choice went on after its end"
        text, scores = known["text"] + part["text"], known["logprobs"]
        if part["logprobs"] is not None:
            scores = {
                name: [*(scores or {}).get(name, ()), *values] for name, values in part["logprobs"].items()
            }
        known |= {**part, "text": text, "logprobs": scores}
    return [choice for _, choice in sorted(choices.items())]


def rounded(choices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return choices whose scores differ by no more than rounding."""
    told = []
    for choice in choices:
        scores = choice["logprobs"]
        if scores is not None:
            top = [
                {name: round(value, 3) for name, value in entry.items()} for entry in scores["top_logprobs"]
            ]
            own = [round(value, 3) for value in scores["token_logprobs"]]
            scores = {**scores, "top_logprobs": top, "token_logprobs": own}
        sampled = [round(value, 3) for value in choice["generation_log_probs"]]
        told.append({**choice, "logprobs": scores, "generation_log_probs": sampled})
    return told


async def test_text_goes_on_after_the_prompt(chat_url: str, chat_policy: Policy) -> None:
    completion = await complete(chat_url, prompt="1 + 2 =", seed=1)
    (choice,) = completion["choices"]
    assert completion["id"].startswith("cmpl-")
    assert completion["system_fingerprint"] == "0"
    assert choice["prompt_token_ids"] == chat_policy.renderer.encode("1 + 2 =")
    generated = choice["generation_token_ids"]
    assert len(generated) == len(choice["generation_log_probs"]) <= 16
    assert choice["finish_reason"] == ("length" if len(generated) == 16 else "stop")
    assert choice["logprobs"] is None
    usage = completion["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        len(choice["prompt_token_ids"]),
        len(generated),
    )
    ids = await complete(chat_url, prompt=choice["prompt_token_ids"], seed=1)
    assert ids["choices"][0]["generation_token_ids"] == generated


async def test_each_prompt_has_its_choices(chat_url: str) -> None:
    completion = await complete(chat_url, prompt=["one", [5, 6, 7], "three"], n=2, seed=1, max_tokens=6)
    choices = completion["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    prompts = [choice["prompt_token_ids"] for choice in choices]
    assert prompts[0::2] == prompts[1::2]
    assert prompts[2] == [5, 6, 7]
    assert choices[0]["generation_token_ids"] != choices[1]["generation_token_ids"]
    usage = completion["usage"]
    assert usage["prompt_tokens"] == sum(map(len, prompts[0::2]))
    assert usage["completion_tokens"] == sum(len(choice["generation_token_ids"]) for choice in choices)
    alone = await complete(chat_url, prompt=[[5, 6, 7]], seed=2, max_tokens=6)
    assert alone["choices"][0]["generation_token_ids"] == choices[3]["generation_token_ids"]


async def test_special_tokens_count_in_prompts_and_are_hidden_in_texts(
    serve: Serve, renderer: TemplateRenderer
) -> None:
    url = await serve(["<|im_start|>hi<|im_end|>"] * 3)
    hidden = await complete(url, prompt="<|im_start|>user")
    assert hidden["choices"][0]["text"] == "hi"
    assert hidden["choices"][0]["finish_reason"] == "stop"
    assert hidden["choices"][0]["prompt_token_ids"] == renderer.encode("<|im_start|>user")
    shown = await complete(url, prompt="q", skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "<|im_start|>hi<|im_end|>"
    stopped = await complete(url, prompt="q", stop="i<|im_end|>")
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["stop_reason"]) == ("h", "i<|im_end|>")


async def test_the_prompt_is_echoed(serve: Serve) -> None:
    url = await serve([" there"] * 3)
    assert (await complete(url, prompt="Hello", echo=True))["choices"][0]["text"] == "Hello there"
    # what the prompt says ends nothing
    stopped = await complete(url, prompt="Hello", echo=True, stop=["Hello"])
    assert stopped["choices"][0]["text"] == "Hello there"
    chunks = await chunks_of(f"{url}/completions", {"prompt": "Hello", "echo": True})
    assert joined(chunks)[0]["text"] == "Hello there"


async def test_log_probs_have_the_old_shape(chat_url: str, chat_policy: Policy) -> None:
    token_text = TokenText(chat_policy.renderer.tokenizer)
    for seed in range(8):
        completion = await complete(chat_url, prompt="1 + 2 =", seed=seed, logprobs=2)
        (choice,) = completion["choices"]
        scores, ids = choice["logprobs"], choice["generation_token_ids"]
        assert scores["token_logprobs"] == choice["generation_log_probs"]
        assert {len(values) for values in scores.values()} == {len(ids)}
        for place, token_id in enumerate(ids):
            name, top = scores["tokens"][place], scores["top_logprobs"][place]
            data = token_text.bytes_of(token_id)
            spelled = data.decode(errors="ignore").encode() == data
            assert name == data.decode() if spelled else name.startswith("bytes:\\x")
            assert top[name] == scores["token_logprobs"][place]
            assert len(top) <= 3
        assert scores["text_offset"] == sorted(scores["text_offset"])
        assert scores["text_offset"][-1] <= len(choice["text"])
    only = await complete(chat_url, prompt="1", logprobs=0)
    assert all(len(top) == 1 for top in only["choices"][0]["logprobs"]["top_logprobs"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"prompt": ["a", "b"], "logprobs": 1},
        {"stop": ["a", "e"], "logprobs": 0},
        {"echo": True},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)
async def test_the_chunks_are_the_answer(chat_url: str, fields: dict[str, Any]) -> None:
    for seed in range(4):
        body = {"prompt": "1 + 2 =", "max_tokens": 24, "seed": seed, **fields}
        whole = await complete(chat_url, **body)
        *chunks, last = await chunks_of(
            f"{chat_url}/completions", {**body, "stream_options": {"include_usage": True}}
        )
        assert {chunk["id"] for chunk in chunks} == {last["id"]}
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
        assert rounded(joined(chunks)) == rounded(whole["choices"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_ids_are_streamed_as_their_text(renderer: TemplateRenderer, data: st.DataObject) -> None:
    """Halves of characters, special tokens and stop strings across them; the text never goes back."""
    texts = data.draw(st.lists(st.sampled_from(["e", "n", "🙂", "東", "<|im_start|>"]), max_size=8))
    ids = [token_id for text in texts for token_id in renderer.encode(text)]
    ids.insert(data.draw(st.integers(0, len(ids))), data.draw(st.integers(0, 399)))
    starts = data.draw(st.lists(st.integers(0, len(texts)), max_size=2))
    stop = ["".join(texts[start : start + 3]) or "e" for start in starts]
    shown = data.draw(st.booleans())
    body = {"prompt": "q", "stop": stop, "logprobs": 0, "skip_special_tokens": not shown}
    app = make_app(Policy(StepEngine([ids, ids]), renderer))
    async with TestServer(app, handler_cancellation=True) as server:
        url = str(server.make_url("/v1"))
        chunks = await chunks_of(f"{url}/completions", body)
        whole = await complete(url, **body)
    assert joined(chunks) == whole["choices"]
    (choice,) = whole["choices"]
    token_text = TokenText(renderer.tokenizer)
    sampled = ids[: len(choice["generation_token_ids"])]
    assert choice["generation_token_ids"] == sampled
    spelled = b"".join(
        token_text.bytes_of(token_id)
        for token_id in sampled
        if shown or token_id not in renderer.tokenizer.all_special_ids
    ).decode(errors="replace")
    if choice["stop_reason"] is None:
        assert choice["text"] == spelled
    else:
        assert spelled.startswith(choice["text"])
        # hidden tokens may stand in the middle of what then looks like it
        assert not shown or choice["stop_reason"] not in choice["text"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "must be text"),
        ({"prompt": []}, "prompt", "must be text"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": [[]]}, "prompt", "must be text"),
        ({"prompt": [1, "a"]}, "prompt", "must be text"),
        ({"prompt": [True]}, "prompt", "must be text"),
        ({"prompt": [1.5]}, "prompt", "must be text"),
        ({"prompt": [-1]}, "prompt", "none of this model's"),
        ({"prompt": [10**30]}, "prompt", "none of this model's"),
        ({"prompt": ["a"] * 1025, "n": 2}, "prompt", "2048"),
        ({"prompt": "word " * 600}, "prompt", "the context holds"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 2, "best_of": 3}, "best_of", "must be `n`"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"logprobs": True}, "logprobs", "0 to 20"),
        ({"echo": True, "logprobs": 0}, "echo", "not scored"),
        ({"echo": 1}, "echo", "true or false"),
        ({"suffix": "!"}, "suffix", "after its prompt"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "likelier"),
        ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"stop": ["a", ""]}, "stop[1]", "characters"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"messages": []}, "messages", "not supported"),
    ],
)
async def test_refusals_name_the_field(chat_url: str, fields: dict[str, Any], param: str, words: str) -> None:
    error = await error_of(f"{chat_url}/completions", {"prompt": "1", **fields})
    assert error["param"] == param, error
    assert words in error["message"], error


async def test_another_model_is_none(chat_url: str) -> None:
    status, answer = await post(f"{chat_url}/completions", {"prompt": "1", "model": "gpt-9"})
    assert (status, answer["error"]["param"]) == (404, "model")


async def test_captures_know_no_completions(chat_url: str) -> None:
    root = chat_url.removesuffix("/v1")
    await post(f"{root}/rollouts/r1", {})
    status, _ = await post(f"{root}/rollouts/r1/v1/completions", {"prompt": "1"})
    assert status == 404


async def test_what_completions_take_is_counted(chat_url: str, chat_policy: Policy) -> None:
    completion = await complete(chat_url, prompt="1 + 2 =", n=2)
    assert chat_policy.stats.responses == 2
    assert chat_policy.stats.generated_tokens == completion["usage"]["completion_tokens"]


async def test_a_reader_that_goes_away_ends_the_generation(serve: Serve) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine, keep_alive_s=0.1)
    async with aiohttp.ClientSession() as session:
        body = {"prompt": "q", "stream": True, "n": 2}
        async with session.post(f"{url}/completions", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            assert engine.running == 2
    await until(lambda: engine.cancelled == 2)
