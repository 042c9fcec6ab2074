"""What is reported is what the policy did: tokens, log-probs at the request's temperature, stop tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from transformers import PreTrainedModel

from backends.engine import FinishReason, Generation, GenerationRequest, SamplingParams
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.sglang import SGLangEngine
from gym_sdk import GymClient, Limits, Outcome, Sampling
from gym_sdk.environments import arithmetic, arithmetic_tasks

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(600)]

Scores = Callable[..., list[float]]
TOLERANCE = 1e-4
EOS = 2
PROMPT = [5, 17, 42, 108, 9]


def requests(**sampling: object) -> list[GenerationRequest]:
    params = SamplingParams(max_new_tokens=48, **sampling)  # type: ignore[arg-type]
    return [GenerationRequest(f"{sampling}-{index}", [*PROMPT, 20 + index], params) for index in range(4)]


def distance(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


@pytest_asyncio.fixture
async def client(engine: SGLangEngine, tiny_policy: Path) -> AsyncIterator[GymClient]:
    policy = Policy(engine, TemplateRenderer.from_folder(tiny_policy))
    async with TestServer(make_app(policy), handler_cancellation=True) as server:
        async with GymClient(str(server.make_url("/v1")), model="policy") as client:
            yield client


async def test_rollouts_with_tools_are_one_row_with_the_models_log_probs(
    client: GymClient, trained: PreTrainedModel, forward: Scores
) -> None:
    collection = await client.collect(
        arithmetic_tasks(size=12, seed=11),
        environment=arithmetic(),
        group_size=4,
        sampling=Sampling(temperature=1.0, max_output_tokens=64),
        limits=Limits(concurrency=48, max_turns=4),
    )
    used_tools, worst = 0, 0.0
    for rollout in collection.rollouts:
        assert rollout.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED)
        assert rollout.metrics.get("forks", 0.0) == 0.0
        (row,) = rollout.sequences()
        used_tools += len(rollout.model_calls) > 1
        calls = [call.tokens for call in rollout.model_calls if call.tokens]
        assert row.trained_tokens == sum(len(call.generation_token_ids) for call in calls)
        # every generation stands in the row where it was sampled: what follows extends it, token for token
        whole = Generation(row.token_ids[1:], [], FinishReason.STOP, ())
        expected = [0.0, *forward(trained, row.token_ids[:1], whole, 1.0)]
        pairs = zip(row.loss_mask, row.log_probs, expected, strict=True)
        worst = max(worst, *(abs(found - wanted) for learned, found, wanted in pairs if learned))
    assert len(collection.rollouts) == 48
    assert used_tools >= 4
    assert worst < TOLERANCE


async def test_log_probs_are_those_of_the_requests_temperature_in_any_batch(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    kinds: list[dict[str, object]] = [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 5},
        {"temperature": 0.5, "top_k": 1},
    ]
    for together in (True, False):  # SGLang treats a batch that is greedy throughout otherwise
        batches = [requests(**kind) for kind in kinds]
        if together:
            batches = [[request for batch in batches for request in batch]]
        for batch in batches:
            generations = await asyncio.gather(*(engine.generate(request) for request in batch))
            for request, generation in zip(batch, generations, strict=True):
                temperature = request.sampling.temperature
                expected = forward(trained, request.prompt_token_ids, generation, temperature)
                assert len(generation.token_ids) == 48
                assert distance(generation.log_probs, expected) < TOLERANCE


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.5, "top_k": 1}])
async def test_greedy_takes_the_likeliest_token(
    engine: SGLangEngine, trained: PreTrainedModel, sampling: dict[str, float]
) -> None:
    import torch

    request = requests(**sampling)[0]
    generation = await engine.generate(request)
    with torch.no_grad():
        logits = trained(torch.tensor([[*request.prompt_token_ids, *generation.token_ids]])).logits[0]
    best = logits[len(request.prompt_token_ids) - 1 : -1].argmax(dim=-1)
    assert best.tolist() == generation.token_ids


async def test_a_stream_says_what_a_generation_says(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    request = requests(temperature=1.0)[0]
    pieces = [piece async for piece in engine.stream(request)]
    assert len(pieces) > 1
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason is FinishReason.LENGTH
    ids = [token for piece in pieces for token in piece.token_ids]
    scores = [score for piece in pieces for score in piece.log_probs]
    whole = Generation(ids, scores, FinishReason.LENGTH, ())
    assert len(ids) == 48
    assert distance(scores, forward(trained, request.prompt_token_ids, whole, 1.0)) < TOLERANCE


async def test_only_the_requests_stop_tokens_end_it_and_they_are_part_of_it(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    stops = frozenset(range(200, 240))
    params = SamplingParams(max_new_tokens=300, temperature=3.0, stop_token_ids=stops)
    batch = [GenerationRequest(f"stop-{index}", PROMPT, params) for index in range(32)]
    generations = await asyncio.gather(*(engine.generate(request) for request in batch))
    for generation in generations:
        assert generation.finish_reason is FinishReason.STOP
        assert generation.token_ids[-1] in stops
        assert not stops & set(generation.token_ids[:-1])
    # the model's own EOS is a token like any other, unless it is named
    free = SamplingParams(max_new_tokens=200, temperature=3.0, stop_token_ids=frozenset({0}))
    many = [GenerationRequest(f"free-{index}", PROMPT, free) for index in range(16)]
    generations = await asyncio.gather(*(engine.generate(request) for request in many))
    inside = [generation for generation in generations if EOS in generation.token_ids[:-1]]
    assert inside
    for generation in inside:
        assert distance(generation.log_probs, forward(trained, PROMPT, generation, 3.0)) < TOLERANCE
        assert generation.weight_versions[0].end == len(generation.token_ids)
