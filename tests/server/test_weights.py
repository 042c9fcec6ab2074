"""Weights over HTTP into the embedded engine, and what the routes refuse."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp.test_utils import TestServer
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, PreTrainedModel

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.server import make_app
from backends.server.weights import WeightLimits
from gym_sdk import GymClient
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.grpo import BroadcastSync, TensorSync
from gym_sdk.schema.weights import AdapterWeights, TensorSpec, WeightsGroup, in_buckets
from gym_sdk.transport.tensors import TensorStream, without_ties

pytestmark = pytest.mark.asyncio

TENSORS = "/update_weights_from_tensor"
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def model(untrained_policy: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(untrained_policy)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@asynccontextmanager
async def serving(
    folder: Path, limits: WeightLimits | None = None
) -> AsyncIterator[tuple[Policy, TestServer]]:
    policy = load_policy(PolicyConfig(model=str(folder)))
    try:
        async with TestServer(make_app(policy, weights=limits)) as server:
            yield policy, server
    finally:
        await policy.aclose()


async def test_tensors_over_http_are_the_model(
    untrained_policy: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    async with serving(untrained_policy, WeightLimits(folder=tmp_path)) as (policy, server):
        async with GymClient(str(server.make_url("/v1"))) as client:
            await TensorSync(client).push(model, version="pushed")
            response = await client.respond("What is 2 + 2?", max_output_tokens=16)
    assert list(tmp_path.iterdir()) == []
    assert response.tokens is not None
    assert {span.version for span in response.tokens.weight_versions} == {"pushed"}
    prompt, sampled = response.tokens.prompt_token_ids, response.tokens.generation_token_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1].float()
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(sampled)[:, None])[:, 0]
    found = torch.tensor(response.tokens.generation_log_probs)
    assert (found - expected).abs().max() < 1e-4
    served = policy.engine.model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(tensor, served[name]) for name, tensor in model.state_dict().items())


BODY = save({"a": torch.ones(3)})


@pytest.mark.parametrize(
    ("query", "headers", "body", "status", "message"),
    [
        ("", OCTETS, BODY, 400, "weight_version"),
        ("?weight_version=", OCTETS, BODY, 400, "weight_version"),
        ("?weight_version=1", {"Content-Type": "application/json"}, b"{}", 415, "safetensors"),
        ("?weight_version=1", OCTETS, b"", 400, "no whole file"),
        ("?weight_version=1", OCTETS, b"no safetensors at all", 400, "no whole file"),
        ("?weight_version=1", OCTETS, BODY[:-1], 400, "no whole file"),
        ("?weight_version=1", OCTETS, BODY + b"x", 400, "no whole file"),
        ("?weight_version=1", OCTETS, struct.pack("<Q", 2) + b"{}", 400, "no tensors"),
        ("?weight_version=1", OCTETS, BODY, 400, "does not fit the model"),
        ("?weight_version=1", OCTETS, bytes(2000), 413, "at most 1000"),
    ],
)
@pytest.mark.parametrize("asks_first", [True, False])
async def test_a_wrong_body_is_refused_by_what_is_wrong_with_it(
    untrained_policy: Path,
    tmp_path: Path,
    query: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    message: str,
    asks_first: bool,
) -> None:
    limits = WeightLimits(upload_bytes=1000, folder=tmp_path)
    async with serving(untrained_policy, limits) as (policy, server):
        url = str(server.make_url(TENSORS)) + query
        async with aiohttp.ClientSession() as session:
            async with session.post(url, data=body, headers=headers, expect100=asks_first) as answer:
                assert answer.status == status
                assert message in (await answer.json())["error"]["message"]
        assert policy.engine.info.weight_version == "0"
    assert list(tmp_path.iterdir()) == []


async def test_a_body_of_no_stated_length_is_bounded_too(untrained_policy: Path, tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(2**20)

    limits = WeightLimits(upload_bytes=6 * 2**20, folder=tmp_path)
    async with serving(untrained_policy, limits) as (_, server):
        async with aiohttp.ClientSession() as session:
            url = str(server.make_url(TENSORS)) + "?weight_version=1"
            async with session.post(url, data=endless(), headers=OCTETS) as answer:
                assert answer.status == 413
    assert list(tmp_path.iterdir()) == []


async def test_a_client_hears_of_the_limit_before_it_sends(
    untrained_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gym_sdk.transport.tensors._bytes", lambda tensor: pytest.fail("it was sent"))
    async with serving(untrained_policy, WeightLimits(upload_bytes=1000)) as (_, server):
        async with GymClient(str(server.make_url("/v1"))) as client:
            with pytest.raises(PolicyError, match="at most 1000") as caught:
                await client.update_weights({"a": torch.zeros(50 * 2**20)}, version="1")
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("load_lora_adapter", {"lora_path": "x"}, "weight_version"),
        ("load_lora_adapter", {"weight_version": "1"}, "lora_path"),
        ("load_lora_adapter", {"lora_path": "x", "weight_version": "1"}, "AdapterWeights.*TensorSync"),
        ("update_weights_from_distributed", {"names": ["a"]}, "dtypes"),
        (
            "update_weights_from_distributed",
            {"names": ["a"], "dtypes": [], "shapes": [], "weight_version": "1"},
            "one length",
        ),
        (
            "update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["text"], "shapes": [[1]], "weight_version": "1"},
            "cannot be of type",
        ),
        (
            "update_weights_from_distributed",
            {"names": [], "dtypes": [], "shapes": [], "weight_version": "1", "load_format": "direct"},
            "load_format",
        ),
        ("init_weights_update_group", {"master_address": "x"}, "master_port"),
        (
            "init_weights_update_group",
            {"master_address": "x", "master_port": 1, "rank_offset": 1, "world_size": 1},
            "first_rank",
        ),
        (
            "init_weights_update_group",
            {"master_address": "x", "master_port": 1, "rank_offset": 1, "world_size": 2},
            "joins no group",
        ),
        ("destroy_weights_update_group", {}, "joins no group"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    untrained_policy: Path, route: str, body: dict[str, Any], message: str
) -> None:
    async with serving(untrained_policy) as (policy, server):
        async with aiohttp.ClientSession() as session:
            async with session.post(str(server.make_url(f"/{route}")), json=body) as answer:
                assert answer.status == 400
                text = json.dumps(await answer.json())
        assert re.search(message, text), text
        assert policy.engine.info.weight_version == "0"


async def test_the_embedded_engine_names_the_way_out(untrained_policy: Path, tmp_path: Path) -> None:
    async with GymClient.local(untrained_policy) as client:
        with pytest.raises(ConfigurationError, match="TensorSync"):
            await client.update_weights(AdapterWeights(tmp_path), version="1")
        with pytest.raises(ConfigurationError, match="TensorSync"):
            await client.weight_ranks()
        with pytest.raises(ConfigurationError, match="TensorSync"):
            await client.join_weights_group(WeightsGroup("g", "localhost", 1, "gloo", 1, 2))
        with pytest.raises(ConfigurationError, match="TensorSync"):
            await client.leave_weights_group("g")
        model = AutoModelForCausalLM.from_pretrained(str(untrained_policy))
        async with BroadcastSync(client) as sync:
            with pytest.raises(ConfigurationError, match="TensorSync"):
                await sync.push(model, version="1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
async def test_a_stream_of_tensors_is_what_safetensors_writes(dtype: torch.dtype) -> None:
    base = (torch.randn(6, 5) * 3).to(dtype)
    tensors = {"a": base, "view": base.t()[1:, ::2], "none": base[:0], "scalar": base[0, 0].clone()}
    stream = TensorStream.of(tensors)
    data = b"".join([bytes(piece) async for piece in stream.pieces()])
    assert len(data) == stream.nbytes
    found = load(data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


async def test_tied_tensors_are_sent_once() -> None:
    one, other = torch.ones(2, 3), torch.ones(2, 3)
    tensors = {"lm_head.weight": one, "embed": one, "same values": other, "part": one[:1], "empty": one[:0]}
    assert list(without_ties(tensors)) == ["embed", "same values", "part", "empty"]


async def test_buckets_keep_the_order_and_the_size() -> None:
    specs = [TensorSpec(str(number), "float32", (size,)) for number, size in enumerate([1, 2, 9, 1, 1, 1])]
    parts = in_buckets(specs, 12)
    assert [[spec.name for spec in part] for part in parts] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert in_buckets([], 1) == []
