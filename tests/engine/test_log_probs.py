from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import Engine
from backends.transformers import EngineConfig, TransformersEngine

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_they_equal_a_plain_forward_pass(
    model: PreTrainedModel,
    temperature: float,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
) -> None:
    prompts = [make_prompt(length, seed=length) for length in (1, 2, 17, 33, 64, 120)]
    async with TransformersEngine(model) as engine:
        assert isinstance(engine, Engine)
        generations = await asyncio.gather(
            *(engine.generate(make_request(prompt, 40, temperature=temperature)) for prompt in prompts)
        )
    for prompt, generation in zip(prompts, generations, strict=True):
        assert len(generation.token_ids) == len(generation.log_probs) == 40
        assert worst_difference(model, prompt, generation, temperature or 1.0) <= 1e-4


async def test_truncation_does_not_change_them(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    prompt = make_prompt(10)
    async with TransformersEngine(qwen3) as engine:
        generation = await engine.generate(make_request(prompt, 40, temperature=0.9, top_k=5, top_p=0.8))
    assert worst_difference(qwen3, prompt, generation, 0.9) <= 1e-4


async def test_greedy_equals_transformers_generate(
    model: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    prompts = [make_prompt(length, seed=length) for length in (3, 9, 30)]
    async with TransformersEngine(model) as engine:
        generations = await asyncio.gather(
            *(engine.generate(make_request(prompt, 30, temperature=0.0)) for prompt in prompts)
        )
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
        )
        assert generation.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefill_tokens", [1, 7, 50])
async def test_they_do_not_depend_on_how_a_prompt_is_split(
    model: PreTrainedModel,
    prefill_tokens: int,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
) -> None:
    prompts = [make_prompt(length, seed=length) for length in (5, 40, 90)]
    config = EngineConfig(prefill_tokens=prefill_tokens)
    async with TransformersEngine(model, config=config) as engine:
        generations = await asyncio.gather(*(engine.generate(make_request(prompt, 10)) for prompt in prompts))
    for prompt, generation in zip(prompts, generations, strict=True):
        assert worst_difference(model, prompt, generation) <= 1e-4


async def test_half_precision_runs(
    make_model: Callable, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    model = make_model("qwen3", initializer_range=0.1).to(torch.bfloat16)
    prompt = make_prompt(20)
    async with TransformersEngine(model) as engine:
        generation = await engine.generate(make_request(prompt, 20))
    assert worst_difference(model, prompt, generation) <= 0.1


async def test_a_trainer_may_keep_the_model_in_training_mode(
    make_model: Callable, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    model = make_model("llama", attention_dropout=0.5)
    model.train()
    prompt = make_prompt(20)
    async with TransformersEngine(model) as engine:
        generation = await engine.generate(make_request(prompt, 20))
        assert model.training
        assert model.config._attn_implementation == "sdpa"
        loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([prompt])).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert worst_difference(model.eval(), prompt, generation) <= 1e-4
