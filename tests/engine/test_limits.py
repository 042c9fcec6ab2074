from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import FinishReason, GenerationRequest, SamplingParams
from backends.transformers import EngineConfig, TransformersEngine
from gym_sdk.errors import ConfigurationError, ContextOverflowError
from gym_sdk.tokens import WeightSpan

pytestmark = pytest.mark.asyncio


async def test_a_stop_token_ends_it_and_belongs_to_it(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    prompt = make_prompt(12)
    async with TransformersEngine(qwen3) as engine:
        free = await engine.generate(make_request(prompt, 40, seed=3))
        stop = free.token_ids[10]
        first = free.token_ids.index(stop)
        stopped = await engine.generate(make_request(prompt, 40, seed=3, stop_token_ids=frozenset({stop})))
    assert free.finish_reason is FinishReason.LENGTH
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.weight_versions == (WeightSpan("0", 0, first + 1),)


async def test_without_a_limit_it_fills_the_context(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(context_length=50)) as engine:
        assert engine.info.context_length == 50
        for length, limit in ((10, None), (49, None), (30, 1000)):
            generation = await engine.generate(make_request(make_prompt(length), limit))
            assert generation.finish_reason is FinishReason.LENGTH
            assert len(generation.token_ids) == 50 - length


async def test_a_prompt_that_fills_the_context_is_refused(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(context_length=50)) as engine:
        with pytest.raises(ContextOverflowError, match=r"50 tokens.*holds 50") as caught:
            await engine.generate(make_request(make_prompt(50), 1))
        assert (caught.value.prompt_tokens, caught.value.context_length) == (50, 50)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty prompt"),
        ([1, 2, 97], r"prompt_token_ids\[2\] is 97"),
        ([1, -1], r"prompt_token_ids\[1\] is -1"),
        ([1, 2**70], r"prompt_token_ids\[1\] is 1180591620717411303424"),
        ([1, 2**63], r"prompt_token_ids\[1\] is 9223372036854775808"),
        ([1, 1.5], r"\[1\] is 1\.5; an id must be an integer from 0 to 96"),
        ([[1]], r"\[0\] is \[1\]"),
        ([1, [2]], r"\[1\] is \[2\]"),
        (["a"], r"\[0\] is 'a'"),
        ([True], r"\[0\] is True"),
    ],
)
async def test_a_bad_prompt_is_refused(qwen3: PreTrainedModel, prompt: list[int], message: str) -> None:
    async with TransformersEngine(qwen3) as engine:
        request = GenerationRequest("bad", prompt, SamplingParams(max_new_tokens=2))
        with pytest.raises(ConfigurationError, match=message):
            await engine.generate(request)
        with pytest.raises(ConfigurationError, match=message):
            await anext(engine.stream(request))
        assert engine.info.running == engine.info.waiting == 0


async def test_any_sequence_of_ids_is_a_prompt(qwen3: PreTrainedModel) -> None:
    ids = [5, 6, 7]
    async with TransformersEngine(qwen3) as engine:
        kinds = [ids, tuple(ids), np.array(ids, np.int32), torch.tensor(ids)]
        results = [
            await engine.generate(GenerationRequest(str(number), kind, SamplingParams(5, seed=1)))  # type: ignore[arg-type]
            for number, kind in enumerate(kinds)
        ]
    assert len({tuple(result.token_ids) for result in results}) == 1


async def test_an_id_in_use_is_refused_and_free_again_afterwards(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        first = asyncio.create_task(engine.generate(make_request(make_prompt(5), 50, name="same")))
        await asyncio.sleep(0)
        with pytest.raises(ConfigurationError, match="'same' is in use"):
            await engine.generate(make_request(make_prompt(5), 50, name="same"))
        await first
        await engine.generate(make_request(make_prompt(5), 5, name="same"))


async def test_more_requests_than_slots_wait_in_line(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(max_running=4)) as engine:
        await engine.pause()
        tasks = [
            asyncio.create_task(engine.generate(make_request(make_prompt(5, seed), 20))) for seed in range(10)
        ]
        await asyncio.sleep(0.01)
        assert (engine.info.running, engine.info.waiting) == (0, 10)
        most = 0
        await engine.continue_generation()
        while not all(task.done() for task in tasks):
            most = max(most, engine.info.running)
            await asyncio.sleep(0)
        assert most == 4
        assert all(len(task.result().token_ids) == 20 for task in tasks)


@pytest.mark.parametrize(
    "values",
    [
        {"context_length": 0},
        {"max_running": 0},
        {"prefill_tokens": 0},
        {"max_cache_tokens": 0},
        {"close_timeout_s": 0.0},
    ],
)
async def test_a_config_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        EngineConfig(**values)  # type: ignore[arg-type]
