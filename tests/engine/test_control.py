from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import FinishReason, Generation, PauseMode
from backends.transformers import EngineConfig, TransformersEngine
from gym_sdk.errors import ConfigurationError, GymError

pytestmark = pytest.mark.asyncio


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def start(
    engine: TransformersEngine, make_request: Callable, make_prompt: Callable, count: int, **keywords: Any
) -> list[asyncio.Task[Generation]]:
    return [
        asyncio.create_task(engine.generate(make_request(make_prompt(5, seed), None, **keywords)))
        for seed in range(count)
    ]


async def test_a_stream_gives_every_token_and_then_the_reason(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        whole = await engine.generate(make_request(make_prompt(9), 30, seed=1))
        chunks = [chunk async for chunk in engine.stream(make_request(make_prompt(9), 30, seed=1))]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [FinishReason.LENGTH]
    assert len(chunks) > 5
    assert {chunk.weight_version for chunk in chunks} == {"0"}


async def test_leaving_a_stream_early_frees_its_slot(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        stream = engine.stream(make_request(make_prompt(5), None))
        async for _ in stream:
            break
        await stream.aclose()
        await until(lambda: engine.info.running == 0)
        assert engine.info.waiting == 0


async def test_cancelling_frees_the_slot_and_the_name(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, slow: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(max_running=1)) as engine:
        slow(engine)
        running, waiting = start(engine, make_request, make_prompt, 2)
        await until(lambda: engine.info.running == 1)
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: engine.info.running == engine.info.waiting == 0)
        after = await engine.generate(make_request(make_prompt(5), 5, name="request-0"))
        assert after.finish_reason is FinishReason.LENGTH


async def test_abort_ends_one_or_all(
    qwen3: PreTrainedModel,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
    slow: Callable,
    in_progress: Callable,
) -> None:
    config = EngineConfig(max_running=2)
    async with TransformersEngine(qwen3, config=config) as engine:
        slow(engine)
        tasks = start(engine, make_request, make_prompt, 4)
        await in_progress(engine, 2, tokens=3)
        assert await engine.abort("request-0") == 1
        first = await tasks[0]
        assert first.finish_reason is FinishReason.ABORT
        assert worst_difference(qwen3, make_prompt(5, 0), first) <= 1e-4
        assert await engine.abort("request-0") == 0
        assert await engine.abort("nobody") == 0
        assert await engine.abort() == 3
        for task in tasks[1:]:
            generation = await task
            assert generation.finish_reason is FinishReason.ABORT
            assert len(generation.token_ids) == len(generation.log_probs)
        assert await engine.abort() == 0


async def test_an_aborted_stream_ends_with_the_reason(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(qwen3) as engine:
        stream = engine.stream(make_request(make_prompt(5), None, name="it"))
        await anext(stream)
        await engine.abort("it")
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_pause_stops_sampling_and_changes_nothing(
    qwen3: PreTrainedModel,
    mode: PauseMode,
    make_request: Callable,
    make_prompt: Callable,
    slow: Callable,
    in_progress: Callable,
) -> None:
    async with TransformersEngine(qwen3) as engine:
        whole = [
            await engine.generate(make_request(make_prompt(5, seed), 150, seed=seed)) for seed in range(3)
        ]
        slow(engine)
        tasks = [
            asyncio.create_task(engine.generate(make_request(make_prompt(5, seed), 150, seed=seed)))
            for seed in range(3)
        ]
        await in_progress(engine, 3, tokens=3)
        await engine.pause(mode)
        running = list(engine._requests.values())
        counts = [len(state.token_ids) for state in running]
        assert all(3 <= count < 150 for count in counts)
        late = asyncio.create_task(engine.generate(make_request(make_prompt(5), 5)))
        await asyncio.sleep(0.05)
        assert [len(state.token_ids) for state in running] == counts
        assert engine.info.running == (3 if mode == "in_place" else 0)
        assert bool(engine._scheduler._table.cache.keys) == (mode == "in_place")
        await engine.continue_generation()
        await engine.continue_generation()
        assert [(await task).token_ids for task in tasks] == [generation.token_ids for generation in whole]
        assert len((await late).token_ids) == 5


async def test_pause_abort_ends_what_runs_and_keeps_what_waits(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable, slow: Callable
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(max_running=2)) as engine:
        slow(engine)
        tasks = start(engine, make_request, make_prompt, 3)
        await until(lambda: engine.info.running == 2)
        await engine.pause("abort")
        for task in tasks[:2]:
            assert (await task).finish_reason is FinishReason.ABORT
        assert engine.info.waiting == 1
        await engine.continue_generation()
        assert (await tasks[2]).finish_reason is FinishReason.LENGTH


async def test_an_unknown_pause_mode_is_refused(qwen3: PreTrainedModel) -> None:
    async with TransformersEngine(qwen3) as engine:
        with pytest.raises(ConfigurationError, match="pause mode"):
            await engine.pause("softly")  # type: ignore[arg-type]


@pytest.mark.parametrize("paused", [False, True])
async def test_close_ends_what_is_in_flight(
    qwen3: PreTrainedModel, paused: bool, make_request: Callable, make_prompt: Callable, slow: Callable
) -> None:
    engine = TransformersEngine(qwen3, config=EngineConfig(max_running=2))
    slow(engine)
    tasks = start(engine, make_request, make_prompt, 4)
    await until(lambda: engine.info.running == 2)
    if paused:
        await engine.pause()
    await engine.aclose()
    assert [(await task).finish_reason for task in tasks] == [FinishReason.ABORT] * 4
    await engine.aclose()
    for call in (engine.generate(make_request([1])), engine.pause(), engine.continue_generation()):
        with pytest.raises(GymError, match="closed"):
            await call
    assert await engine.abort() == 0


async def test_close_right_after_a_request_hangs_nobody(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    for _ in range(20):
        engine = TransformersEngine(qwen3)
        tasks = start(engine, make_request, make_prompt, 3)
        await asyncio.sleep(0)
        await engine.aclose()
        async with asyncio.timeout(5):
            assert {(await task).finish_reason for task in tasks} == {FinishReason.ABORT}


async def test_an_engine_that_was_never_used_closes(qwen3: PreTrainedModel) -> None:
    await TransformersEngine(qwen3).aclose()


async def test_a_crash_fails_everybody_with_its_cause(
    qwen3: PreTrainedModel,
    make_request: Callable,
    make_prompt: Callable,
    slow: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with TransformersEngine(qwen3, config=EngineConfig(max_running=2)) as engine:
        slow(engine)
        tasks = start(engine, make_request, make_prompt, 4)
        stream = engine.stream(make_request(make_prompt(5), None))
        await until(lambda: engine.info.running == 2)
        boom = RuntimeError("out of something")

        def explode(*_: object) -> None:
            raise boom

        engine._scheduler.module.register_forward_pre_hook(explode)
        for task in tasks:
            with pytest.raises(GymError, match="out of something") as caught:
                await task
            assert caught.value.__cause__ is boom
        with pytest.raises(GymError, match="out of something"):
            await anext(stream)
        with pytest.raises(GymError, match="broke: RuntimeError: out of something") as caught:
            await engine.generate(make_request(make_prompt(5)))
        assert caught.value.__cause__ is boom
        with pytest.raises(GymError, match="broke"):
            await engine.pause()
        assert engine.info.running == engine.info.waiting == 0
    assert "the step thread broke" in caplog.text


async def test_weights_that_give_nan_fail_the_request_and_not_the_engine(
    make_model: Callable, make_request: Callable, make_prompt: Callable
) -> None:
    model = make_model("llama")
    kept = model.lm_head.weight.detach().clone()
    async with TransformersEngine(model) as engine:
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(GymError, match="version '0' give NaN"):
            await engine.generate(make_request(make_prompt(5)))
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)
        assert len((await engine.generate(make_request(make_prompt(5)))).token_ids) == 8


async def test_a_step_that_hangs_is_reported_by_close(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    engine = TransformersEngine(qwen3, config=EngineConfig(close_timeout_s=0.1))
    release = threading.Event()
    engine._scheduler.module.register_forward_pre_hook(lambda *_: release.wait(30) and None)
    (task,) = start(engine, make_request, make_prompt, 1)
    await until(lambda: engine.info.running == 1)
    with pytest.raises(GymError, match=r"within 0\.1 s"):
        await engine.aclose()
    with pytest.raises(GymError, match="did not end"):
        await task
    release.set()
    await engine.aclose()


async def test_the_event_loop_stays_responsive(
    make_model: Callable, make_request: Callable, make_prompt: Callable
) -> None:
    model = make_model("qwen3", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    async with TransformersEngine(model) as engine:
        work = asyncio.gather(
            *(engine.generate(make_request(make_prompt(60, seed), 60)) for seed in range(64))
        )
        lags = []
        while not work.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before - 0.001)
        await work
    assert len(lags) > 20
    # a step takes longer than that: a loop that waited for steps would show it in every sample
    assert sorted(lags)[len(lags) // 2] < 0.02


async def test_engines_live_side_by_side(
    make_model: Callable, make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    models = [make_model("qwen3", seed=1), make_model("llama", seed=2)]
    async with TransformersEngine(models[0]) as one, TransformersEngine(models[1]) as other:
        engines = [one, other] * 4
        request = make_request(make_prompt(10), 40)
        names = [f"request-{number}" for number in range(8)]
        del request
        generations = await asyncio.gather(
            *(
                engine.generate(make_request(make_prompt(10), 40, name=name))
                for engine, name in zip(engines, names, strict=True)
            )
        )
    for number, generation in enumerate(generations):
        assert worst_difference(models[number % 2], make_prompt(10), generation) <= 1e-4


async def test_one_engine_serves_several_loops(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    engine = TransformersEngine(qwen3)

    async def ask() -> Generation:
        return await engine.generate(make_request(make_prompt(10), 10, seed=0))

    here = await ask()
    there = await asyncio.to_thread(asyncio.run, ask())
    assert here.token_ids == there.token_ids
    await engine.aclose()


async def test_a_dropped_engine_ends_its_thread(
    qwen3: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    engine = TransformersEngine(qwen3)
    await engine.generate(make_request(make_prompt(5)))
    thread = engine._worker._thread
    assert thread is not None
    assert thread.is_alive()
    del engine
    gc.collect()
    await until(lambda: not thread.is_alive())
