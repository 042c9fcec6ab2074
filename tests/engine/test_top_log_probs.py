"""The likeliest tokens that are reported are those of a plain forward pass at the request's temperature."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import Generation, SamplingParams, TensorWeights, TopLogProbs
from backends.transformers import TransformersEngine
from gym_sdk.errors import ConfigurationError

Expected = Callable[[PreTrainedModel, Sequence[int], Generation, float, int], list[dict[int, float]]]


@pytest.fixture
def expected() -> Expected:
    def compute(
        model: PreTrainedModel, prompt: Sequence[int], generation: Generation, temperature: float, most: int
    ) -> list[dict[int, float]]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *generation.token_ids]])).logits[0, len(prompt) - 1 : -1]
        best = (logits.float() / temperature).log_softmax(-1).topk(most)
        return [
            dict(zip(ids, scores, strict=True))
            for ids, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    return compute


def same(found: TopLogProbs | None, expected: list[dict[int, float]]) -> None:
    assert found is not None
    assert len(found) == len(expected)
    for place, wanted in zip(found, expected, strict=True):
        assert [token for token, _ in place] == list(wanted)
        for token, score in place:
            assert abs(score - wanted[token]) <= 1e-4


@pytest.mark.asyncio
async def test_they_equal_a_plain_forward_pass_beside_requests_that_ask_for_none(
    model: PreTrainedModel, expected: Expected, make_request: Callable, make_prompt: Callable
) -> None:
    kinds = [(5, 1.0), (0, 1.0), (20, 0.6), (1, 0.0), (3, 1.7), (0, 0.0)]
    requests = [
        make_request(make_prompt(9, seed=seed), 12, temperature=temperature, top_log_probs=most, top_k=4)
        for seed, (most, temperature) in enumerate(kinds)
    ]
    async with TransformersEngine(model) as engine:
        generations = await asyncio.gather(*map(engine.generate, requests))
    for request, generation, (most, temperature) in zip(requests, generations, kinds, strict=True):
        if most == 0:
            assert generation.top_log_probs is None
            continue
        wanted = expected(model, request.prompt_token_ids, generation, temperature or 1.0, most)
        same(generation.top_log_probs, wanted)


@pytest.mark.asyncio
async def test_they_change_nothing_about_what_is_sampled(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        plain, told = [
            await engine.generate(make_request(make_prompt(4), 20, seed=9, top_log_probs=most))
            for most in (0, 7)
        ]
    assert plain.token_ids == told.token_ids
    assert plain.log_probs == told.log_probs


@pytest.mark.asyncio
async def test_a_stream_brings_them_with_their_tokens_and_over_updates(
    qwen3: PreTrainedModel, expected: Expected, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        request = make_request(make_prompt(20), 16, seed=2, top_log_probs=4)
        whole = await engine.generate(request)
        found: TopLogProbs = []
        updated = False
        async for chunk in engine.stream(request):
            assert chunk.top_log_probs is not None
            assert len(chunk.top_log_probs) == len(chunk.token_ids)
            assert chunk.cached_tokens == 19  # all but the last of a prompt that was computed before
            found += chunk.top_log_probs
            if not updated:  # to the same weights: what is sampled stays as it was
                updated = True
                await engine.update_weights(TensorWeights({}), version="1")
    same(found, expected(qwen3, request.prompt_token_ids, whole, 1.0, 4))


@pytest.mark.asyncio
async def test_tokens_that_cannot_be_sampled_are_left_out(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        request = make_request(make_prompt(5), 4, temperature=1e-60, top_log_probs=5)
        generation = await engine.generate(request)
    assert generation.top_log_probs == [[(token, 0.0)] for token in generation.token_ids]
    assert all(map(math.isfinite, generation.log_probs))


@pytest.mark.parametrize("most", [-1, 21])
def test_only_so_many_may_be_asked_for(most: int) -> None:
    with pytest.raises(ConfigurationError, match="top_log_probs"):
        SamplingParams(top_log_probs=most)
