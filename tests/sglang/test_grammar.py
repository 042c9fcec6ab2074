"""On the real SGLang a request with a grammar spells it, and is told the policy's own log-probs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from backends.engine import FinishReason, FolderWeights, Generation, GenerationRequest, SamplingParams
from backends.sglang import SGLangEngine, launch_sglang
from gym_sdk.errors import PolicyError, TransportError

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

Scores = Callable[..., list[float]]
TOLERANCE = 1e-4
END = 2
PROMPT = [5, 17, 42, 108, 9]
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": -99, "maximum": 999},
        "sure": {"type": "boolean"},
        "why": {"type": "string", "maxLength": 12},
    },
    "required": ["answer", "sure", "why"],
    "additionalProperties": False,
}
SPELLED = json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}})
GRAMMAR = f"start: %json {SPELLED} <[{END}]>"


def ask(name: str, grammar: str | None = GRAMMAR, prompt: list[int] = PROMPT, **changes: object):
    params = {"max_new_tokens": 120, "stop_token_ids": frozenset({END}), "grammar": grammar} | changes
    return GenerationRequest(name, prompt, SamplingParams(**params))  # type: ignore[arg-type]


def same(found: list[float], expected: list[float]) -> None:
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < TOLERANCE


async def under_way(engine: SGLangEngine) -> list[asyncio.Future[Generation]]:
    """Four long generations with a grammar that have begun."""
    long = f"start: /[qxz]{{900}}/ <[{END}]>"
    await engine.generate(ask("first", long, max_new_tokens=1))  # SGLang knows the grammar from here on
    running = [
        asyncio.ensure_future(engine.generate(ask(f"it-{number}", long, max_new_tokens=None)))
        for number in range(4)
    ]
    await engine.generate(ask("behind", None, max_new_tokens=12, stop_token_ids=frozenset()))
    return running


async def test_what_is_generated_is_of_the_schema_with_the_log_probs_without_it(
    engine: SGLangEngine, trained: PreTrainedModel, tiny_policy: Path, forward: Scores
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_policy))
    bound = [
        ask(f"bound-{number}", prompt=[*PROMPT, 20 + number], temperature=number % 2) for number in range(12)
    ]
    free = [ask(f"free-{number}", None, temperature=0.7) for number in range(4)]
    generations = await asyncio.gather(*(engine.generate(request) for request in (*bound, *free)))
    for request, generation in zip(bound, generations, strict=False):
        assert generation.finish_reason is FinishReason.STOP
        assert generation.token_ids[-1] == END
        jsonschema.validate(json.loads(tokenizer.decode(generation.token_ids[:-1])), SCHEMA)
        same(generation.log_probs, forward(trained, request.prompt_token_ids, generation, 1.0))
        assert sum(generation.log_probs) < -10  # under the mask most would be certain
        assert [(span.start, span.end) for span in generation.weight_versions] == [
            (0, len(generation.token_ids))
        ]
    for request, generation in zip(free, generations[12:], strict=True):
        same(generation.log_probs, forward(trained, request.prompt_token_ids, generation, 0.7))


async def test_the_likeliest_tokens_are_those_without_the_grammar(
    engine: SGLangEngine, trained: PreTrainedModel
) -> None:
    for grammar in (GRAMMAR, f'start: "yes" <[{END}]>', f"start: <[{END}]>"):
        generation = await engine.generate(ask("it", grammar, top_log_probs=4))
        ids = torch.tensor([[*PROMPT, *generation.token_ids]])
        with torch.no_grad():
            best = trained(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).topk(4)
        assert generation.top_log_probs is not None
        assert [[token for token, _ in place] for place in generation.top_log_probs] == best.indices.tolist()
        scores = [score for place in generation.top_log_probs for _, score in place]
        same(scores, best.values.flatten().tolist())


async def test_a_stream_brings_all_of_it_at_its_end(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    chunks = [chunk async for chunk in engine.stream(ask("it", top_log_probs=2))]
    assert len(chunks) == 1
    (whole,) = chunks
    assert whole.finish_reason is FinishReason.STOP
    assert len(whole.top_log_probs or []) == len(whole.token_ids)
    generation = Generation(whole.token_ids, whole.log_probs, FinishReason.STOP, ())
    same(whole.log_probs, forward(trained, PROMPT, generation, 1.0))


async def test_one_that_fills_the_context_is_scored_to_its_end(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    prompt = [*PROMPT, *[30 + number % 50 for number in range(engine.info.context_length - 25)]]
    request = ask("it", f"start: /[a-z ]+/ <[{END}]>", prompt, max_new_tokens=None)
    for _ in range(8):
        generation = await engine.generate(request)
        assert generation.token_ids
        same(generation.log_probs, forward(trained, prompt, generation, 1.0))
    cut = await engine.generate(ask("it", "start: /[qxz]{100}/ <[2]>", prompt, max_new_tokens=None))
    assert cut.finish_reason is FinishReason.LENGTH
    assert len(cut.token_ids) == engine.info.context_length - len(prompt)
    same(cut.log_probs, forward(trained, prompt, cut, 1.0))


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("start: nothing", "unknown name"),
        (f'start: %json {{"type": "objekt"}} <[{END}]>', "Invalid type"),
        ('start: "a" <[2]> "b" <[0]>', "stop token 2"),
        (f"start: /a/ NONE <[{END}]>\nNONE: /b/ & /c/", "no token after 1"),
        # text of a markup token where nothing else may follow: llguidance's matcher contradicts itself
        (f'start: "<tool_call>" <[{END}]>', "accept_token failed"),
    ],
)
async def test_what_cannot_be_spelled_is_the_requests_fault(
    engine: SGLangEngine, grammar: str, why: str
) -> None:
    stops = frozenset({0}) if "stop token" in why else frozenset({END})
    for call in (engine.generate, lambda request: anext(engine.stream(request))):
        with pytest.raises(PolicyError, match=why) as caught:
            await call(ask("it", grammar, stop_token_ids=stops))  # type: ignore[operator]
        assert (caught.value.code, caught.value.param, caught.value.status) == (
            "invalid_value",
            "grammar",
            400,
        )
        assert len(str(caught.value)) < 500
    assert engine.info.running == 0
    assert (await engine.generate(ask("it"))).finish_reason is FinishReason.STOP


async def test_what_sglang_cannot_do_is_refused(
    engine: SGLangEngine,
) -> None:
    with pytest.raises(PolicyError, match="temperature must be 0 or 1") as caught:
        await engine.generate(ask("it", temperature=0.7))
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "temperature")
    assert engine.facts.grammar_backend == "llguidance"
    engine.facts = replace(engine.facts, grammar_backend="xgrammar")
    with pytest.raises(PolicyError, match="--grammar-backend llguidance") as caught:
        await engine.generate(ask("it"))
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "grammar")


async def test_an_sglang_that_is_launched_reads_grammars_unless_it_is_told_otherwise(
    tiny_policy: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    for arguments, found in (((), ["llguidance"]), (("--grammar-backend", "none"), ["llguidance", "none"])):
        with pytest.raises(TransportError, match="ended before it answered") as caught:
            async with launch_sglang(tiny_policy, python=python, arguments=arguments):
                pass
        words = str(caught.value).split()  # of two, SGLang takes the second
        assert [words[at + 1] for at, word in enumerate(words) if word == "--grammar-backend"] == found


async def test_weights_that_change_under_it_end_it_and_it_may_be_sent_again(
    engine: SGLangEngine, tiny_policy: Path
) -> None:
    running = await under_way(engine)
    await engine.update_weights(FolderWeights(tiny_policy), version="1")
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, TransportError)
        assert error.retryable
        assert "0, 1" in str(error)
    again = await engine.generate(ask("it"))
    assert {span.version for span in again.weight_versions} == {"1"}


async def test_an_abort_leaves_no_token_without_a_log_prob(engine: SGLangEngine) -> None:
    running = await under_way(engine)
    assert await engine.abort() == 4
    for generation in await asyncio.gather(*running):
        assert generation == Generation([], [], FinishReason.ABORT, (), generation.cached_tokens)
    assert (await engine.generate(ask("it"))).finish_reason is FinishReason.STOP


async def test_pauses_and_others_at_once_do_not_disturb_it(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    requests = [ask(f"it-{number}", prompt=[*PROMPT, 20 + number]) for number in range(24)]
    running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    for mode in ("retract", "in_place"):
        await asyncio.sleep(0.1)
        await engine.pause(mode)  # type: ignore[arg-type]
        await engine.continue_generation()
    for request, generation in zip(requests, await asyncio.gather(*running), strict=True):
        assert generation.finish_reason is FinishReason.STOP
        same(generation.log_probs, forward(trained, request.prompt_token_ids, generation, 1.0))
    running = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    await asyncio.sleep(0.1)
    await engine.pause("abort")
    await engine.continue_generation()
    ends = {generation.finish_reason for generation in await asyncio.gather(*running)}
    assert ends <= {FinishReason.ABORT, FinishReason.STOP}
