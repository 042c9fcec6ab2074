from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from backends.engine import FinishReason, Generation, GenerationRequest, SamplingParams
from backends.transformers import EngineConfig, TransformersEngine

pytestmark = pytest.mark.asyncio


async def alone(model: PreTrainedModel, request: GenerationRequest) -> Generation:
    config = EngineConfig(max_running=1, prefix_reuse=False)
    async with TransformersEngine(model, config=config) as engine:
        return await engine.generate(request)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(max_running=3),
        EngineConfig(prefill_tokens=16, prefix_reuse=False),
        EngineConfig(max_running=9, prefill_tokens=10, max_cache_tokens=512),
    ],
    ids=["default", "few slots", "small chunks", "little memory"],
)
async def test_company_does_not_change_a_seeded_request(
    qwen3: PreTrainedModel, config: EngineConfig, make_request: Callable, worst_difference: Callable
) -> None:
    chance = random.Random(1)
    shared = [chance.randrange(97) for _ in range(24)]
    requests = []
    for number in range(24):
        own = [chance.randrange(97) for _ in range(chance.randint(1, 60))]
        prompt = shared + own if number % 2 else own
        temperature = chance.choice([0.0, 0.8, 1.0])
        requests.append(make_request(prompt, chance.randint(1, 60), seed=number, temperature=temperature))

    async def late(engine: TransformersEngine, request: GenerationRequest) -> Generation:
        await asyncio.sleep(chance.random() * 0.1)
        return await engine.generate(request)

    async with TransformersEngine(qwen3, config=config) as engine:
        together = await asyncio.gather(*(late(engine, request) for request in requests))
        assert engine.info.running == engine.info.waiting == 0
    for request, generation in zip(requests, together, strict=True):
        assert generation.token_ids == (await alone(qwen3, request)).token_ids
        temperature = request.sampling.temperature or 1.0
        assert worst_difference(qwen3, request.prompt_token_ids, generation, temperature) <= 1e-4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_identical_prompts_give_what_each_gives_alone(
    models: dict[str, PreTrainedModel], data: st.DataObject
) -> None:
    model = models["llama"]
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=1, max_size=3)
    )
    copies = data.draw(st.integers(1, 4))
    chunk = data.draw(st.integers(1, 64))
    requests = [
        GenerationRequest(f"{index}-{copy}", prompt, SamplingParams(max_new_tokens=5, seed=copy))
        for index, prompt in enumerate(prompts)
        for copy in range(copies)
    ]
    async with TransformersEngine(model, config=EngineConfig(prefill_tokens=chunk)) as engine:
        together = await asyncio.gather(*(engine.generate(request) for request in requests))
    for request, generation in zip(requests, together, strict=True):
        assert generation.token_ids == (await alone(model, request)).token_ids


async def test_a_groups_prompt_is_computed_once(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    prompt = make_prompt(50)
    async with TransformersEngine(qwen3) as engine:
        group = await asyncio.gather(*(engine.generate(make_request(prompt, 20)) for _ in range(8)))
    assert sorted(generation.cached_tokens for generation in group) == [0] + [49] * 7
    assert len({tuple(generation.token_ids) for generation in group}) > 1


async def test_the_next_turn_reuses_the_history(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    prompt = make_prompt(30)
    async with TransformersEngine(qwen3) as engine:
        first = await engine.generate(make_request(prompt, 20))
        extended = [*prompt, *first.token_ids, *make_prompt(10, seed=5)]
        second = await engine.generate(make_request(extended, 20))
        # the last sampled token was never fed back, so its keys and values are not there
        assert second.cached_tokens == 30 + 20 - 1
        assert worst_difference(qwen3, extended, second) <= 1e-4
        # another branch from the middle of it still gets what it shares
        branch = [*extended[:40], *make_prompt(10, seed=6)]
        third = await engine.generate(make_request(branch, 20))
        assert third.cached_tokens >= 40
        assert worst_difference(qwen3, branch, third) <= 1e-4


async def test_reuse_can_be_turned_off(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(prefix_reuse=False)) as engine:
        for _ in range(2):
            generation = await engine.generate(make_request(make_prompt(50), 5))
            assert generation.cached_tokens == 0


async def test_memory_follows_use_and_the_limit_holds(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    config = EngineConfig(max_cache_tokens=1024)
    async with TransformersEngine(qwen3, config=config) as engine:
        table = engine._scheduler._table
        await engine.generate(make_request(make_prompt(10), 5))
        assert (table.cache.rows, table.cache.length) == (8, 128)
        sizes = set()

        async def watch() -> None:
            while True:
                sizes.add(table.cache.rows * table.cache.length)
                await asyncio.sleep(0.001)

        watcher = asyncio.create_task(watch())
        requests = [make_request(make_prompt(20, seed=seed), 150 + seed) for seed in range(12)]
        generations = await asyncio.gather(*(engine.generate(request) for request in requests))
        watcher.cancel()
    assert max(sizes) == 1024
    for request, generation in zip(requests, generations, strict=True):
        assert generation.finish_reason is FinishReason.LENGTH
        assert worst_difference(qwen3, request.prompt_token_ids, generation) <= 1e-4


async def test_a_long_prompt_does_not_hold_up_the_others(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(prefill_tokens=4)) as engine:
        stream = engine.stream(make_request(make_prompt(4), 200))
        await anext(stream)
        long = asyncio.create_task(engine.generate(make_request(make_prompt(200), 1)))
        tokens = 0
        async for chunk in stream:
            tokens += len(chunk.token_ids)
            if long.done():
                break
        # 199 tokens in chunks of 4 take 50 steps, and the other decodes in each of them
        assert tokens >= 50
        await long


async def test_samples_follow_themodels_distribution(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, forward_log_probs: Callable
) -> None:
    prompt = make_prompt(20)
    async with TransformersEngine(qwen3) as engine:
        generations = await asyncio.gather(
            *(engine.generate(make_request(prompt, 1, seed=seed)) for seed in range(3000))
        )
    seen = np.bincount([generation.token_ids[0] for generation in generations], minlength=97)
    probs = np.exp([float(forward_log_probs(qwen3, prompt, [token])[0]) for token in range(97)])
    common = probs * 3000 >= 5
    expected = np.append(probs[common], probs[~common].sum()) * 3000
    counts = np.append(seen[common], seen[~common].sum())
    freedom = len(expected) - 1
    # mean + 5 standard deviations of chi-squared
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
