"""The likeliest tokens that SGLang reports are those of a plain forward pass at the request's temperature."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import GenerationRequest, SamplingParams, TopLogProbs
from backends.sglang import SGLangEngine

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 1e-4
PROMPT = [5, 17, 42, 108, 9]


def ask(name: str, **sampling: object) -> GenerationRequest:
    return GenerationRequest(name, PROMPT, SamplingParams(max_new_tokens=24, **sampling))  # type: ignore[arg-type]


def check(
    model: PreTrainedModel, token_ids: list[int], found: TopLogProbs | None, temperature: float, most: int
) -> None:
    assert found is not None
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    best = (logits / temperature).log_softmax(-1).topk(most)
    assert [[token for token, _ in place] for place in found] == best.indices.tolist()
    scores = torch.tensor([[score for _, score in place] for place in found])
    assert float((scores - best.values).abs().max()) < TOLERANCE


async def test_they_equal_a_plain_forward_pass_beside_requests_that_ask_for_none(
    engine: SGLangEngine, trained: PreTrainedModel
) -> None:
    kinds = [(3, 1.0), (0, 1.0), (20, 0.6), (1, 0.0), (5, 1.7)]
    requests = [
        ask(f"it-{place}", temperature=temperature, top_log_probs=most)
        for place, (most, temperature) in enumerate(kinds)
    ]
    generations = await asyncio.gather(*map(engine.generate, requests))
    for generation, (most, temperature) in zip(generations, kinds, strict=True):
        if most:
            check(trained, generation.token_ids, generation.top_log_probs, temperature or 1.0, most)
        else:
            assert generation.top_log_probs is None


async def test_a_stream_brings_them_with_their_tokens(engine: SGLangEngine, trained: PreTrainedModel) -> None:
    chunks = [chunk async for chunk in engine.stream(ask("it", top_log_probs=4))]
    assert len(chunks) > 1
    for chunk in chunks:
        assert len(chunk.top_log_probs or []) == len(chunk.token_ids)
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    found = [place for chunk in chunks for place in chunk.top_log_probs or []]
    assert len(found) == 24
    check(trained, token_ids, found, 1.0, 4)
    assert {chunk.cached_tokens for chunk in chunks} == {chunks[0].cached_tokens}
    assert all(chunk.top_log_probs is None for chunk in [c async for c in engine.stream(ask("other"))])
