"""A reader of a stream that is slow gets what has piled up as one chunk, but never of two weight versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from backends.engine import FinishReason, TensorWeights
from backends.transformers import TransformersEngine
from gym_sdk.errors import GymError

pytestmark = pytest.mark.asyncio


async def ended(engine: TransformersEngine) -> None:
    """Wait until nothing runs, and what it sampled has arrived."""
    async with asyncio.timeout(30):
        while engine._scheduler.has_work:
            await asyncio.sleep(0.001)
    await engine.continue_generation()  # comes after what was delivered before


async def test_what_has_piled_up_comes_as_one(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        whole = await engine.generate(make_request(make_prompt(5), 40, seed=1, top_log_probs=2))
        stream = engine.stream(make_request(make_prompt(5), 40, seed=1, top_log_probs=2))
        first = await anext(stream)
        await ended(engine)
        rest = await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert first.token_ids + rest.token_ids == whole.token_ids
    assert first.log_probs + rest.log_probs == whole.log_probs
    assert (first.top_log_probs or []) + (rest.top_log_probs or []) == whole.top_log_probs
    assert (first.finish_reason, rest.finish_reason) == (None, FinishReason.LENGTH)


async def test_it_never_spans_two_versions(
    qwen3: PreTrainedModel,
    make_request: Callable,
    make_prompt: Callable,
    in_progress: Callable,
    slow: Callable,
) -> None:
    async with TransformersEngine(qwen3) as engine:
        slow(engine)
        stream = engine.stream(make_request(make_prompt(5), 60))
        chunks = [await anext(stream)]
        for version, tokens in (("1", 10), ("2", 20)):
            await in_progress(engine, 1, tokens)
            await engine.update_weights(TensorWeights({}), version=version)
        await ended(engine)
        chunks += [chunk async for chunk in stream]
    merged = chunks[1:]  # the first may hold one token of version 0, the rest of which comes next
    assert [chunk.weight_version for chunk in merged] == ["0", "1", "2"]
    assert sum(len(chunk.token_ids) for chunk in chunks) == 60
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_what_was_sampled_comes_before_what_went_wrong(
    qwen3: PreTrainedModel,
    make_request: Callable,
    make_prompt: Callable,
    in_progress: Callable,
    slow: Callable,
) -> None:
    async with TransformersEngine(qwen3) as engine:
        slow(engine)
        stream = engine.stream(make_request(make_prompt(5), 60))
        chunks = [await anext(stream)]
        await in_progress(engine, 1, 10)
        weights = qwen3.state_dict()
        broken = weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")}
        await engine.update_weights(TensorWeights(broken), version="1")
        await ended(engine)
        with pytest.raises(GymError, match="NaN"):
            while True:
                chunks.append(await anext(stream))
    assert len(chunks) == 2
    assert len(chunks[1].token_ids) >= 9
