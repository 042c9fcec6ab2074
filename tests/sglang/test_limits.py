"""What the real SGLang must never be sent is refused here, by name."""

from __future__ import annotations

import asyncio

import pytest

from backends.engine import Engine, FinishReason, GenerationRequest, SamplingParams
from backends.sglang import SGLangConfig, SGLangEngine, SGLangProcess
from gym_sdk.errors import ConfigurationError, ContextOverflowError, DeadlineError, GymError, PolicyError

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300)]


async def test_it_is_an_engine_that_knows_its_server(engine: SGLangEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.facts.version.startswith("0.5.")
    assert engine.info.vocab_size > 300
    assert 1000 < engine.info.context_length <= 1024


async def test_a_prompt_of_any_length_that_fits_is_taken_and_no_longer_one(engine: SGLangEngine) -> None:
    length = engine.info.context_length
    generation = await engine.generate(GenerationRequest("fits", [5] * (length - 1)))
    assert generation.finish_reason is FinishReason.LENGTH
    assert len(generation.token_ids) == 1
    generation = await engine.generate(GenerationRequest("rest", [5] * (length - 9)))
    assert len(generation.token_ids) == 9
    with pytest.raises(ContextOverflowError) as caught:
        await engine.generate(GenerationRequest("long", [5] * length))
    assert caught.value.prompt_tokens == caught.value.context_length == length


async def test_sglang_itself_says_that_a_prompt_is_too_long(engine: SGLangEngine) -> None:
    for length in (engine.info.context_length, engine.info.context_length + 20):
        body = {"input_ids": [5] * length, "sampling_params": {"max_new_tokens": 1}}
        with pytest.raises(ContextOverflowError):
            await engine._client.post("/generate", body)


@pytest.mark.parametrize("wrong", [-1, 402, 10**30, True, 1.0, "5", None])
async def test_what_is_no_id_never_reaches_sglang(engine: SGLangEngine, wrong: object) -> None:
    prompt = [5, wrong, 6]
    with pytest.raises(ConfigurationError, match=r"prompt_token_ids\[1\]"):
        await engine.generate(GenerationRequest("wrong", prompt))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="empty"):
        await engine.generate(GenerationRequest("empty", []))


@pytest.mark.parametrize(("name", "value"), [("seed", 3), ("temperature", 1e-7)])
async def test_what_sglang_would_not_honour_is_refused(engine: SGLangEngine, name: str, value: float) -> None:
    params = SamplingParams(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(PolicyError) as caught:
        await engine.generate(GenerationRequest("no", [5], params))
    assert caught.value.param == name


async def test_ids_name_one_request_each(engine: SGLangEngine) -> None:
    """SGLang aborts by the beginning of a name; `one` must not end `one more`."""
    params = SamplingParams(max_new_tokens=200)
    tasks = [
        asyncio.create_task(engine.generate(GenerationRequest(name, [5], params)))
        for name in ("one", "one more")
    ]
    await asyncio.sleep(0.2)
    with pytest.raises(ConfigurationError, match="in use"):
        await engine.generate(GenerationRequest("one", [5]))
    await engine.abort("one")
    first, second = [await task for task in tasks]
    assert first.finish_reason is FinishReason.ABORT
    assert len(second.token_ids) == 200


async def test_more_requests_than_slots_all_end(engine: SGLangEngine) -> None:
    params = SamplingParams(max_new_tokens=8)
    batch = [GenerationRequest(f"many-{index}", [5, 6], params) for index in range(200)]
    generations = await asyncio.gather(*(engine.generate(request) for request in batch))
    assert {len(generation.token_ids) for generation in generations} == {8}


async def test_a_generation_has_a_deadline(sglang: SGLangProcess) -> None:
    config = SGLangConfig(generate_s=0.2)
    async with await SGLangEngine.connect(sglang.url, config=config) as engine:
        for answer in (engine.generate(GenerationRequest("slow", [5])), read(engine)):
            with pytest.raises(DeadlineError):
                await answer


async def read(engine: SGLangEngine) -> None:
    async for _ in engine.stream(GenerationRequest("slow", [5])):
        pass


async def test_closing_ends_what_runs(sglang: SGLangProcess) -> None:
    engine = await SGLangEngine.connect(sglang.url)
    task = asyncio.create_task(engine.generate(GenerationRequest("open", [5])))
    await asyncio.sleep(0.2)
    await engine.aclose()
    assert (await task).finish_reason is FinishReason.ABORT
    with pytest.raises(GymError, match="closed"):
        await engine.generate(GenerationRequest("late", [5]))
    await engine.aclose()
